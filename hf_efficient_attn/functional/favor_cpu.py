"""Bidirectional FAVOR+ on a CPU: features of some tokens at a time, computed again in the backward pass.

The same function as the plain form in `favor.py`, for eager mode. Features of a whole text, `length * features` numbers
a head, are never in memory together; what is kept for backward is the inputs, the sums over keys and the result.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .favor_features import RELU_OFFSET, FeatureMap
from .window_blocks import Scratch


# Features in memory at a time, for each thread: they should stay in a core's own cache between the passes over them.
_CHUNK_BYTES = 2 * 2**20


def cpu_performer_sums(features: FeatureMap, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    """Attention of every query over every key that counts.

    Args:
        query, key: `[batch, heads, length, head_dim]`, in the dtype to compute in, finite also at padding.
        value: `[batch, heads, length, head_dim + 1]`, ones in the last column.
        keep: `[batch, length]` bool, which keys count.

    Returns:
        `[batch, heads, length, head_dim]`; 0 where no key counts.
    """
    return _PerformerAttention.apply(query, key, value, keep, features)


class _Inputs(NamedTuple):
    """What forward and backward both read."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor | None
    features: FeatureMap


class _Part:
    """Some heads of one example, and the features of some of their tokens at a time."""

    def __init__(self, inputs: _Inputs, scratch: Scratch, example: int, heads: slice) -> None:
        self.scratch, self.features, self.where = scratch, inputs.features, (example, heads)
        self.query, self.key, self.value = (x[example, heads] for x in inputs[:3])
        self.keep = None if inputs.keep is None else inputs.keep[example]
        self.is_softmax = self.features.kernel == "softmax"
        self.heads = self.key.shape[0]
        self.count, self.width = self.features.projection.shape
        self.projection = self.features.projection
        if self.is_softmax:
            ones = self.projection.new_ones(self.count, 1)
            self.projection = torch.cat([self.projection, ones], dim=1)

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.scratch.take(name, shape, self.projection.dtype)

    def inputs_of(self, name: str, tensor: Tensor) -> Tensor:
        """`sqrt(scale) * tensor` `[heads, tokens, head_dim]`, in the softmax kernel with room for one more column."""
        rows = self.take(name, *tensor.shape[:2], self.projection.shape[1])
        torch.mul(tensor, self.features.root, out=rows[..., : self.width])
        return rows

    def products(self, rows: Tensor) -> Tensor:
        """`rows` times the projection, `[heads, tokens, features]`."""
        logits = self.take("features", *rows.shape[:2], self.count)
        torch.mm(rows.flatten(0, 1), self.projection.T, out=logits.flatten(0, 1))
        return logits

    def key_logits(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Rows and logits of keys in the softmax kernel; -inf for those that do not count."""
        rows = self.inputs_of("rows", self.key[:, tokens])
        last = rows[..., -1]
        torch.linalg.vecdot(rows[..., :-1], rows[..., :-1], out=last).mul_(-0.5)
        if self.keep is not None:
            last.masked_fill_(~self.keep[tokens], -torch.inf)
        return rows, self.products(rows)

    def keys(self, tokens: slice, top: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows and features of keys, relative to the maxima `top` `[heads, 1, features]`."""
        if self.is_softmax:
            rows, logits = self.key_logits(tokens)
            return rows, logits.sub_(top).exp_()
        rows = self.inputs_of("rows", self.key[:, tokens])
        features = self.products(rows).relu_().add_(RELU_OFFSET)
        if self.keep is not None:
            features.masked_fill_(~self.keep[tokens, None], 0.0)
        return rows, features

    def queries(self, tokens: slice, top: Tensor | None) -> Tensor:
        """Features of queries; those of the softmax kernel up to a factor a row."""
        rows = self.inputs_of("rows", self.query[:, tokens])
        if not self.is_softmax:
            return self.products(rows).relu_().add_(RELU_OFFSET)
        rows[..., -1] = 1.0
        projection = self.take("projection", self.heads, self.count, self.width + 1)
        projection[:] = self.projection
        projection[..., -1] = top[:, 0]
        logits = self.take("features", *rows.shape[:2], self.count)
        torch.bmm(rows, projection.transpose(1, 2), out=logits)
        largest = torch.amax(logits, dim=-1, keepdim=True, out=self.take("largest", *rows.shape[:2], 1))
        return logits.sub_(largest).exp_()

    def through_features(self, grad: Tensor, features: Tensor) -> Tensor:
        """The gradient of the logits from that of the features, in place."""
        return grad.mul_(features) if self.is_softmax else grad.mul_(features > RELU_OFFSET)

    def sum_keys(self, chunks: list[slice]) -> tuple[Tensor, Tensor | None]:
        """Sums over keys of features times values `[heads, features, d + 1]`, and the features' maxima."""
        sums = self.value.new_zeros(self.heads, self.count, self.value.shape[-1])
        if not self.is_softmax:
            for tokens in chunks:
                _, features = self.keys(tokens, None)
                sums.baddbmm_(features.transpose(1, 2), self.value[:, tokens])
            return sums, None
        top = sums.new_full((self.heads, 1, self.count), -torch.inf)
        for tokens in chunks:
            _, logits = self.key_logits(tokens)
            larger = torch.maximum(top, logits.amax(dim=1, keepdim=True))
            # A feature that no key had so far has nothing to rescale.
            shift = torch.where(larger == -torch.inf, 0.0, larger)
            sums.mul_((top - shift).exp_().transpose(1, 2))
            sums.baddbmm_(logits.sub_(shift).exp_().transpose(1, 2), self.value[:, tokens])
            top = larger
        return sums, torch.where(top == -torch.inf, 0.0, top)


def _parts(inputs: _Inputs) -> Iterator[tuple[_Part, list[slice]]]:
    """The parts, and the chunks of tokens of each: as much at a time as one chunk's memory holds, one head at least."""
    batch, heads, length, _ = inputs.key.shape
    count, itemsize = inputs.features.projection.shape[0], inputs.key.dtype.itemsize
    rows = max(1, _CHUNK_BYTES * torch.get_num_threads() // (count * itemsize))
    step, at_once = min(length, rows), max(1, min(heads, rows // length))
    chunks = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    scratch = Scratch()
    for example in range(batch):
        for head in range(0, heads, at_once):
            yield _Part(inputs, scratch, example, slice(head, min(head + at_once, heads))), chunks


class _PerformerAttention(torch.autograd.Function):
    """Two passes, over keys and over queries, with the sums over keys between them."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, features: FeatureMap
    ) -> Tensor:
        inputs = _Inputs(query, key, value, keep, features)
        batch, heads, length, width = value.shape
        count = features.projection.shape[0]
        result = query.new_empty(batch, length, heads, width - 1).transpose(1, 2)
        totals = query.new_empty(batch, heads, length, 1)
        sums = query.new_empty(batch, heads, count, width)
        tops = query.new_empty(batch, heads, 1, count if features.kernel == "softmax" else 0)
        for part, chunks in _parts(inputs):
            sums[part.where], top = part.sum_keys(chunks)
            if top is not None:
                tops[part.where] = top
            for tokens in chunks:
                queries = part.queries(tokens, top)
                mixed = part.take("mixed", *queries.shape[:2], width)
                torch.bmm(queries, sums[part.where], out=mixed)
                total = totals[part.where][:, tokens]
                total.copy_(mixed[..., -1:]).masked_fill_(total == 0, 1.0)
                torch.div(mixed[..., :-1], total, out=mixed[..., :-1])
                result[part.where][:, tokens] = mixed[..., :-1]
        ctx.save_for_backward(query, key, value, keep, features.projection, sums, tops, totals, result)
        ctx.features = features
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep, _, sums, tops, totals, result = ctx.saved_tensors
        inputs = _Inputs(query, key, value, keep, ctx.features)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        with torch.autocast("cpu", enabled=False):
            for part, chunks in _parts(inputs):
                where, top = part.where, tops[part.where] if part.is_softmax else None
                sums_grad = torch.zeros_like(sums[where])
                for tokens in chunks:
                    above = part.take("above", part.heads, grad[where][:, tokens].shape[1], value.shape[-1])
                    _ratio_grad(grad[where][:, tokens], result[where][:, tokens], totals[where][:, tokens], above)
                    _query_grad(part, tokens, top, above, sums[where], sums_grad, grads[0])
                for tokens in chunks:
                    _key_grad(part, tokens, top, sums_grad, grads[1], grads[2])
        return (*grads, None, None)


def _ratio_grad(grad: Tensor, result: Tensor, total: Tensor, out: Tensor) -> None:
    """Gradient of the undivided sums `[heads, tokens, d + 1]` from that of the result."""
    torch.div(grad, total, out=out[..., :-1])
    torch.linalg.vecdot(out[..., :-1], result, out=out[..., -1]).neg_()


def _query_grad(
    part: _Part, tokens: slice, top: Tensor | None, above: Tensor, sums: Tensor, sums_grad: Tensor, target: Tensor
) -> None:
    """Write the gradient of some queries, and add their share to that of the sums over keys."""
    queries = part.queries(tokens, top)
    sums_grad.baddbmm_(queries.transpose(1, 2), above)
    logits_grad = part.take("features_grad", *queries.shape)
    torch.bmm(above, sums.transpose(1, 2), out=logits_grad)
    part.through_features(logits_grad, queries)
    rows = part.take("rows_grad", *queries.shape[:2], part.width)
    torch.mm(logits_grad.flatten(0, 1), part.features.projection, out=rows.flatten(0, 1))
    target[part.where][:, tokens] = rows.mul_(part.features.root)


def _key_grad(
    part: _Part, tokens: slice, top: Tensor | None, sums_grad: Tensor, key_target: Tensor, value_target: Tensor
) -> None:
    """Write the gradients of some keys and values."""
    rows, keys = part.keys(tokens, top)
    value = part.value[:, tokens]
    value_target[part.where][:, tokens] = torch.bmm(keys, sums_grad, out=part.take("mixed", *value.shape))
    logits_grad = part.take("features_grad", *keys.shape)
    torch.bmm(value, sums_grad.transpose(1, 2), out=logits_grad)
    part.through_features(logits_grad, keys)
    rows_grad = part.take("rows_grad", *rows.shape)
    torch.mm(logits_grad.flatten(0, 1), part.projection, out=rows_grad.flatten(0, 1))
    if part.is_softmax:
        # The last column is the gradient of -|x|^2 / 2.
        rows_grad[..., :-1].addcmul_(rows[..., :-1], rows_grad[..., -1:], value=-1.0)
    key_target[part.where][:, tokens] = rows_grad[..., : part.width].mul_(part.features.root)
