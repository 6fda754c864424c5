"""Sliding windows and global tokens."""

import torch
from torch import Tensor

from .common import masked_attention, padding, project


def window(length: int, radius: int, dilation: int, causal: bool = False) -> Tensor:
    """`[n, n]`: j = i + t * dilation with |t| <= radius, in the causal form t <= 0."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for t in range(-radius, 1 if causal else radius + 1):
            j = i + t * dilation
            if 0 <= j < length:
                allowed[i, j] = True
    return allowed


def sliding_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    radius: int,
    dilation: int | list[int] = 1,
    causal: bool = False,
    is_global: Tensor | None = None,
) -> Tensor:
    """Window and global columns in one softmax, if causal up to the query; `is_global` is bool `[batch, n]`."""
    batch, heads, length, _ = query.shape
    dilations = [dilation] * heads if isinstance(dilation, int) else dilation
    allowed = torch.stack([window(length, radius, step, causal) for step in dilations])[None].expand(batch, -1, -1, -1)
    if is_global is not None:
        seen = torch.ones(length, length, dtype=torch.bool)
        allowed = allowed | (is_global[:, None, None, :] & (seen.tril() if causal else seen))
    return masked_attention(query, key, value, allowed & padding(keep, batch, heads, length))


def longformer_module(
    weights: dict[str, Tensor],
    states: Tensor,
    keep: Tensor | None,
    *,
    heads: int,
    radius: int,
    dilation: int | list[int],
    is_global: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """Longformer's self-attention: rows of global tokens are full attention with the global projections.

    In the causal form those rows attend the global tokens up to themselves.
    """
    local = [project(weights, name, states, heads) for name in ("query", "key", "value")]
    mixed = sliding_window(*local, keep, radius=radius, dilation=dilation, causal=causal, is_global=is_global)
    if is_global is not None:
        allowed = padding(keep, states.shape[0], heads, states.shape[1])
        if causal:
            allowed = allowed & is_global[:, None, None, :] & torch.ones(allowed.shape[2:], dtype=torch.bool).tril()
        parts = (project(weights, f"{name}_global", states, heads) for name in ("query", "key", "value"))
        rows = masked_attention(*parts, allowed)
        mixed = torch.where(is_global[:, None, :, None], rows, mixed)
    return mixed.permute(0, 2, 1, 3).flatten(2)
