"""Attention of chunks to neighbouring chunks on a CPU: windows as overlapping views, probabilities computed twice.

The same function as the portable form in `chunk_attention.py`, in eager mode: for layers whose tokens attend all of a
window, and for chunks of the text as it is. Sorted rows of some heads at a time are copied into memory that is used
again; no window is expanded and no probabilities are kept.
"""

from collections.abc import Iterator
from itertools import groupby, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay, first_derivatives
from .chunk_plan import EXCLUDED, SELF_PENALTY
from .chunk_windows import Rows, SortedExamples, as_rows, window_shape


def cpu_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    *,
    scale: float,
    dropout_p: float,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    causal: bool,
    wrap: bool,
    exclude_self: bool,
) -> Tensor:
    """Each chunk of `order` over itself and the chunks around it; results of several rounds weighted by `exp(lse)`.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`; rows of padding are not read.
        order: int64 `[batch or 1, heads or 1, rounds, places]`, the token at each place, valid ones first.
        inverse: int64 `[batch or 1, heads or 1, rounds, length]`, the place of each token.
        counts: int64 `[batch or 1]`, valid tokens.
        scale: factor of the scores.
        dropout_p: dropout of the probabilities of each round, below 1.
        chunk_length, chunks_before, chunks_after, causal, exclude_self: see `chunk_attention`.
        wrap: the chunks of all rounds are a ring. Without it there is one round, and order is that of the text.

    Returns:
        As `query`, 0 at padding.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451. Time O(rounds * length * chunk), memory O(rounds * length) besides
    the scores of some chunks. The backward pass computes the probabilities of each round again: with `share` the weight
    of a row's round in its result O, `dS = share P (dP - <dO, O>)`. Shares and not sums of logarithms are kept, because
    beside `SELF_PENALTY` float32 has two digits left for those.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    options = _Options(
        tuple(counts.expand(query.shape[0]).tolist()),
        {"chunk_length": chunk_length, "chunks_before": chunks_before, "chunks_after": chunks_after}
        | {"causal": causal, "wrap": wrap},
        causal,
        exclude_self,
        scale,
        draw_replay(dropout_p),
        CHUNK_BYTES * torch.get_num_threads(),
    )
    mixed = _ChunkAttention.apply(*(x.to(dtype) for x in (query, key, value)), order, inverse, options)
    return mixed.to(value.dtype)


class _Options(NamedTuple):
    """What a call has besides tensors: valid tokens of each example, arguments of `window_shape`, and the rest."""

    counts: tuple[int, ...]
    windows: dict[str, int | bool]
    causal: bool
    exclude_self: bool
    scale: float
    dropout: DropoutReplay
    chunk_bytes: int


class _Part:
    """Some heads of some examples.

    Windows are numbered through all heads, `shape.padded` a head: window w starts at chunk w, and chunk `w + front`
    attends it. With more than one head, windows that reach into the next one are computed, too, and dropped.
    """

    def __init__(
        self,
        found: SortedExamples,
        where: tuple[slice, slice],
        inputs: list[Rows],
        options: _Options,
        at_once: int,
        scratch: Scratch,
    ) -> None:
        self.found, self.shape, self.options, self.scratch = found, found.shape, options, scratch
        self.where, first = where, found.examples.start
        self.inner = (slice(where[0].start - first, where[0].stop - first), where[1])
        self.position = found.position[self.inner].flatten().contiguous()
        self.places = found.places(self.inner)
        self.heads, self.chunks = self.places.shape[0], self.places.shape[0] * self.shape.padded
        self.inputs, self.at_once, self.dtype, self.width = inputs, at_once, found.position.dtype, inputs[0].width
        self.before = self.shape.front * self.shape.size

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.scratch.take(name, shape, self.dtype)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Windows at a time, loaded: those of all heads, or of a single head as many as there is room for."""
        count = self.chunks - self.shape.slots + 1
        step = count if self.heads > 1 else self.at_once
        for start in range(0, count, step):
            stop = min(start + step, count)
            query, key, value = self.inputs
            self.query = self.queries_of("query", query, start, stop).mul_(self.options.scale)
            chunks = (start, stop + self.shape.slots - 1)
            self.keys, self.values = (
                self.windows(self.gather(name, x, *chunks), 0, stop - start)
                for name, x in (("key", key), ("value", value))
            )
            yield start, stop

    def gather(self, name: str, source: Rows, first: int, last: int) -> Tensor:
        """Rows `[places, d]` of some chunks."""
        size = self.shape.size
        index = self.found.index(source.steps)[self.inner].reshape(-1)[first * size : last * size]
        return torch.index_select(source.rows, 0, index, out=self.take(name, index.shape[0], self.width))

    def queries_of(self, name: str, source: Rows, start: int, stop: int) -> Tensor:
        """Rows of the chunks that attend these windows, `[windows, size, d]`."""
        rows = self.gather(name, source, start + self.shape.front, stop + self.shape.front)
        return rows.view(stop - start, self.shape.size, self.width)

    def room(self, name: str, start: int, stop: int, *inner: int) -> Tensor:
        """Scratch memory for these windows; with several heads there are as many for each, see `by_head`."""
        return self.take(name, stop - start if self.heads == 1 else self.chunks, *inner)[: stop - start]

    def by_head(self, windows: Tensor, start: int, first: int, last: int) -> tuple[Tensor, int, int]:
        """Windows `first` to `last` of each head, as far as `room` from `start` on has them.

        Returns:
            The view, and which windows it holds.
        """
        inner = windows.shape[1:]
        if self.heads == 1:
            first, last = max(first, start), min(last, start + windows.shape[0])
            return windows[None, first - start : max(first, last) - start], first, last
        count, step = self.shape.padded, windows.stride(0)
        strides = (count * step, step, *windows.stride()[1:])
        view = windows.as_strided((self.heads, count, *inner), strides, windows.storage_offset())
        return view[:, first:last], first, last

    def rows_of(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Chunks `[windows, size, ...]` of rows."""
        return rows[start * self.shape.size : stop * self.shape.size].unflatten(0, (-1, self.shape.size))

    def windows(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Overlapping windows `[windows, span, d]` of rows."""
        size, width = self.shape.size, rows.shape[1]
        strides = (size * width, width, 1)
        offset = rows.storage_offset() + start * size * width
        return rows.as_strided((stop - start, self.shape.span, width), strides, offset)

    def probs(self, start: int, stop: int, logsumexp: Tensor | None = None) -> Tensor:
        """Probabilities of each round `[windows, size, span]`; `logsumexp` `[windows, size]` is set."""
        shape = self.shape
        scores = self.room("scores", start, stop, shape.size, shape.span)
        keys = self.keys.transpose(1, 2)
        if self.options.causal:
            position = self.position[:, None]
            later = self.windows(position, start, stop).transpose(1, 2)
            # One pass that only writes: the product itself scales what it is added to. Places without a token are inf.
            torch.gt(later, self.rows_of(position[self.before :], start, stop), out=scores)
            scores.baddbmm_(self.query, keys, beta=EXCLUDED)
        else:
            torch.bmm(self.query, keys, out=scores)
            for view, keys_at, _ in self.near(scores, start, shape.hidden()):
                view.add_(keys_at.isinf().to(self.dtype), alpha=EXCLUDED)
        if self.options.exclude_self:
            steps = (shape.size * shape.span, shape.span + 1)
            own = scores.as_strided((stop - start, shape.size), steps, scores.storage_offset() + self.before)
            own.sub_(SELF_PENALTY)
            # Within a round a token is in one place only.
            for view, keys_at, queries_at in self.near(scores, start, shape.crossing()):
                same = (keys_at == queries_at).to(self.dtype)
                same.diagonal(self.before, -2, -1).zero_()
                view.sub_(same, alpha=SELF_PENALTY)
        if logsumexp is None:
            return torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        torch.amax(scores, -1, out=logsumexp)
        torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        # The largest probability is that of the largest score, and at least 1 / span.
        logsumexp.sub_(scores.amax(dim=-1).log_())
        return scores

    def near(
        self, scores: Tensor, start: int, ranges: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scores of some ranges of windows, with positions of keys and queries that fit them."""
        size = self.shape.size
        step = self.shape.padded * size
        for first, last in ranges:
            view, first, last = self.by_head(scores, start, first, last)
            if first < last:
                outer, offset = (self.heads, last - first), self.position.storage_offset() + first * size
                keys = self.position.as_strided((*outer, 1, self.shape.span), (step, size, 0, 1), offset)
                queries = self.position.as_strided((*outer, size, 1), (step, size, 1, 0), offset + self.before)
                yield view, keys, queries

    def add_adjoint_(self, rows: Tensor, weights: Tensor, left: Tensor, start: int, stop: int) -> None:
        """Add the transpose of `weights` `[windows, size, span]` times `left` to the rows that windows view."""
        size = self.shape.size
        if self.heads == 1:
            for slot in range(self.shape.slots):
                some = weights[:, :, slot * size : (slot + 1) * size].transpose(1, 2)
                self.rows_of(rows, start + slot, stop + slot).baddbmm_(some, left)
            return
        # Windows that reach into the next head are left out even where they hold no number.
        copies = self.room("copies", start, stop, self.shape.span, self.width)
        torch.bmm(weights.transpose(1, 2), left, out=copies)
        copies, *_ = self.by_head(copies, start, 0, self.shape.count)
        target = rows[: self.chunks * size].view(self.heads, -1, size, self.width)
        for slot in range(self.shape.slots):
            target[:, slot : slot + self.shape.count] += copies[:, :, slot * size : (slot + 1) * size]

    def fold_(self, rows: Tensor) -> Tensor:
        """Add what is around the chunks to those it is a copy of; the rows from the first chunk on."""
        shape = self.shape
        if shape.wrap:
            by_head = rows[: self.chunks * shape.size].view(self.heads, shape.padded, -1)
            by_head[:, shape.count : shape.count + shape.front] += by_head[:, : shape.front]
            by_head[:, shape.front : shape.front + shape.back] += by_head[:, shape.front + shape.count :]
        return rows[self.before :]

    def write(self, target: Tensor, rows: Tensor, shares: Tensor | None = None) -> None:
        """The sum over rounds of rows, each times `shares` `[heads, rounds, length]`, as tokens of `target`."""
        target = target[self.where]
        rows[self.chunks * self.shape.size] = 0.0
        if self.heads == 1 and self.shape.rounds == 1:
            torch.index_select(rows, 0, self.places.flatten(), out=target[0, 0])
            return
        outer = (self.heads, target.shape[2], self.width)
        total = None
        for number in range(self.shape.rounds):
            tokens = self.take("total" if total is None else "tokens", *outer)
            torch.index_select(rows, 0, self.places[:, number].flatten(), out=tokens.view(-1, self.width))
            if shares is not None:
                tokens.mul_(shares[:, number, :, None])
            total = tokens if total is None else total.add_(tokens)
        target.copy_(total.view(target.shape))

    def result_rows(self, name: str, more: int = 0) -> Tensor:
        """Rows of all heads, and one for padding."""
        return self.take(name, self.chunks * self.shape.size + more + 1, self.width)

    def zero_empty_(self, queries: Tensor, start: int) -> Tensor:
        """0 in the rows of `[windows, size, d]`, from window `start` on, that belong to no token."""
        shape, rows = self.shape, queries.flatten(0, 1)
        if shape.tokens < shape.own * shape.size:
            for head, number in product(range(self.heads), range(shape.rounds)):
                first = (head * shape.padded + number * shape.own - start) * shape.size
                rows[max(0, first + shape.tokens) : max(0, first + shape.own * shape.size)] = 0.0
        return queries


def _parts(tensors: tuple[Tensor, ...], order: Tensor, inverse: Tensor, options: _Options) -> Iterator[_Part]:
    """As many heads, and examples, as one chunk's memory holds, at least one head; no examples without tokens."""
    heads, dtype = tensors[0].shape[1], tensors[0].dtype
    inputs, scratch, start = [as_rows(x) for x in tensors], Scratch(), 0
    for tokens, same in groupby(options.counts):
        examples = slice(start, start + len(list(same)))
        start = examples.stop
        if tokens == 0:
            continue
        shape = window_shape(tokens, order.shape[2], **options.windows)
        found = SortedExamples(shape, examples, heads, order, inverse, dtype)
        at_once = max(1, options.chunk_bytes // (shape.size * shape.span * dtype.itemsize))
        head_step = max(1, min(heads, at_once // shape.padded))
        batch_step = max(1, at_once // (shape.padded * heads))
        for example in range(examples.start, examples.stop, batch_step):
            some = slice(example, min(example + batch_step, examples.stop))
            for head in range(0, heads, head_step):
                where = (some, slice(head, min(head + head_step, heads)))
                yield _Part(found, where, inputs, options, at_once, scratch)


def _zero_empty(targets: list[Tensor], counts: tuple[int, ...]) -> None:
    for example, tokens in enumerate(counts):
        if tokens == 0:
            for target in targets:
                target[example] = 0.0


def _write_gradients(
    part: _Part,
    grad: Rows,
    grads: list[Tensor],
    rounds: tuple[Tensor, Tensor, Tensor] | None,
    generator: torch.Generator,
) -> None:
    """Write the part's share of the gradients; `rounds` are shares of rounds, gradient and result, if several."""
    options, shape = part.options, part.shape
    shares, products = None, None
    if rounds is not None:
        index = part.found.in_rounds[part.inner].reshape(part.heads, -1)
        shares, above, result = (x[part.where] for x in rounds)
        products = (above * result).sum(dim=-1)[:, :, None] * shares
        shares, products = (x.reshape(part.heads, -1).gather(1, index).view(-1, 1) for x in (shares, products))
        shares, products = shares[part.before :], products[part.before :]
    query_grad, key_grad, value_grad = (
        part.result_rows(name, more) for name, more in (("dq", 0), ("dk", part.before), ("dv", part.before))
    )
    key_grad.zero_(), value_grad.zero_()
    for start, stop in part.ranges():
        probs = part.probs(start, stop)
        above = part.queries_of("above", grad, start, stop)
        if options.dropout.p > 0.0:
            above.div_(options.dropout.keep_share)
        if shares is not None:
            above.mul_(part.rows_of(shares, start, stop))
        part.zero_empty_(above, start)
        scores_grad = part.room("scores_grad", start, stop, shape.size, shape.span)
        torch.bmm(above, part.values.transpose(1, 2), out=scores_grad)
        used = probs
        if options.dropout.p > 0.0:
            kept = options.dropout.kept(probs, part.scratch, generator)
            scores_grad.mul_(kept)
            used = kept.mul_(probs)
        part.add_adjoint_(value_grad, used, above, start, stop)
        if products is None:
            torch.ops.aten._softmax_backward_data.out(scores_grad, probs, -1, part.dtype, grad_input=scores_grad)
        else:
            scores_grad.sub_(part.zero_empty_(part.rows_of(products, start, stop), start)).mul_(probs)
        part.add_adjoint_(key_grad, scores_grad, part.query, start, stop)
        torch.bmm(scores_grad, part.keys, out=part.rows_of(query_grad, start, stop))
    part.write(grads[0], query_grad.mul_(options.scale))
    part.write(grads[1], part.fold_(key_grad))
    part.write(grads[2], part.fold_(value_grad))


class _ChunkAttention(torch.autograd.Function):
    """Sorted chunks in their windows, and rounds together, with dropout of the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, order: Tensor, inverse: Tensor, options: _Options
    ) -> Tensor:
        batch, heads, length, width = query.shape
        result = query.new_empty(batch, length, heads, width).transpose(1, 2)
        rounds, dropout = order.shape[2], options.dropout
        shares = query.new_empty(batch, heads, rounds, length) if rounds > 1 else None
        generator = dropout.generator()
        with torch.autocast("cpu", enabled=False):
            for part in _parts((query, key, value), order, inverse, options):
                mixed = part.result_rows("mixed")
                logsumexp = None if shares is None else part.take("logsumexp", mixed.shape[0])
                for start, stop in part.ranges():
                    of_windows = None if shares is None else part.rows_of(logsumexp, start, stop)
                    probs = part.probs(start, stop, of_windows)
                    if dropout.p > 0.0:
                        probs.mul_(dropout.kept(probs, part.scratch, generator))
                    torch.bmm(probs, part.values, out=part.rows_of(mixed, start, stop))
                if dropout.p > 0.0:
                    mixed.div_(dropout.keep_share)
                own = None
                if shares is not None:
                    logsumexp[-1] = 0.0
                    own = logsumexp[part.places].softmax(dim=1)
                    shares[part.where] = own.view_as(shares[part.where])
                part.write(result, mixed, own)
            _zero_empty([result], options.counts)
        ctx.save_for_backward(query, key, value, order, inverse, shares, None if shares is None else result)
        ctx.options = options
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, order, inverse, shares, result = ctx.saved_tensors
        options, grads = ctx.options, [torch.empty_like(x) for x in (query, key, value)]
        generator = options.dropout.generator()
        with torch.autocast("cpu", enabled=False):
            rounds, grad_rows = None, as_rows(grad)
            if shares is not None:
                rounds = (shares, grad, result)
            for part in _parts((query, key, value), order, inverse, options):
                _write_gradients(part, grad_rows, grads, rounds, generator)
            _zero_empty(grads, options.counts)
        return (*grads, None, None, None)
