"""Where chunks and the windows around them lie in memory on a CPU: the rounds of an example behind one another."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class WindowShape(NamedTuple):
    """The chunks of an example in the joint order of all rounds, and those that its first and last window reach into.

    Args:
        tokens: valid ones of the example, 1 or more.
        rounds: of hashing.
        size: tokens of a chunk.
        own: chunks of a round; the last one may have fewer tokens.
        front, back: chunks of a window before and behind the one that attends it.
        wrap: the chunks are a ring; otherwise nothing is before the first one and behind the last.
    """

    tokens: int
    rounds: int
    size: int
    own: int
    front: int
    back: int
    wrap: bool

    @property
    def count(self) -> int:
        """Chunks, and so windows, of all rounds."""
        return self.rounds * self.own

    @property
    def slots(self) -> int:
        """Chunks of a window."""
        return self.front + 1 + self.back

    @property
    def span(self) -> int:
        """Keys of a window."""
        return self.slots * self.size

    @property
    def padded(self) -> int:
        """Chunks in memory, with those around."""
        return self.count + self.front + self.back

    def hidden(self) -> list[tuple[int, int]]:
        """Ranges of windows in which there are places without a token."""
        chunks = [] if self.tokens == self.own * self.size else range(self.own - 1, self.count, self.own)
        outside = [] if self.wrap else [-1, self.count]
        return self._ranges(chunk + step for chunk in (*chunks, *outside) for step in range(-self.back, self.front + 1))

    def crossing(self) -> list[tuple[int, int]]:
        """Ranges of windows with chunks of more than one round."""
        starts = range(0, self.count, self.own) if self.rounds > 1 else ()
        return self._ranges(start + step for start in starts for step in range(-self.back, self.front))

    def _ranges(self, numbers: Iterable[int]) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        for number in sorted({x % self.count if self.wrap else x for x in numbers}):
            if not 0 <= number < self.count:
                continue
            start = ranges.pop()[0] if ranges and ranges[-1][1] == number else number
            ranges.append((start, number + 1))
        return ranges


def window_shape(
    tokens: int, rounds: int, *, chunk_length: int, chunks_before: int, chunks_after: int, causal: bool, wrap: bool
) -> WindowShape:
    """The windows of an example of so many tokens; one that would hold a chunk twice is shorter.

    Without `wrap` sorted order must be that of the text if it is `causal`.
    """
    own = (tokens + chunk_length - 1) // chunk_length
    count = rounds * own
    if wrap:
        front = chunks_before % count
        back = min(chunks_before + 1 + chunks_after, count) - 1 - front
        whole = front + 1 + back == count
    else:
        front, back = min(chunks_before, own - 1), 0 if causal else min(chunks_after, own - 1)
        whole = front == own - 1 and (causal or back == own - 1)
    if rounds == 1 and whole:
        # Every token meets every one: a single chunk needs no copies.
        return WindowShape(tokens, 1, tokens, 1, 0, 0, wrap)
    return WindowShape(tokens, rounds, chunk_length, own, front, back, wrap)


class Rows(NamedTuple):
    """`[batch, heads, length, d]` as rows `[*, d]`, and how many rows further the next example, head and token are."""

    rows: Tensor
    steps: tuple[int, int, int]

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.rows.shape[1]


def as_rows(tensor: Tensor) -> Rows:
    """A view, for the usual orders in memory."""
    width = tensor.shape[3]
    if tensor.stride(3) != 1 or any(stride % width for stride in tensor.stride()[:3]):
        tensor = tensor.contiguous()
    steps = tuple(stride // width for stride in tensor.stride()[:3])
    count = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, steps, strict=False))
    return Rows(tensor.as_strided((count, width), (width, 1)), steps)


class SortedExamples:
    """Some examples with equally many valid tokens: where each place of each round is in the text, and the way back.

    Places are those of `shape.padded` chunks. Tensors are `[examples, heads, ...]`, on which parts are cut.

    Args:
        shape: of each of these examples.
        examples: which ones.
        heads: number of heads.
        order: int64 `[batch or 1, heads or 1, rounds, >= tokens]`, the token at each place of a round.
        inverse: int64 `[batch or 1, heads or 1, rounds, length]`, places of tokens; padding is from `tokens` on.
        dtype: of positions.
    """

    def __init__(
        self, shape: WindowShape, examples: slice, heads: int, order: Tensor, inverse: Tensor, dtype: torch.dtype
    ) -> None:
        self.shape, self.examples, self.outer = shape, examples, (examples.stop - examples.start, heads)
        self.inverse = self._of(inverse)
        order = self._of(order)[..., : shape.tokens]
        # Places without a token get a valid one of the same example: no number of another example is ever near.
        missing = shape.own * shape.size - shape.tokens
        tokens = torch.cat([order, order[..., :1].expand(*order.shape[:3], missing)], dim=-1)
        position = tokens.to(dtype)
        position[..., shape.tokens :] = torch.inf
        self._tokens = self._around(tokens.flatten(2), None)
        #: `[examples, heads, places]`, the number of the token, inf where there is none.
        self.position = self._around(position.flatten(2), torch.inf).expand(*self.outer, -1)
        number = torch.arange(shape.rounds, device="cpu")[:, None] * inverse.shape[-1]
        #: Likewise, int64, where a round's number of the token is in `[rounds * length]`.
        self.in_rounds = None
        if shape.rounds > 1:
            self.in_rounds = self._around((tokens + number).flatten(2), None).expand(*self.outer, -1)
        self._index: dict[tuple[int, int, int], Tensor] = {}

    def _of(self, numbers: Tensor) -> Tensor:
        return numbers if numbers.shape[0] == 1 else numbers[self.examples]

    def _around(self, places: Tensor, empty: float | None) -> Tensor:
        """`[..., count * size]` with the chunks around it; those outside the text hold `empty`, or the first number."""
        shape = self.shape
        front, back = shape.front * shape.size, shape.back * shape.size
        if shape.wrap:
            return torch.cat([places[..., places.shape[-1] - front :], places, places[..., :back]], dim=-1)
        outside = places[..., :1] if empty is None else places.new_full((1,), empty)
        outside = outside.expand(*places.shape[:-1], front + back)
        return torch.cat([outside[..., :front], places, outside[..., front:]], dim=-1)

    def index(self, steps: tuple[int, int, int]) -> Tensor:
        """Numbers of `Rows` with these steps, `[examples, heads, places]`."""
        if steps not in self._index:
            example = torch.arange(self.examples.start, self.examples.stop, device="cpu")[:, None] * steps[0]
            first = example + torch.arange(self.outer[1], device="cpu") * steps[1]
            tokens = self._tokens if steps[2] == 1 else self._tokens * steps[2]
            self._index[steps] = first[:, :, None] + tokens
        return self._index[steps]

    def places(self, where: tuple[slice, slice]) -> Tensor:
        """The first chunks' place of each token in each round, for some of the examples and heads.

        Returns:
            int64 `[examples * heads, rounds, length]`, numbered through all of these heads, `shape.padded` chunks each;
            padding has the place behind the last one.
        """
        shape = self.shape
        number = torch.arange(shape.rounds, device="cpu")[:, None] * (shape.own * shape.size)
        count = tuple(part.stop - part.start for part in where)
        first = torch.arange(count[0] * count[1], device="cpu").view(*count, 1, 1) * (shape.padded * shape.size)
        inverse = self.inverse if self.inverse.shape[0] == 1 else self.inverse[where[0]]
        inverse = inverse if inverse.shape[1] == 1 else inverse[:, where[1]]
        places = inverse + number + first
        if shape.tokens < inverse.shape[-1]:
            places = places.masked_fill(inverse >= shape.tokens, first.numel() * shape.padded * shape.size)
        return places.flatten(0, 1)
