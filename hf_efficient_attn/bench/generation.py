"""Generation behind a text that has been read: new tokens, and what the cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .models import NEW_TOKENS, ROOM


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors of a cache and of what it is made of, one that several names share counted once."""
    storages: dict[int, int] = {}
    _collect(list(cache.layers), storages, set())
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int], seen: set[int]) -> None:
    import torch

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
        return
    if not isinstance(value, (dict, list, tuple, type)) and hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, storages, seen)


class Generation:
    """Greedy generation of `NEW_TOKENS` tokens at a time behind a text; each run goes on where the last one ended.

    Args:
        model: a causal language model in eval mode.
        inputs: `input_ids` `[batch, length]`.
        length: tokens of the text that the timed runs are behind.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], length: int) -> None:
        self.model, self.ids, self.length = model, inputs["input_ids"], length
        self.forget()

    def prepare(self) -> None:
        """Read the text."""
        self._token, self._cache = self._read(self.length)
        self._new = 0

    def run(self, length: int) -> None:
        """New tokens behind `length`, which but for the text's own length is read anew."""
        if length != self.length:
            self._go_on(*self._read(length))
            return
        if self._cache is None or self._new + NEW_TOKENS > ROOM:
            self.prepare()
        self._token, self._cache = self._go_on(self._token, self._cache)
        self._new += NEW_TOKENS

    def held(self) -> int:
        """Bytes of the cache."""
        return 0 if self._cache is None else cache_bytes(self._cache)

    def forget(self) -> None:
        """Drop the cache."""
        self._token: torch.Tensor | None = None
        self._cache: Cache | None = None
        self._new = 0

    def _read(self, length: int) -> tuple[torch.Tensor, Cache]:
        """The likeliest token `[batch, 1]` behind the first `length` ones, and the cache."""
        import torch

        with torch.inference_mode():
            outputs = self.model(input_ids=self.ids[:, :length], use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1:].argmax(dim=-1), outputs.past_key_values

    def _go_on(self, token: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        import torch

        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                outputs = self.model(input_ids=token, past_key_values=cache, use_cache=True)
                token, cache = outputs.logits[:, -1:].argmax(dim=-1), outputs.past_key_values
        return token, cache
