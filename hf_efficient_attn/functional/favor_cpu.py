"""Bidirectional FAVOR+ on a CPU: features of some tokens at a time, computed again in the backward pass.

The same function as the plain form in `favor.py`, for eager mode. Features of a whole text, `length * features` numbers
a head, are never in memory together; what is kept for backward is the inputs, the sums over keys and the result.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import CHUNK_BYTES, Scratch, first_derivatives
from .favor_features import RELU_OFFSET, FeatureMap


def cpu_performer_attention(
    features: FeatureMap, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, overwrite: bool = False
) -> Tensor:
    """Attention of every query over every key that counts.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`, in the dtype to compute in, finite also at padding.
        keep: `[batch, length]` bool, which keys count.
        overwrite: without a graph, let the result take the memory of `query`.

    Returns:
        As `query`; 0 where no key counts.
    """
    if overwrite:
        _attend(_Inputs(query, key, value, keep, features), query)
        return query
    return _PerformerAttention.apply(query, key, value, keep, features)


class _Inputs(NamedTuple):
    """What forward and backward both read."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    features: FeatureMap


class _Sums(NamedTuple):
    """Over the keys of some heads: `[heads, features, d]`, `[heads, features, 1]`, and features' largest logarithms."""

    values: Tensor
    ones: Tensor
    tops: Tensor


class _Part:
    """Some heads of one example, and the features of some of their tokens at a time.

    Inputs are read as they lie, heads side by side: products take rows with gaps, and the root of the scale is in the
    projection.
    """

    def __init__(self, inputs: _Inputs, scratch: Scratch, example: int, heads: slice) -> None:
        self.scratch, self.where = scratch, (example, heads)
        self.query, self.key, self.value = (x[example, heads] for x in inputs[:3])
        self.hole = None if inputs.keep is None else ~inputs.keep[example]
        self.root, self.is_softmax = inputs.features.root, inputs.features.kernel == "softmax"
        self.projection = (inputs.features.projection * self.root).expand(self.key.shape[0], -1, -1)

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.scratch.take(name, shape, self.projection.dtype)

    def logits(self, rows: Tensor) -> Tensor:
        """`[heads, tokens, d]` -> `[heads, tokens, features]`."""
        logits = self.take("features", *rows.shape[:2], self.projection.shape[1])
        return torch.bmm(rows, self.projection.transpose(1, 2), out=logits)

    def key_logits(self, tokens: slice) -> Tensor:
        """Logarithms of the features of keys in the softmax kernel; -inf for keys that do not count."""
        rows = self.key[:, tokens]
        halves = torch.linalg.vecdot(rows, rows, out=self.take("halves", *rows.shape[:2])).mul_(self.root**2 / 2)
        if self.hole is not None:
            halves.masked_fill_(self.hole[tokens], torch.inf)
        return self.logits(rows).sub_(halves[:, :, None])

    def keys(self, tokens: slice, tops: Tensor) -> Tensor:
        """Features of keys, in the softmax kernel relative to their largest ones."""
        if self.is_softmax:
            return self.key_logits(tokens).sub_(tops).exp_()
        features = self.logits(self.key[:, tokens]).relu_().add_(RELU_OFFSET)
        return features if self.hole is None else features.masked_fill_(self.hole[tokens, None], 0.0)

    def queries(self, tokens: slice, tops: Tensor) -> Tensor:
        """Features of queries; those of the softmax kernel up to a factor a row."""
        logits = self.logits(self.query[:, tokens])
        if not self.is_softmax:
            return logits.relu_().add_(RELU_OFFSET)
        logits.add_(tops)
        return logits.sub_(torch.amax(logits, -1, True, out=self.take("largest", *logits.shape[:2], 1))).exp_()

    def through_features_(self, grad: Tensor, features: Tensor) -> Tensor:
        """The gradient of the logits from that of the features, in place."""
        return grad.mul_(features if self.is_softmax else features > RELU_OFFSET)

    def sum_keys(self, chunks: list[slice]) -> _Sums:
        """The sums over all keys that count."""
        heads, count = self.projection.shape[:2]
        values = self.value.new_zeros(heads, count, self.value.shape[-1])
        ones, tops = values.new_zeros(heads, count, 1), values.new_zeros(heads, 1, count)
        if self.is_softmax:
            tops.fill_(-torch.inf)
        for tokens in chunks:
            if self.is_softmax:
                features = self.key_logits(tokens)
                larger = torch.maximum(tops, features.amax(dim=1, keepdim=True))
                # A feature that no key had so far has nothing to rescale.
                shift = torch.where(larger == -torch.inf, 0.0, larger)
                factor = (tops - shift).exp_().transpose(1, 2)
                values.mul_(factor), ones.mul_(factor)
                features.sub_(shift).exp_()
                tops = larger
            else:
                features = self.keys(tokens, tops)
            values.baddbmm_(features.transpose(1, 2), self.value[:, tokens])
            ones.add_(features.sum(dim=1)[:, :, None])
        return _Sums(values, ones, torch.where(tops == -torch.inf, 0.0, tops))


def _parts(inputs: _Inputs) -> Iterator[tuple[_Part, list[slice]]]:
    """The parts, and the chunks of tokens of each: as much at a time as one chunk's memory holds, one head at least."""
    batch, heads, length, _ = inputs.key.shape
    count, itemsize = inputs.features.projection.shape[0], inputs.key.dtype.itemsize
    rows = max(1, CHUNK_BYTES * torch.get_num_threads() // (count * itemsize))
    step, at_once = min(length, rows), max(1, min(heads, rows // length))
    chunks = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    scratch = Scratch()
    for example in range(batch):
        for head in range(0, heads, at_once):
            yield _Part(inputs, scratch, example, slice(head, min(head + at_once, heads))), chunks


def _attend(inputs: _Inputs, result: Tensor) -> tuple[_Sums, Tensor]:
    """Write what the queries get into `result`, which may be their own memory.

    Returns:
        The sums over keys, `[batch, heads, ...]`, and the normalisers `[batch, heads, length, 1]`.
    """
    batch, heads, length, width = inputs.value.shape
    count, new = inputs.features.projection.shape[0], inputs.query.new_empty
    totals = new(batch, heads, length, 1)
    sums = _Sums(*(new(batch, heads, *x) for x in ((count, width), (count, 1), (1, count))))
    for part, chunks in _parts(inputs):
        own = part.sum_keys(chunks)
        for whole, piece in zip(sums, own, strict=True):
            whole[part.where] = piece
        for tokens in chunks:
            queries = part.queries(tokens, own.tops)
            mixed = torch.bmm(queries, own.values, out=part.take("mixed", *queries.shape[:2], width))
            total = torch.bmm(queries, own.ones, out=part.take("total", *queries.shape[:2], 1))
            total.masked_fill_(total == 0, 1.0)
            totals[part.where][:, tokens] = total
            torch.div(mixed, total, out=result[part.where][:, tokens])
    return sums, totals


class _PerformerAttention(torch.autograd.Function):
    """Two passes, over keys and over queries, with the sums over keys between them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, features: FeatureMap
    ) -> Tensor:
        batch, heads, length, width = value.shape
        result = query.new_empty(batch, length, heads, width).transpose(1, 2)
        sums, totals = _attend(_Inputs(query, key, value, keep, features), result)
        ctx.save_for_backward(query, key, value, keep, features.projection, *sums, totals, result)
        ctx.features = features
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep, _, *sums, totals, result = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for part, chunks in _parts(_Inputs(query, key, value, keep, ctx.features)):
                where, own = part.where, _Sums(*(x[part.where] for x in sums))
                own_grad = _Sums(torch.zeros_like(own.values), torch.zeros_like(own.ones), own.tops)
                for tokens in chunks:
                    above = part.take("above", *grad[where][:, tokens].shape)
                    torch.div(grad[where][:, tokens], totals[where][:, tokens], out=above)
                    grads[0][where][:, tokens] = _query_grad(
                        part, tokens, above, result[where][:, tokens], own, own_grad
                    )
                for tokens in chunks:
                    key_grad, value_grad = _key_grads(part, tokens, own_grad)
                    grads[1][where][:, tokens], grads[2][where][:, tokens] = key_grad, value_grad
        return (*grads, None, None)


def _query_grad(part: _Part, tokens: slice, above: Tensor, result: Tensor, sums: _Sums, sums_grad: _Sums) -> Tensor:
    """Gradient of some queries; adds their share to that of the sums over keys.

    `above` `[heads, tokens, d]` is the gradient of the result, divided by the normalisers.
    """
    queries = part.queries(tokens, sums.tops)
    total_grad = torch.linalg.vecdot(above, result, out=part.take("total_grad", *above.shape[:2])).neg_()[:, :, None]
    sums_grad.values.baddbmm_(queries.transpose(1, 2), above)
    sums_grad.ones.baddbmm_(queries.transpose(1, 2), total_grad)
    logits_grad = torch.bmm(above, sums.values.transpose(1, 2), out=part.take("features_grad", *queries.shape))
    logits_grad.addcmul_(total_grad, sums.ones.transpose(1, 2))
    part.through_features_(logits_grad, queries)
    return torch.bmm(logits_grad, part.projection, out=part.take("rows_grad", *above.shape))


def _key_grads(part: _Part, tokens: slice, sums_grad: _Sums) -> tuple[Tensor, Tensor]:
    """Gradients of some keys and values."""
    rows, value, keys = part.key[:, tokens], part.value[:, tokens], part.keys(tokens, sums_grad.tops)
    value_grad = torch.bmm(keys, sums_grad.values, out=part.take("mixed", *value.shape))
    logits_grad = torch.bmm(value, sums_grad.values.transpose(1, 2), out=part.take("features_grad", *keys.shape))
    logits_grad.add_(sums_grad.ones.transpose(1, 2))
    part.through_features_(logits_grad, keys)
    rows_grad = torch.bmm(logits_grad, part.projection, out=part.take("rows_grad", *rows.shape))
    if part.is_softmax:
        # Of -|x|^2 / 2, which every feature of a key has.
        rows_grad.addcmul_(rows, logits_grad.sum(dim=-1, keepdim=True), value=-(part.root**2))
    return rows_grad, value_grad
