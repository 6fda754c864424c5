"""The cache of an LSH layer: keys and values of all tokens, their buckets, and what the next token needs of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .lsh_index import BucketIndex, Candidates, index_is_smaller


class LSHCacheLayer(DynamicLayer):
    """Keys, values and buckets, and the bucket factors that the prompt had.

    `factors` is int64 `[batch or 1, tables]`, `sizes` the room for each, `buckets` int64 `[batch, heads, rounds,
    length]`. Tensors grow into room that is made a quarter at a time, so that a token does not copy all before it: one
    that was taken out changes with the cache, and to go on in two ways takes `copy.deepcopy`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors: Tensor | None = None
        self.sizes: tuple[int, ...] = ()
        self.buckets: Tensor | None = None
        self.room: int | None = None  # buckets that there may be
        self._index: BucketIndex | None = None
        self._memory: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values `[batch, heads, tokens, head_dim]` behind those that are there; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._grown("keys", self.keys, key_states, 2)
        self.values = self._grown("values", self.values, value_states, 2)
        return self.keys, self.values

    def extend_buckets(self, new: Tensor) -> Tensor:
        """Buckets `[batch, heads, rounds, tokens]` behind those that are there; returns all."""
        self.buckets = new if self.buckets is None else self._grown("buckets", self.buckets, new, 3)
        return self.buckets

    def candidates(
        self, valid: Tensor | None, *, chunk_length: int, chunks_before: int, released: bool
    ) -> Candidates | None:
        """What the last token attends, whose buckets have been put in; None where an index would be too large for it.

        Args:
            valid: `[batch, length]` bool of all tokens, or None.
            chunk_length, chunks_before, released: as of `BucketIndex`.
        """
        if self.room is None:
            self.room = int(self.factors.prod(dim=1).amax())
        if not index_is_smaller(self.room, chunk_length, chunks_before, self.buckets.shape[3]):
            self._index = None
            return None
        chunks = {"chunk_length": chunk_length, "chunks_before": chunks_before, "released": released}
        newest = self.buckets[..., -1]
        if self._index is not None and self._index.is_before(self.buckets.shape[3], valid):
            self._index.add(newest, valid)
        else:
            self._index = BucketIndex(self.buckets, valid, room=self.room, **chunks)
        return self._index.candidates(newest)

    def _grown(self, name: str, held: Tensor, new: Tensor, dim: int) -> Tensor:
        """`held` and `new` along `dim`, in memory that has room for more."""
        needs_grad = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
        if held.numel() == 0 or needs_grad or torch.compiler.is_compiling():
            self._memory.pop(name, None)
            return new if held.numel() == 0 else torch.cat([held, new], dim=dim)
        length = held.shape[dim]
        total = length + new.shape[dim]
        room = self._memory.get(name)
        if (
            room is None
            or room.data_ptr() != held.data_ptr()
            or room.shape[:dim] != held.shape[:dim]
            or room.shape[dim] < total
            or (room.is_inference() and not torch.is_inference_mode_enabled())
        ):
            shape = (*held.shape[:dim], total + total // 4, *held.shape[dim + 1 :])
            room = self._memory[name] = held.new_empty(shape)
            room.narrow(dim, 0, length).copy_(held)
        room.narrow(dim, length, new.shape[dim]).copy_(new)
        return room.narrow(dim, 0, total)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.keys = self.values = self.buckets = self.factors = self.room = self._index = None
        self._memory = {}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number comes as a negative one, as transformers counts."""
        super().crop(tokens_to_remove)
        self._index, self._memory = None, {}
        if self.buckets is not None:
            self.buckets = self.buckets[..., : self.get_seq_length()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the examples into the order of `beam_idx` `[batch]`."""
        super().reorder_cache(beam_idx)
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every example `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the examples `indices`."""
        super().batch_select_indices(indices)
        self._map(lambda x: x[indices])

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self._index is not None:
            self._index.map_(function)
        if self.buckets is not None:
            self.buckets = function(self.buckets)
        if self.factors is not None and self.factors.shape[0] > 1:
            self.factors = function(self.factors)
