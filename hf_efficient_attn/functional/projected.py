"""Attention of a few queries over keys and values that are linear maps of one sequence."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dense import dense_attention, masked_softmax


def projected_attention(
    query: Tensor,
    states: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    reassociate: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(query (states W_k + b_k)^T * scale) (states W_v + b_v)`, for the rows of global tokens.

    For few queries the products are reassociated, `(query W_k^T) states^T` and `(probs states) W_v`, so that `states`
    is never projected: `2 * heads * queries * length * width` multiply-adds instead of `2 * length * width^2`, which
    is less while `queries < head_dim`.

    Args:
        query: `[batch, heads, queries, head_dim]`; `queries` may be 0 (weights then get exactly zero gradients).
        states: `[batch, length, width]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        key_weight, value_weight: `[heads * head_dim, width]` as `nn.Linear` stores them; biases `[heads * head_dim]`.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.
        reassociate: force one of the two equal orders; by cost by default.

    Returns:
        `[batch, heads, queries, head_dim]` and the probabilities `[batch, heads, queries, length]`.

    The global rows of Longformer (Beltagy, Peters & Cohan 2020, arXiv 2004.05150).
    Time O(queries * length), memory O(queries * length).
    """
    batch, heads, queries, head_dim = query.shape
    length, width = states.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    allowed = None
    if key_padding_mask is not None:
        allowed = key_padding_mask[:, None, None, :]
        states = states.masked_fill(~key_padding_mask[:, :, None], 0.0)
    if reassociate is None:
        reassociate = queries < head_dim
    if not reassociate:
        split = (batch, length, heads, head_dim)
        key = F.linear(states, key_weight, key_bias).view(split).transpose(1, 2)
        value = F.linear(states, value_weight, value_bias).view(split).transpose(1, 2)
        return dense_attention(query, key, value, allowed, scale=scale, dropout_p=dropout_p)

    query = query * scale
    by_head = (heads, head_dim, width)
    folded = torch.matmul(query, key_weight.view(by_head))
    scores = torch.matmul(folded.reshape(batch, heads * queries, width), states.transpose(1, 2))
    scores = scores.view(batch, heads, queries, length) + torch.matmul(query, key_bias.view(heads, head_dim, 1))
    weights = masked_softmax(scores, allowed).to(query.dtype)
    probs = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
    mixed = torch.matmul(probs.reshape(batch, heads * queries, length), states).view(batch, heads, queries, width)
    result = torch.matmul(mixed, value_weight.view(by_head).transpose(1, 2))
    # The bias is weighed by the row sum, which dropout moves away from 1.
    result = result + probs.sum(dim=-1, keepdim=True) * value_bias.view(heads, 1, head_dim)
    return result.to(query.dtype), weights
