"""Dense softmax attention, and the dense form of any attention that a boolean mask describes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu import without_autocast
from .dropout_cpu import cpu_dropout_attention
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


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float, dropout_p: float
) -> Tensor:
    """`dropout(softmax(query key^T * scale + bias)) value`, without the matrix where there is a kernel for it.

    Autocast changes nothing inside.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, length, head_dim]`.
        bias: in `query.dtype`, `[batch or 1, heads or 1, queries or 1, length]`, or None.
        scale: factor of the scores.
        dropout_p: dropout of the probabilities.

    Returns:
        As `query`.

    Time O(queries * length), memory O(queries + length) besides the bias.
    """
    with without_autocast(query.device):
        return _biased_attention(query, key, value, bias, scale, dropout_p)


def _biased_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    if 0.0 < dropout_p < 1.0 and query.device.type == "cpu" and not torch.compiler.is_compiling():
        # torch's own kernels keep the whole matrix, several times over.
        dtype = torch.promote_types(query.dtype, torch.float32)
        wide = (query.to(dtype) * scale, key.to(dtype), value.to(dtype), None if bias is None else bias.to(dtype))
        return cpu_dropout_attention(*wide, dropout_p).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def dense_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`softmax_attention` and its weights as `dense_attention` returns them, 0 at padding too."""
    allowed = None
    if key_padding_mask is not None:
        allowed = key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None]
        query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    return dense_attention(query, key, value, allowed, scale=scale, dropout_p=dropout_p)


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`softmax_attention` in the dtype of its input also inside autocast, and on a CPU with dropout in less memory."""
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    bias = None if key_padding_mask is None else masked_bias(key_padding_mask[:, None, None, :], query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mixed = biased_attention(query, key, value, bias, scale=scale, dropout_p=dropout_p)
    return zero_padding(mixed, key_padding_mask)


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
