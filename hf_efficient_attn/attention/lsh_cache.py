"""The cache of an LSH layer: keys and values of all tokens, and their buckets."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class LSHCacheLayer(DynamicLayer):
    """Keys, values and buckets, and the bucket factors that the prompt had.

    `factors` is int64 `[batch or 1, tables]`, `sizes` the room for each, `buckets` int64 `[batch, heads, rounds,
    length]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors: Tensor | None = None
        self.sizes: tuple[int, ...] = ()
        self.buckets: Tensor | None = None

    def extend_buckets(self, new: Tensor) -> Tensor:
        """Buckets `[batch, heads, rounds, tokens]` behind those that are there; returns all."""
        self.buckets = new if self.buckets is None else torch.cat([self.buckets, new], dim=3)
        return self.buckets

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.keys = self.values = self.buckets = self.factors = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number comes as a negative one, as transformers counts."""
        super().crop(tokens_to_remove)
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
        if self.buckets is not None:
            self.buckets = function(self.buckets)
        if self.factors is not None and self.factors.shape[0] > 1:
            self.factors = function(self.factors)
