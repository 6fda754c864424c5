"""The cache of a layer that attends a causal window: bounded by the window, plus the global tokens of a prefix."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from .prefix import Prefix


class WindowCacheLayer(DynamicSlidingWindowLayer):
    """Keys and values of the last `reach` tokens, and of a prefix of global tokens for good.

    Args:
        reach: how many tokens back a query looks, 1 or more.
    """

    def __init__(self, reach: int) -> None:
        super().__init__(sliding_window=reach + 1)
        self.prefix: Prefix | None = None
        self._prefix_end: Tensor | int = 0

    def extend_prefix(self, new: Prefix, index: Tensor) -> Prefix:
        """Add slots behind those that are there, from places `index` `[batch, slots]` of the input that comes next.

        Returns:
            The whole prefix.
        """
        if new.valid.shape[2] > 0:
            last = torch.where(new.valid[:, 0, :, 0], index, -1).max()
            # Nothing new leaves it where it was.
            self._prefix_end = torch.where(last >= 0, self.cumulative_length + last + 1, self._prefix_end)
        if self.prefix is None:
            self.prefix = new
        elif new.valid.shape[2] > 0:
            self.prefix = Prefix(*(torch.cat(pair, dim=2) for pair in zip(self.prefix, new, strict=True)))
        return self.prefix

    @property
    def prefix_count(self) -> Tensor | int:
        """Global tokens of each example so far, `[batch]`; 0 before the first."""
        return 0 if self.prefix is None else self.prefix.valid.sum(dim=(1, 2, 3))

    def reset(self) -> None:
        """Forget everything."""
        # transformers 5.17 fills the old keys with zeros and then adds the new ones to them.
        self.keys = self.values = self.prefix = None
        self.is_initialized, self._prefix_end = False, 0
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; raises `ValueError` if that reaches into the prefix."""
        # A positive number is what is to be left in transformers 5.17, and refused by later versions.
        left = tokens_to_remove if tokens_to_remove > 0 else self.cumulative_length + tokens_to_remove
        end = int(self._prefix_end)
        if left < end:
            raise ValueError(
                f"crop({tokens_to_remove}) leaves {left} tokens, but the first {end} hold global ones, which cannot be "
                "taken back; start with a new cache."
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the examples into the order of `beam_idx` `[batch]`."""
        super().reorder_cache(beam_idx)
        self._map_prefix(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every example `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_prefix(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the examples `indices`."""
        super().batch_select_indices(indices)
        self._map_prefix(lambda x: x[indices])

    def _map_prefix(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.prefix is not None:
            self.prefix = Prefix(*map(function, self.prefix))
