"""The blocks of queries that windows are computed in on a CPU, and their masks."""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import masked_bias
from .scratch import Scratch
from .tokens import TokenSlots
from .window import Window, seen_global_keys


class WindowBlocks:
    """The blocks of one length: `count` blocks of `size` queries, each with the `span` keys around it.

    "Rows" below are the tokens of some heads, each filled up to whole blocks and with zeros around it where its first
    and last block look back and ahead.
    """

    def __init__(self, length: int, window: Window, dtype: torch.dtype) -> None:
        # Small blocks waste few keys; below 32 queries matrix products get slow. A short input needs neither long
        # blocks nor a window longer than itself.
        self.length, self.dtype, self.scratch = length, dtype, Scratch()
        self.window = Window(min(window.radius, length - 1), window.causal)
        self.size = min(64, max(32, window.radius), length)
        self.count = (length + self.size - 1) // self.size
        self.span = self.size + self.window.width
        self.padded = self.count * self.size

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.scratch.take(name, shape, self.dtype)

    def blocks(self, name: str, tensor: Tensor) -> Tensor:
        """`[examples, heads, length, d]` -> `[examples * heads * count, size, d]` in scratch, filled with zeros."""
        *outer, _, width = tensor.shape
        padded = self.take(name, *outer, self.padded, width)
        padded[:, :, : self.length] = tensor
        padded[:, :, self.length :] = 0.0
        return padded.view(-1, self.size, width)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """`[examples, heads, length, d]` -> rows `[examples * heads, padded + width, d]` in scratch memory."""
        *outer, _, width = tensor.shape
        rows = self.zero_rows(name, outer[0] * outer[1], width)
        self.inner(rows).unflatten(0, tuple(outer))[:, :, : self.length] = tensor
        return rows

    def zero_rows(self, name: str, heads: int, width: int) -> Tensor:
        """Rows of zeros, in scratch memory."""
        return self.take(name, heads, self.padded + self.window.width, width).zero_()

    def inner(self, rows: Tensor) -> Tensor:
        """The rows of tokens, without what is around them: a view `[heads, padded, d]`."""
        return rows[:, self.window.back : self.window.back + self.padded]

    def windows(self, name: str, rows: Tensor, blocks: slice) -> Tensor:
        """The windows of some blocks of every head, `[heads * blocks, span, d]`; for one head a view."""
        views = self._views(rows, blocks, 0, self.span)
        if rows.shape[0] == 1:
            return views[0]
        return self.take(name, *views.shape).copy_(views).flatten(0, 1)

    def add_windows_(self, rows: Tensor, blocks: slice, windows: Tensor) -> None:
        """Add windows `[heads * blocks, span, d]` to the rows they view."""
        windows = windows.unflatten(0, (rows.shape[0], -1))
        # Pieces of at most one block do not overlap each other.
        for start in range(0, self.span, self.size):
            stop = min(start + self.size, self.span)
            self._views(rows, blocks, start, stop).add_(windows[:, :, start:stop])

    def _views(self, rows: Tensor, blocks: slice, start: int, stop: int) -> Tensor:
        """Keys `start` to `stop` of windows: overlapping views `[heads, blocks, stop - start, d]`."""
        heads, length, width = rows.shape
        return rows.as_strided(
            (heads, blocks.stop - blocks.start, stop - start, width),
            (length * width, self.size * width, width, 1),
            rows.storage_offset() + (blocks.start * self.size + start) * width,
        )

    def bias(self, counted: Tensor | None, global_tokens: TokenSlots | None) -> "WindowBias":
        """The masks of some examples, of which `counted` `[examples, length]` keys count in windows; None for all."""
        usable = torch.zeros(
            1 if counted is None else counted.shape[0], self.padded + self.window.width, dtype=torch.bool, device="cpu"
        )
        usable[:, self.window.back : self.window.back + self.length] = True if counted is None else counted
        usable = usable.unfold(1, self.span, self.size)
        extra = None
        if global_tokens is not None:
            position = torch.arange(self.padded, device="cpu").view(self.count, self.size)
            seen = seen_global_keys(global_tokens, self.window.causal, position)
            extra = masked_bias(seen, self.dtype).expand(-1, self.count, self.size, -1)
        return WindowBias(
            # Both may meet in one place, and must not add up to -inf.
            masked_bias(self.window.band(self.size, usable.device), self.dtype) / 4,
            masked_bias(usable[:, :, None, :], self.dtype) / 4,
            (~usable).any(dim=2).any(dim=0).tolist(),
            extra,
        )


class WindowBias(NamedTuple):
    """Additive masks, in parts that stay small: the sum of the first two is that of the windows.

    Args:
        band: `[size, span]`, the same for every block.
        keys: `[examples, count, 1, span]`, for keys that do not count.
        has_keys: `[count]`, whether a block has such keys in any example.
        extra: `[examples, count, size, slots]`, of the global keys.
    """

    band: Tensor
    keys: Tensor
    has_keys: list[bool]
    extra: Tensor | None
