"""Softmax attention with dropout on a CPU, a few heads at a time: backward computes the probabilities again.

The same function as with `torch.nn.functional.dropout` on the probabilities, for eager mode. Nothing of the size of the
matrix is kept: probabilities come from the inputs again, and what was dropped from a seed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cpu import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay


def cpu_dropout_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
    """`dropout(softmax(query key^T + bias)) value`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, length, head_dim]`.
        bias: `[batch or 1, 1, 1, length]`, or None.
        dropout_p: less than 1, at the 16 bits it is drawn with.

    Returns:
        As `query`.

    Srivastava et al. 2014 (dropout). Time O(queries * length), memory O(queries + length) besides some heads at a time.
    """
    return _DropoutAttention.apply(query, key, value, bias, draw_replay(dropout_p))


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Examples and heads at a time: as many as a chunk holds, at least one head of one example."""
    batch, heads, queries = query.shape[:3]
    head_bytes = max(1, queries * key.shape[2] * query.dtype.itemsize)
    at_once = max(1, CHUNK_BYTES * torch.get_num_threads() // head_bytes)
    head_step, batch_step = min(heads, at_once), max(1, at_once // heads)
    for start in range(0, batch, batch_step):
        for head in range(0, heads, head_step):
            yield slice(start, start + batch_step), slice(head, head + head_step)


def _probs(query: Tensor, key: Tensor, bias: Tensor | None, where: tuple[slice, slice]) -> Tensor:
    scores = torch.matmul(query[where], key[where].transpose(-1, -2))
    if bias is not None:
        scores += bias[where[0]] if bias.shape[0] > 1 else bias
    return scores.softmax(dim=-1)


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: DropoutReplay
    ) -> Tensor:
        batch, heads, queries, width = query.shape
        # In the order in which heads are merged.
        result = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        generator, scratch = dropout.generator(), Scratch()
        for where in _parts(query, key):
            probs = _probs(query, key, bias, where)
            probs.mul_(dropout.kept(probs, scratch, generator))
            result[where] = torch.matmul(probs, value[where]).div_(dropout.keep_share)
        ctx.save_for_backward(query, key, value, bias)
        ctx.dropout = dropout
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors
        query_grad, key_grad, value_grad = (torch.empty_like(x) for x in (query, key, value))
        generator, scratch = ctx.dropout.generator(), Scratch()
        with torch.autocast("cpu", enabled=False):
            for where in _parts(query, key):
                probs, above = _probs(query, key, bias, where), grad[where] / ctx.dropout.keep_share
                kept = ctx.dropout.kept(probs, scratch, generator)
                probs_grad = torch.matmul(above, value[where].transpose(-1, -2)).mul_(kept)
                value_grad[where] = torch.matmul(kept.mul_(probs).transpose(-1, -2), above)
                scores_grad = torch.ops.aten._softmax_backward_data(probs_grad, probs, -1, probs.dtype)
                query_grad[where] = torch.matmul(scores_grad, key[where])
                key_grad[where] = torch.matmul(scores_grad.transpose(-1, -2), query[where])
        return query_grad, key_grad, value_grad, None, None
