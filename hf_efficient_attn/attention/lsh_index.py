"""Which tokens the next one attends, from each bucket's first and last tokens alone: work that grows with the number of
buckets, which a prompt chooses, and not with the text.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """What one token attends, in each round.

    Args:
        tokens: int64 `[batch, heads, rounds, keys]`, positions; in several rounds a token may be there several times.
        allowed: bool, likewise.
        bias: what is added to scores, likewise, or None.
    """

    tokens: Tensor
    allowed: Tensor
    bias: Tensor | None


def index_is_smaller(buckets: int, chunk_length: int, chunks_before: int, length: int) -> bool:
    """Whether an index of so many buckets takes little beside the keys and values of `length` tokens.

    A prompt that chooses their number itself has at most two buckets a chunk, for which it does. With many more,
    sorting the text takes less.
    """
    return buckets * (chunks_before + 2) * chunk_length <= 8 * length


class BucketIndex:
    """For each bucket the number of its tokens, the first of them and the last of them.

    Sorted by bucket and position, the newest token is the last one of its bucket. So what its chunk and the chunks
    before it hold are, bucket by bucket, either last tokens (up to its own place, and where chunks wrap, up to the end)
    or first ones (behind its place): as many of each as this keeps, and never those between.

    Args:
        buckets: int64 `[batch, heads, rounds, length]` of all tokens so far.
        valid: bool `[batch, length]`, or None for all.
        room: buckets that there may be.
        chunk_length, chunks_before: as of `chunk_attention`.
        released: likewise.
    """

    def __init__(
        self,
        buckets: Tensor,
        valid: Tensor | None,
        *,
        room: int,
        chunk_length: int,
        chunks_before: int,
        released: bool,
    ) -> None:
        self.chunk_length, self.slots, self.released = chunk_length, chunks_before + 1, released
        self.taken_in, self.valid = buckets.shape[3], None if valid is None else valid.clone()
        self.room, heads, tails = room, chunk_length, (chunks_before + 1) * chunk_length
        outer, length, device = buckets.shape[:3], buckets.shape[3], buckets.device
        counted = torch.ones_like(buckets)
        if valid is not None:
            counted = counted * valid[:, None, None, :]
            buckets = buckets.masked_fill(~valid[:, None, None, :], room)
        self.counts = buckets.new_zeros(*outer, room + 1).scatter_add_(3, buckets, counted)[..., :room]
        order = buckets.argsort(dim=-1, stable=True)
        start = self.counts.cumsum(dim=-1) - self.counts
        rank = torch.arange(heads, device=device)
        self.first = self._of_order(order, start, rank.expand(*outer, room, heads), length)
        # The last ones stand in a ring, by their rank.
        ring = torch.arange(tails, device=device)
        last = self.counts[..., None] - 1
        rank = (last - (last - ring) % tails).clamp(min=0)
        self.last = self._of_order(order, start, rank, length)

    @staticmethod
    def _of_order(order: Tensor, start: Tensor, rank: Tensor, length: int) -> Tensor:
        """Tokens of each bucket at some ranks, anything where it has none: `[batch, heads, rounds, room, ranks]`."""
        place = (start[..., None] + rank).clamp(max=length - 1)
        return order.gather(3, place.flatten(3)).view_as(place).to(torch.int32)

    def is_before(self, length: int, valid: Tensor | None) -> bool:
        """Whether it holds all tokens but the last of `length` with the mask `valid` `[batch, length]`."""
        if self.taken_in != length - 1 or (self.counts.is_inference() and not torch.is_inference_mode_enabled()):
            return False  # what was made in inference mode must not be changed outside of it
        if valid is None or self.valid is None:
            return valid is self.valid
        return torch.equal(valid[:, :-1], self.valid)

    def add(self, bucket: Tensor, valid: Tensor | None) -> None:
        """Take in the next token, of `bucket` `[batch, heads, rounds]`; `valid` `[batch, length]` counts it."""
        bucket, token = bucket[..., None], self.taken_in
        rank = self.counts.gather(3, bucket)
        real = torch.ones_like(rank, dtype=torch.bool)
        if valid is not None:
            real = valid[:, -1, None, None, None].expand_as(rank)
        self.taken_in, self.valid = token + 1, None if valid is None else valid.clone()
        self.counts = self.counts.scatter_add(3, bucket, real.long())
        for tokens, place, fits in (
            (self.first, rank, real & (rank < self.first.shape[4])),
            (self.last, rank % self.last.shape[4], real),
        ):
            flat = tokens.flatten(3)
            index = bucket * tokens.shape[4] + place.clamp(max=tokens.shape[4] - 1)
            flat.scatter_(3, index, torch.where(fits, token, flat.gather(3, index)))

    def candidates(self, bucket: Tensor) -> Candidates:
        """What the token that came last attends, the last of `bucket` `[batch, heads, rounds]`."""
        size, rounds, device = self.chunk_length, bucket.shape[2], bucket.device
        ends = self.counts.cumsum(dim=-1)
        total = ends[..., -1:]
        chunk = (ends.gather(3, bucket[..., None]) - 1).clamp(min=0) // size
        slot = torch.arange(self.slots, device=device)
        number = torch.arange(rounds, device=device)[:, None]
        if self.released:
            own = ((total + size - 1) // size).clamp(min=1)
            through = (number * own + chunk + slot - self.slots + 1) % (rounds * own)
            where, chunk, seen = through // own, through % own, slot < rounds * own
        else:
            near = chunk + slot - self.slots + 1
            where, chunk, seen = number.expand_as(near), near.clamp(min=0), near >= 0
        places = (chunk[..., None] * size + torch.arange(size, device=device)).flatten(3)
        allowed = (places < total) & seen.repeat_interleave(size, dim=-1)
        where = where.repeat_interleave(size, dim=-1)
        found = self._bucket_at(ends, where, places)
        rank = places - self._at(ends - self.counts, where, found)
        tokens = self._token(where, found, rank)
        if self.released:
            return Candidates(tokens, allowed, None)
        allowed = allowed & (found == bucket[..., None])
        # A pair that meets in several rounds counts once: each time by its share.
        meetings = torch.zeros_like(tokens)
        for other in range(rounds):
            same = tokens[..., :, None] == tokens[:, :, other, None, None, :]
            meetings += (same & allowed[:, :, other, None, None, :]).any(dim=-1)
        return Candidates(tokens, allowed, -meetings.clamp(min=1).double().log())

    def map_(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` along the examples."""
        self.counts, self.first, self.last = (function(x) for x in (self.counts, self.first, self.last))
        self.valid = None if self.valid is None else function(self.valid)

    def _at(self, table: Tensor, where: Tensor, bucket: Tensor) -> Tensor:
        """`table[round, bucket]` for each of `[batch, heads, rounds, keys]`."""
        index = where * self.room + bucket
        return table.flatten(2).gather(2, index.flatten(2)).view_as(index)

    def _bucket_at(self, ends: Tensor, where: Tensor, places: Tensor) -> Tensor:
        """The bucket at each place of round `where`: the first that ends behind it."""
        found = torch.zeros_like(places)
        for number in range(ends.shape[2]):
            row = ends[:, :, number].contiguous()
            here = torch.searchsorted(row, places.flatten(2), right=True).view_as(places)
            found = torch.where(where == number, here, found)
        return found.clamp(max=self.room - 1)

    def _token(self, where: Tensor, bucket: Tensor, rank: Tensor) -> Tensor:
        heads, tails = self.first.shape[4], self.last.shape[4]
        slot = where * self.room + bucket
        index = slot * heads + rank.clamp(min=0, max=heads - 1)
        first = self.first.flatten(2).gather(2, index.flatten(2)).view_as(index)
        index = slot * tails + rank % tails
        last = self.last.flatten(2).gather(2, index.flatten(2)).view_as(index)
        # What is in neither is of places behind the end, which are not allowed.
        is_last = self._at(self.counts, where, bucket) - rank <= tails
        return torch.where(is_last, last, first).long()
