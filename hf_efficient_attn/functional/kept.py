"""Tensors that follow from shapes alone: made once, and kept."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .fused import is_plain_tensor


class Kept:
    """What a function makes, made once for each arguments in eager mode: the last `most` of them are kept.

    Nothing is kept while compiling, while a CUDA graph is recorded, and where something stands in for tensors.
    """

    def __init__(self, make: Callable[..., Any], most: int = 16) -> None:
        self._make, self._most = make, most
        self._held: dict[tuple[Hashable, ...], Any] = {}

    def __call__(self, like: Tensor, *arguments: Hashable) -> Any:
        """What the function makes of `arguments`, for use with tensors like this one."""
        # Asked first: a graph takes no other question of these.
        if torch.compiler.is_compiling() or not is_plain_tensor(like):
            return self._make(*arguments)
        if arguments in self._held:
            return self._held[arguments]
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._make(*arguments)
        # Training may use what an evaluation has made.
        with torch.inference_mode(False):
            made = self._make(*arguments)
            keeps = is_plain_tensor(torch.arange(1, device=like.device))
        if keeps:
            if len(self._held) >= self._most:
                del self._held[next(iter(self._held))]
            self._held[arguments] = made
        return made
