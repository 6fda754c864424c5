"""Dense attention on a CPU with a bias by groups of tokens, through torch's fused kernel.

The bias of all pairs of tokens is made for some heads at a time, in memory that is used again, and made again in the
backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cpu import Scratch, first_derivatives
from .dense import biased_attention
from .dropout_cpu import cpu_dropout_attention, parts_of_heads
from .group_bias import GroupBias


def cpu_group_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: GroupBias, *, scale: float, dropout_p: float
) -> Tensor:
    """`dropout(softmax(query key^T * scale + bias)) value`.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        bias: added to the scores.
        scale: factor of the scores.
        dropout_p: less than 1.

    Returns:
        As `query`.

    Time O(length^2), memory O(length) besides some heads at a time.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = tuple(x.to(dtype) for x in (query, key, value))
    if dropout_p > 0.0:
        mixed = cpu_dropout_attention(wide[0] * scale, *wide[1:], bias, dropout_p)
    elif bool(bias.table.any()):
        # The fused kernel reads rows.
        wide = (x if x.stride(3) == 1 else x.contiguous() for x in wide)
        mixed = _GroupAttention.apply(*wide, *bias, scale)
    else:
        mixed = biased_attention(*wide, None, scale=scale, dropout_p=0.0)
    return mixed.to(query.dtype)


def _parts(
    query: Tensor, key: Tensor, bias: GroupBias, scratch: Scratch
) -> Iterator[tuple[tuple[slice, slice], Tensor | None]]:
    """Examples and heads at a time, with their bias `[examples, heads, length, length]`."""
    for where in parts_of_heads(query, key):
        yield where, bias.part(where, query[where].shape[0], scratch)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, table: Tensor, group: Tensor, scale: float
    ) -> Tensor:
        batch, heads, length, width = query.shape
        # In the order in which heads are merged.
        result = query.new_empty(batch, length, heads, width).transpose(1, 2)
        log_sums = query.new_empty(batch, heads, length)
        with torch.autocast("cpu", enabled=False):
            for where, pairs in _parts(query, key, GroupBias(table, group), Scratch()):
                result[where], log_sums[where] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query[where], key[where], value[where], attn_mask=pairs, scale=scale
                )
        ctx.save_for_backward(query, key, value, table, group, result, log_sums)
        ctx.scale = scale
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, table, group, result, log_sums = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for where, pairs in _parts(query, key, GroupBias(table, group), Scratch()):
                tensors = (x[where] for x in (query, key, value, result, log_sums))
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad[where].contiguous(), *tensors, 0.0, False, attn_mask=pairs, scale=ctx.scale
                )
                for target, part in zip(grads, found, strict=True):
                    target[where] = part
        return *grads, None, None, None
