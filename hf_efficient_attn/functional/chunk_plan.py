"""Which chunk of tokens attends which: sorted order, chunks of it, and neighbouring chunks, example by example."""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import count_blocks


# What the score of a token with itself loses where it should attend itself only if there is nothing else.
SELF_PENALTY = 1e5
# Far below every score with its penalties, and far enough from the end of float32 to add to.
EXCLUDED = -1e30


def cut(tensor: Tensor, size: int, dim: int) -> Tensor:
    """`tensor` with dimension `dim` cut into pieces of `size`: `[..., pieces, size, ...]`.

    Not as a view: of a size that is an expression, torch cannot tell that the number of pieces divides it.
    """
    return tensor.unfold(dim, size, size).movedim(-1, dim + 1)


class ChunkPlan(NamedTuple):
    """Chunks of each example's own tokens in the order of each round, padding behind them.

    Args:
        order: int64 `[batch or 1, heads or 1, rounds, places]`, the token at each place; places are a multiple of the
            chunk length, those behind the length hold token 0.
        inverse: int64 `[batch or 1, heads or 1, rounds, length]`, the place of each token.
        neighbours: int64 `[batch or 1, rounds * chunks, slots]`, the chunks that each one attends, numbered through all
            rounds.
        seen: bool like `neighbours`, False at slots that hold no chunk, or one that another slot holds already.
        filled: bool `[batch or 1, rounds * chunks, chunk_length]`, True at places of valid tokens.
    """

    order: Tensor
    inverse: Tensor
    neighbours: Tensor
    seen: Tensor
    filled: Tensor

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk."""
        return self.filled.shape[2]

    def tokens(self) -> Tensor:
        """`order` chunk by chunk: `[batch or 1, heads or 1, rounds * chunks, chunk_length]`."""
        return cut(self.order, self.chunk_length, 3).flatten(2, 3)

    def of_neighbours(self, chunks: Tensor) -> Tensor:
        """For each chunk its neighbours: `[b, h, rounds * chunks, ...]` -> `[b, h, rounds * chunks, slots, ...]`."""
        batch = max(chunks.shape[0], self.neighbours.shape[0])
        chunks, inner = chunks.expand(batch, *chunks.shape[1:]), chunks.shape[3:]
        flat = chunks.flatten(3)
        index = self.neighbours.flatten(1)[:, None, :, None]
        found = flat.gather(2, index.expand(batch, flat.shape[1], -1, flat.shape[3]))
        return cut(found, self.neighbours.shape[2], 2).unflatten(-1, inner)


def valid_counts(key_padding_mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Valid tokens of each example, int64 `[batch]`; `[1]` without a mask."""
    if key_padding_mask is None:
        return torch.full((1,), length, dtype=torch.long, device=device)
    return key_padding_mask.sum(dim=1)


def plan_chunks(
    buckets: Tensor | None,
    key_padding_mask: Tensor | None,
    length: int,
    device: torch.device,
    *,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    wrap: bool,
) -> ChunkPlan:
    """Sort tokens by bucket and position, and find each chunk's neighbours.

    Args:
        buckets: int64 `[batch, heads, rounds, length]`; None leaves tokens in their order, in one round.
        key_padding_mask: `[batch, length]` bool, True = attend, or None.
        length: number of tokens.
        device: of the plan.
        chunk_length: tokens of a chunk; the last one of an example may have fewer.
        chunks_before, chunks_after: neighbours of a chunk besides itself.
        wrap: the first chunk follows the last one of the round before it, that of the first round the very last one,
            as in the released code; else nothing is before it.
    """
    keys = torch.zeros(1, 1, 1, length, dtype=torch.long, device=device) if buckets is None else buckets
    if key_padding_mask is not None:
        keys = keys.masked_fill(~key_padding_mask[:, None, None, :], torch.iinfo(torch.long).max)
    rounds = keys.shape[2]
    ordered = keys.argsort(dim=-1, stable=True)
    chunks = count_blocks(length, chunk_length)
    order = torch.nn.functional.pad(ordered, (0, chunks * chunk_length - length))
    places = torch.arange(length, device=device).expand_as(ordered)
    inverse = torch.zeros_like(ordered).scatter(-1, ordered, places)

    count = valid_counts(key_padding_mask, length, device)
    own = ((count + chunk_length - 1) // chunk_length).clamp(min=1)[:, None, None, None]
    hash_round = torch.arange(rounds, device=device)[:, None, None]
    chunk = torch.arange(chunks, device=device)[:, None]
    slot = torch.arange(chunks_before + 1 + chunks_after, device=device)
    if wrap:
        through = (hash_round * own + chunk + slot - chunks_before) % (rounds * own)
        neighbours = through // own * chunks + through % own
        seen = (slot < rounds * own).expand_as(neighbours)
    else:
        near = chunk + slot - chunks_before
        seen = ((near >= 0) & (near < own)).expand(-1, rounds, -1, -1)
        neighbours = hash_round * chunks + torch.minimum(near.clamp(min=0), own - 1)
    filled = chunk * chunk_length + torch.arange(chunk_length, device=device) < count[:, None, None]
    filled = filled.repeat(1, rounds, 1)
    return ChunkPlan(order, inverse, neighbours.flatten(1, 2), seen.flatten(1, 2), filled)


def meeting_counts(plan: ChunkPlan, buckets: Tensor | None, queries: int) -> Tensor:
    """How often each of the last `queries` tokens meets each token: int64 `[batch or 1, heads or 1, queries, length]`.

    Args:
        plan: the chunks.
        buckets: only tokens of one bucket meet, with a plan that does not wrap; None for all of neighbouring chunks.
        queries: rows.
    """
    rounds, chunks = plan.order.shape[2], plan.order.shape[3] // plan.chunk_length
    offset = torch.arange(rounds, device=plan.order.device)[:, None] * chunks
    # The chunk of each token in each round, numbered through all rounds.
    place = plan.inverse // plan.chunk_length + offset
    batch = max(place.shape[0], plan.neighbours.shape[0])
    place = place.expand(batch, -1, -1, -1)
    mine = place[..., -queries:]
    slots = plan.neighbours.shape[2]
    near = plan.neighbours.masked_fill(~plan.seen, -1)[:, None].expand(batch, mine.shape[1], -1, -1)
    near = near.gather(2, mine.flatten(2)[..., None].expand(-1, -1, -1, slots)).unflatten(2, (rounds, -1))
    total = torch.zeros((), dtype=torch.long, device=place.device)
    for first in range(rounds):
        for second in range(rounds) if buckets is None else (first,):
            met = (near[:, :, first, :, None, :] == place[:, :, second, None, :, None]).any(dim=-1)
            if buckets is not None:
                met = met & (buckets[:, :, first, -queries:, None] == buckets[:, :, first, None, :])
            total = total + met
    return total
