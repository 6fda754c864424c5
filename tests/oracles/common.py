"""Softmax attention under any mask, and the steps that every reference needs."""

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


def softmax(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """Full softmax attention."""
    batch, heads, length, _ = query.shape
    return masked_attention(query, key, value, padding(keep, batch, heads, length))


def project(weights: dict[str, Tensor], name: str, states: Tensor, heads: int) -> Tensor:
    """The linear map `name` of `states` `[batch, n, hidden]`, split into heads `[batch, heads, n, d]`."""
    mapped = states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    batch, length, hidden = mapped.shape
    return mapped.view(batch, length, heads, hidden // heads).permute(0, 2, 1, 3)


def softmax_module(weights: dict[str, Tensor], states: Tensor, keep: Tensor | None, *, heads: int) -> Tensor:
    """BERT's self-attention: `[batch, n, hidden]` -> the same shape."""
    mixed = softmax(*(project(weights, name, states, heads) for name in ("query", "key", "value")), keep)
    return mixed.permute(0, 2, 1, 3).flatten(2)
