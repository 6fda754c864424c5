"""Softmax attention with dropout on a CPU, in parts: backward computes the probabilities again.

The same function as with `torch.nn.functional.dropout` on the probabilities, for eager mode. Nothing of the size of the
matrix is kept: probabilities come from the inputs again, and what was dropped from a seed. A part is a few heads, or,
for few queries and many keys, some keys of all heads.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cpu import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay, first_derivatives
from .group_bias import GroupBias


# Up to so many queries, keys go in chunks: what is kept and scaled anew from chunk to chunk is small then.
_FEW_QUERIES = 256


def cpu_dropout_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | GroupBias | None, dropout_p: float
) -> Tensor:
    """`dropout(softmax(query key^T + bias)) value`.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, heads, length, head_dim]`.
        bias: `[batch or 1, heads or 1, queries or 1, length]`, one by groups where queries are all tokens, or None.
        dropout_p: less than 1, at the 16 bits it is drawn with.

    Returns:
        As `query`.

    Srivastava et al. 2014 (dropout). Time O(queries * length), memory O(queries + length) besides some heads, or some
    keys of all heads, at a time.
    """
    in_chunks = query.shape[2] <= _FEW_QUERIES and _keys_at_once(query) < key.shape[2]
    form = _ChunkedDropoutAttention if in_chunks and not isinstance(bias, GroupBias) else _DropoutAttention
    return form.apply(query, key, value, bias, draw_replay(dropout_p))


def _keys_at_once(query: Tensor) -> int:
    """Keys whose scores for all heads of one example a chunk holds, at least one."""
    key_bytes = max(1, query.shape[1] * query.shape[2] * query.dtype.itemsize)
    return max(1, CHUNK_BYTES * torch.get_num_threads() // key_bytes)


def parts_of_heads(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Examples and heads at a time: as many as a chunk holds, at least one head of one example."""
    batch, heads, queries = query.shape[:3]
    head_bytes = max(1, queries * key.shape[2] * query.dtype.itemsize)
    at_once = max(1, CHUNK_BYTES * torch.get_num_threads() // head_bytes)
    head_step, batch_step = min(heads, at_once), max(1, at_once // heads)
    for start in range(0, batch, batch_step):
        for head in range(0, heads, head_step):
            yield slice(start, start + batch_step), slice(head, head + head_step)


def _tensors_of(bias: Tensor | GroupBias | None) -> tuple[Tensor, ...]:
    """What of a bias a backward pass needs, for `_bias_of`."""
    return bias if isinstance(bias, GroupBias) else () if bias is None else (bias,)


def _bias_of(tensors: tuple[Tensor, ...]) -> Tensor | GroupBias | None:
    """The bias of which these are the tensors."""
    return GroupBias(*tensors) if len(tensors) == 2 else tensors[0] if tensors else None


def _part_of(
    bias: Tensor | GroupBias | None, where: tuple[slice, slice], count: int, scratch: Scratch
) -> Tensor | None:
    """The bias of `count` examples and some heads."""
    if bias is None or isinstance(bias, GroupBias):
        return bias and bias.part(where, count, scratch)
    bias = bias if bias.shape[0] == 1 else bias[where[0]]
    return bias if bias.shape[1] == 1 else bias[:, where[1]]


class _Part:
    """Some heads of some examples, in memory of `scratch`: `[heads, queries or keys, ...]`, heads of all examples."""

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor], where: tuple[slice, slice], scratch: Scratch) -> None:
        self.query, self.key, self.value = (x[where].flatten(0, 1) for x in tensors)
        self.outer, self.where, self.scratch = tensors[0][where].shape[:2], where, scratch

    def take(self, name: str) -> Tensor:
        """Room for one number a pair."""
        return self.scratch.take(name, (*self.query.shape[:2], self.key.shape[1]), self.query.dtype)

    def probs(self, bias: Tensor | GroupBias | None) -> Tensor:
        """`[heads, queries, length]`."""
        scores = torch.bmm(self.query, self.key.transpose(1, 2), out=self.take("scores"))
        added = _part_of(bias, self.where, self.outer[0], self.scratch)
        if added is not None:
            scores.view(*self.outer, *scores.shape[1:]).add_(added)
        return torch.ops.aten._softmax.out(scores, -1, False, out=self.take("probs"))

    def write(self, target: Tensor, rows: Tensor) -> None:
        """Put `[heads, rows, head_dim]` into `target` `[batch, heads, rows, head_dim]`."""
        target[self.where] = rows.view(*self.outer, *rows.shape[1:])


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | GroupBias | None,
        dropout: DropoutReplay,
    ) -> Tensor:
        batch, heads, queries, width = query.shape
        # In the order in which heads are merged.
        result = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        generator, scratch = dropout.generator(), Scratch()
        with torch.autocast("cpu", enabled=False):
            for where in parts_of_heads(query, key):
                part = _Part((query, key, value), where, scratch)
                probs = part.probs(bias)
                probs.mul_(dropout.kept(probs, scratch, generator))
                part.write(result, torch.bmm(probs, part.value).div_(dropout.keep_share))
        ctx.save_for_backward(query, key, value, *_tensors_of(bias))
        ctx.dropout = dropout
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *tensors = ctx.saved_tensors
        bias, grads = _bias_of(tuple(tensors)), [torch.empty_like(x) for x in (query, key, value)]
        generator, scratch = ctx.dropout.generator(), Scratch()
        with torch.autocast("cpu", enabled=False):
            for where in parts_of_heads(query, key):
                part = _Part((query, key, value), where, scratch)
                probs, above = part.probs(bias), (grad[where] / ctx.dropout.keep_share).flatten(0, 1)
                kept = ctx.dropout.kept(probs, scratch, generator)
                probs_grad = torch.bmm(above, part.value.transpose(1, 2), out=part.take("probs_grad")).mul_(kept)
                part.write(grads[2], torch.bmm(kept.mul_(probs).transpose(1, 2), above))
                # The scores are of no use any more.
                scores_grad = part.take("scores")
                torch.ops.aten._softmax_backward_data.out(probs_grad, probs, -1, probs.dtype, grad_input=scores_grad)
                part.write(grads[0], torch.bmm(scores_grad, part.key))
                part.write(grads[1], torch.bmm(scores_grad.transpose(1, 2), part.query))
        return *grads, None, None


def _chunks(query: Tensor, key: Tensor) -> Iterator[tuple[int, slice]]:
    """Keys at a time for all heads of one example.

    Where heads are split, a head's rows are about a page of memory apart: head by head every page would be looked up
    anew for each head.
    """
    step = _keys_at_once(query)
    for example in range(query.shape[0]):
        for start in range(0, key.shape[2], step):
            yield example, slice(start, start + step)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, example: int, part: slice, scratch: Scratch) -> Tensor:
    """`[heads, queries, keys]` of one chunk, in memory of `scratch`."""
    near = key[example, :, part]
    scores = scratch.take("scores", (*query.shape[1:3], near.shape[1]), query.dtype)
    torch.bmm(query[example], near.transpose(1, 2), out=scores)
    if bias is not None:
        scores += bias[example if bias.shape[0] > 1 else 0, ..., part]
    return scores


class _ChunkedDropoutAttention(torch.autograd.Function):
    """The same function with the softmax taken chunk by chunk (Milakov & Gimelshein 2018, arXiv 1805.02867)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout: DropoutReplay
    ) -> Tensor:
        batch, heads, queries, width = query.shape
        # In the order in which heads are merged.
        result = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        # Finite from the start, so that a chunk of nothing but -inf makes no NaN.
        largest = query.new_full((batch, heads, queries, 1), torch.finfo(query.dtype).min)
        total = torch.zeros_like(largest)
        mixed = query.new_zeros(query.shape)
        generator, scratch = dropout.generator(), Scratch()
        for example, part in _chunks(query, key):
            scores, most = _scores(query, key, bias, example, part, scratch), largest[example]
            new_most = torch.maximum(most, scores.amax(dim=-1, keepdim=True))
            shrink = (most - new_most).exp_()
            most.copy_(new_most)
            weights = scores.sub_(most).exp_()
            total[example].mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
            weights.mul_(dropout.kept(weights, scratch, generator))
            mixed[example].mul_(shrink).baddbmm_(weights, value[example, :, part])
        torch.div(mixed, total * dropout.keep_share, out=result)
        # Not as one logarithm, which next to a large maximum would lose the digits of the sum.
        ctx.save_for_backward(query, key, value, bias, result, largest, total)
        ctx.dropout = dropout
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, result, largest, total = ctx.saved_tensors
        key_grad, value_grad = torch.empty_like(key), torch.empty_like(value)
        query_grad = query.new_zeros(query.shape)
        generator, scratch = ctx.dropout.generator(), Scratch()
        with torch.autocast("cpu", enabled=False):
            # The sum divides what is small, and not each weight.
            through = (grad * result).sum(dim=-1, keepdim=True).div_(total)
            above = torch.div(grad, total * ctx.dropout.keep_share).contiguous()
            for example, part in _chunks(query, key):
                weights = _scores(query, key, bias, example, part, scratch).sub_(largest[example]).exp_()
                kept = ctx.dropout.kept(weights, scratch, generator)
                scores_grad = scratch.take("scores_grad", tuple(weights.shape), weights.dtype)
                torch.bmm(above[example], value[example, :, part].transpose(1, 2), out=scores_grad)
                scores_grad.mul_(kept).sub_(through[example]).mul_(weights)
                rows = scratch.take("rows", key[example, :, part].shape, key.dtype)
                value_grad[example, :, part] = torch.bmm(kept.mul_(weights).transpose(1, 2), above[example], out=rows)
                query_grad[example].baddbmm_(scores_grad, key[example, :, part])
                key_grad[example, :, part] = torch.bmm(scores_grad.transpose(1, 2), query[example], out=rows)
        return query_grad, key_grad, value_grad, None, None
