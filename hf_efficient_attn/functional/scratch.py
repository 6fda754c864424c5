"""What kernels on a CPU share: memory that is used again, and dropout that a backward pass can replay."""

from typing import NamedTuple

import torch
from torch import Tensor


# Scores in memory at a time, for each thread. Small enough for a core's own cache, where the passes over them are
# several times quicker than in main memory; large enough that calling torch costs little beside the work.
CHUNK_BYTES = 2 * 2**20


class Scratch:
    """Memory by name, used again for every chunk: touching fresh memory costs more than most of the work done in it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any content, which the next call with this `name` overwrites."""
        count = torch.Size(shape).numel()
        held = self._held.get(name)
        if held is None or held.numel() < count:
            held = self._held[name] = torch.empty(count, dtype=dtype, device="cpu")
        return held[:count].view(shape)


class DropoutReplay(NamedTuple):
    """Dropout with probability `p`, the same each time it is drawn again from `seed`."""

    p: float
    seed: int

    def generator(self) -> torch.Generator:
        """A generator at its start."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def drop_level(self) -> int:
        """Signed 16-bit numbers below this are dropped: a share of `p`, at most all but one of 65,536."""
        return min(round(self.p * 2**16), 2**16 - 1) - 2**15

    @property
    def keep_share(self) -> float:
        """The share that dropout keeps, at the 16 bits it is drawn with; never 0, for it divides."""
        return (2**15 - self.drop_level) / 2**16

    def kept(self, like: Tensor, scratch: Scratch, generator: torch.Generator) -> Tensor:
        """Which entries dropout keeps, 1.0 or 0.0; 16 random bits an entry, several times quicker than `bernoulli_`."""
        count = like.numel()
        words = scratch.take("words", ((count + 3) // 4,), torch.int64).random_(-(2**63), None, generator=generator)
        numbers = words.view(torch.int16)[:count].view(like.shape)
        kept = torch.ge(numbers, self.drop_level, out=scratch.take("kept", like.shape, torch.bool))
        # To multiply with floats is several times quicker than to fill where a mask says so.
        return scratch.take("factors", like.shape, like.dtype).copy_(kept)


def draw_replay(dropout_p: float) -> DropoutReplay:
    """A `DropoutReplay` with a seed from torch's generator, which is left alone where nothing is dropped."""
    return DropoutReplay(dropout_p, int(torch.randint(2**62, (), device="cpu")) if dropout_p > 0.0 else 0)
