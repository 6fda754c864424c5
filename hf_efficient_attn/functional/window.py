"""What every way of computing window attention shares: the window itself, and which keys count in it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tokens import TokenSlots


class Window(NamedTuple):
    """A query's keys: `radius` steps of the dilation before it, itself, and unless `causal` as many after it."""

    radius: int
    causal: bool

    @property
    def back(self) -> int:
        """Keys before the query."""
        return self.radius

    @property
    def ahead(self) -> int:
        """Keys after the query."""
        return 0 if self.causal else self.radius

    @property
    def width(self) -> int:
        """Keys besides the query's own."""
        return self.back + self.ahead

    def band(self, queries: int, device: torch.device) -> Tensor:
        """Which keys of a block's span a query of the block may see: bool `[queries, queries + width]`.

        The span begins `back` keys before the block's first query.
        """
        offset = torch.arange(queries + self.width, device=device)[None, :]
        offset = offset - torch.arange(queries, device=device)[:, None]
        return (offset >= 0) & (offset <= self.width)


def make_window(radius: int, causal: bool) -> Window:
    """A `Window`; raises `ValueError` for a negative radius."""
    if radius < 0:
        raise ValueError(f"radius = {radius}: the number of keys on each side must be 0 or more.")
    return Window(radius, causal)


def head_dilations(dilation: int | Sequence[int], heads: int) -> tuple[int, ...]:
    """`dilation` as one number a head; raises `ValueError` for a wrong count or a number below 1."""
    dilations = (dilation,) * heads if isinstance(dilation, int) else tuple(dilation)
    if len(dilations) != heads:
        raise ValueError(f"dilation has {len(dilations)} entries for {heads} heads; give one number or one a head.")
    if min(dilations) < 1:
        raise ValueError(f"dilation = {dilation}: each entry must be 1 (no gaps) or more.")
    return dilations


def keys_in_windows(key_padding_mask: Tensor | None, global_tokens: TokenSlots | None) -> Tensor | None:
    """Which keys count in windows, bool `[batch, length]`; None for all.

    Global keys do not: they stand in columns of their own and must not count twice.
    """
    if global_tokens is None or global_tokens.slots == 0:
        return key_padding_mask
    return ~global_tokens.mask if key_padding_mask is None else key_padding_mask & ~global_tokens.mask


def seen_global_keys(global_tokens: TokenSlots, causal: bool, query_position: Tensor) -> Tensor:
    """Which slots the queries at `query_position` `[blocks, size]` see: bool `[batch, blocks or 1, size or 1, slots]`.

    Those in use; in the causal form only those that do not come after the query.
    """
    seen = global_tokens.valid[:, None, None, :]
    return seen & (global_tokens.index[:, None, None, :] <= query_position[None, :, :, None]) if causal else seen
