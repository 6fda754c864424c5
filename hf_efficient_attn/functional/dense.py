"""Dense softmax attention, and the dense form of any attention that a boolean mask describes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import check_qkv, masked_bias, zero_padding


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last dimension in at least fp32, 0 where not `allowed`; a row with nothing allowed is all 0."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is None:
        return scores.softmax(dim=-1)
    probs = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return probs.masked_fill(~allowed, 0.0)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`softmax(query key^T * scale + bias + mask) value` with the whole matrix in memory.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, heads, length, head_dim]`; `value` likewise.
        allowed: bool, broadcastable to `[batch, heads, queries, length]`, True = attend; None allows every pair.
        bias: added to the scaled scores, broadcastable likewise.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.

    Returns:
        The result `[batch, heads, queries, head_dim]` and the probabilities before dropout
        `[batch, heads, queries, length]`, both in `query.dtype`.

    Vaswani et al. 2017, arXiv 1706.03762. Time O(queries * length), memory O(queries * length).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    probs = masked_softmax(scores if bias is None else scores + bias, allowed)
    weights = probs.to(query.dtype)
    mixed = torch.matmul(F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights, value)
    return mixed.to(query.dtype), weights


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Full softmax attention through `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.

    Returns:
        `[batch, heads, length, head_dim]`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.

    Vaswani et al. 2017, arXiv 1706.03762. Time O(length^2), memory O(length) where torch has a fused kernel.
    """
    check_qkv(query, key, value, key_padding_mask)
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=scale)
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    bias = masked_bias(key_padding_mask[:, None, None, :], query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    return zero_padding(mixed, key_padding_mask)
