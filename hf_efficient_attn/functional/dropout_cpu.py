"""Softmax attention with dropout on a CPU, a few heads at a time: backward computes the probabilities again.

The same function as with `torch.nn.functional.dropout` on the probabilities, for eager mode. What is kept for backward
is which entries were dropped, a byte each, in place of three floats each.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


# Scores in memory at a time, for each thread: a core's own cache holds so many.
_CHUNK_BYTES = 2**20


def cpu_dropout_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float) -> Tensor:
    """`dropout(softmax(query key^T + bias)) value`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, length, head_dim]`.
        bias: `[batch or 1, 1, 1, length]`, or None.
        dropout_p: more than 0 and less than 1, at the 16 bits it is drawn with.

    Returns:
        As `query`.

    Srivastava et al. 2014 (dropout). Time O(queries * length); for backward a byte for each of these pairs is kept.
    """
    kept, share = _draw((*query.shape[:3], key.shape[2]), dropout_p)
    return _DropoutAttention.apply(query, key, value, bias, kept, share)


def _draw(shape: tuple[int, ...], dropout_p: float) -> tuple[Tensor, float]:
    """Which entries dropout keeps, and the share of them: 16 random bits an entry, quicker than `bernoulli_`."""
    level = min(max(round(dropout_p * 2**16), 1), 2**16 - 1) - 2**15
    count = torch.Size(shape).numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[:count] >= level).view(shape), (2**15 - level) / 2**16


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Examples and heads at a time: as many as a chunk holds, at least one head of one example."""
    batch, heads, queries = query.shape[:3]
    head_bytes = max(1, queries * key.shape[2] * query.dtype.itemsize)
    at_once = max(1, _CHUNK_BYTES * torch.get_num_threads() // head_bytes)
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
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, kept: Tensor, share: float
    ) -> Tensor:
        batch, heads, queries, width = query.shape
        # In the order in which heads are merged.
        result = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        for where in _parts(query, key):
            probs = _probs(query, key, bias, where).mul_(kept[where])
            result[where] = torch.matmul(probs, value[where]).div_(share)
        ctx.save_for_backward(query, key, value, bias, kept)
        ctx.share = share
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, kept = ctx.saved_tensors
        query_grad, key_grad, value_grad = (torch.empty_like(x) for x in (query, key, value))
        for where in _parts(query, key):
            probs, above = _probs(query, key, bias, where), grad[where] / ctx.share
            factors = kept[where].to(probs.dtype)
            probs_grad = torch.matmul(above, value[where].transpose(-1, -2)).mul_(factors)
            value_grad[where] = torch.matmul(factors.mul_(probs).transpose(-1, -2), above)
            scores_grad = torch.ops.aten._softmax_backward_data(probs_grad, probs, -1, probs.dtype)
            query_grad[where] = torch.matmul(scores_grad, key[where])
            key_grad[where] = torch.matmul(scores_grad.transpose(-1, -2), query[where])
        return query_grad, key_grad, value_grad, None, None, None
