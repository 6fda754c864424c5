"""The cache of a layer that goes on from a state of constant size."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class RecurrentCacheLayer(CacheLayerMixin):
    """A state, a named tuple of tensors with the batch first, and the number of tokens that it has seen."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def advance(self, state: Any, tokens: int) -> None:
        """Put `state` in place, which is that after `tokens` more tokens."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first state makes room for itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raises `ValueError`: keys and values are not kept."""
        raise ValueError(
            "this cache holds a state, no keys and values; pass it to the model whose make_cache() gave it."
        )

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask for `query_length` more tokens covers, and the first one's position."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError`, unless nothing is to be removed: a sum does not tell what was added last."""
        # A positive number is what is to be left in transformers 5.17.
        if tokens_to_remove not in (0, self.seen):
            raise ValueError(
                f"crop({tokens_to_remove}): the state of {self.seen} tokens cannot go back to fewer; start with a new "
                "cache, and generate without an assistant."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the examples into the order of `beam_idx` `[batch]`."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every example `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the examples `indices`."""
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        """Nothing to do: a state is small."""

    def prefetch(self) -> None:
        """Nothing to do: a state is small."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = type(self.state)(*map(function, self.state))
