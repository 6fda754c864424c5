"""Dense, slow references in float64. They define what is right, and import nothing of the package."""

import torch
from torch import Tensor


def masked_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """`sum_j allowed_ij exp(q_i k_j scale) v_j / sum_j allowed_ij exp(q_i k_j scale)`; a row with no key is 0.

    `query`, `key`, `value` are `[batch, heads, n, d]`, `allowed` is bool `[batch, heads, n, n]`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    top = scores.masked_fill(~allowed, -1e300).amax(dim=-1, keepdim=True).detach()
    terms = torch.where(allowed, torch.exp(torch.where(allowed, scores - top, 0.0)), 0.0)
    total = terms.sum(dim=-1, keepdim=True)
    weights = torch.where(total > 0, terms / torch.where(total > 0, total, 1.0), 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, value)


def padding(keep: Tensor | None, batch: int, heads: int, length: int) -> Tensor:
    """`[batch, heads, n, n]`: pairs in which neither the query nor the key is padding."""
    if keep is None:
        keep = torch.ones(batch, length, dtype=torch.bool)
    return (keep[:, None, :, None] & keep[:, None, None, :]).expand(batch, heads, length, length)


def window(length: int, radius: int, dilation: int, causal: bool = False) -> Tensor:
    """`[n, n]`: j = i + t * dilation with |t| <= radius, in the causal form t <= 0."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for t in range(-radius, 1 if causal else radius + 1):
            j = i + t * dilation
            if 0 <= j < length:
                allowed[i, j] = True
    return allowed


def softmax(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """Full softmax attention."""
    batch, heads, length, _ = query.shape
    return masked_attention(query, key, value, padding(keep, batch, heads, length))


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


def project(weights: dict[str, Tensor], name: str, states: Tensor, heads: int) -> Tensor:
    """The linear map `name` of `states` `[batch, n, hidden]`, split into heads `[batch, heads, n, d]`."""
    mapped = states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    batch, length, hidden = mapped.shape
    return mapped.view(batch, length, heads, hidden // heads).permute(0, 2, 1, 3)


def softmax_module(weights: dict[str, Tensor], states: Tensor, keep: Tensor | None, *, heads: int) -> Tensor:
    """BERT's self-attention: `[batch, n, hidden]` -> the same shape."""
    mixed = softmax(*(project(weights, name, states, heads) for name in ("query", "key", "value")), keep)
    return mixed.permute(0, 2, 1, 3).flatten(2)


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
