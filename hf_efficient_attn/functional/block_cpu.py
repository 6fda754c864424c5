"""Attention of blocks over lists of blocks on a CPU, with a backward pass that computes probabilities again.

The same function as the gathered form in `big_bird.py`, in eager mode. Keys and values are copied for a few blocks of
queries at a time, into memory that is used again, and no probabilities are kept. The rows that attend everything are
computed here as well, from the copies that are there already.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay, first_derivatives
from .block_layout import BlockLayout
from .inputs import masked_bias
from .tokens import TokenSlots


def cpu_block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    lists: Tensor,
    rows: TokenSlots,
    *,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Each text block of `layout` over the blocks that `lists` names, in one softmax; some tokens over all.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        layout: where the tokens stand.
        lists: int64 `[batch or 1, heads, rows, entries]`, blocks of places; -1 for none.
        rows: the tokens that attend every token, for all examples if it has one only.
        scale: factor of the scores.
        dropout_p: dropout of the probabilities, below 1.

    Returns:
        As `query`; rows of padding are unspecified.
    """
    slots = zip(layout.place, rows.index, rows.valid, strict=True)
    places = [place[index[valid]] for place, index, valid in slots]
    return _BlockAttention.apply(query, key, value, lists, layout, places, scale, draw_replay(dropout_p))


class _Blocks:
    """Tensors of some heads of some examples, moved to their places and back."""

    def __init__(self, layout: BlockLayout, dtype: torch.dtype, scratch: Scratch) -> None:
        self.layout, self.dtype, self.scratch = layout, dtype, scratch
        self.places = layout.source.shape[1]
        self.blocks = self.places // layout.size

    def to_places(self, name: str, tensor: Tensor, examples: slice) -> Tensor:
        """`[examples, heads, length, d]` -> `[examples * heads * blocks, size * d]` in scratch memory.

        What stands at places without a token is unspecified but finite.
        """
        count, heads, length, width = tensor.shape
        places = self.scratch.take(name, (count, heads, self.places, width), self.dtype)
        if self.layout.is_plain:
            places[:, :, :length] = tensor
            places[:, :, length:] = 0.0
        else:
            for part, target, source in zip(tensor, places, self._of(self.layout.source, examples), strict=False):
                target.copy_(part.index_select(1, source))
        return places.view(count * heads * self.blocks, self.layout.size * width)

    def from_places(self, target: Tensor, places: Tensor, examples: slice) -> None:
        """The way back, into `target` `[examples, heads, length, d]`; padding gets what stands at place 0."""
        count, heads, length, width = target.shape
        places = places.view(count, heads, self.places, width)
        if self.layout.is_plain:
            target.copy_(places[:, :, :length])
        else:
            for into, part, place in zip(target, places, self._of(self.layout.place, examples), strict=False):
                into.copy_(part.index_select(1, place))

    @staticmethod
    def _of(numbers: Tensor, examples: slice) -> Tensor:
        return numbers.expand(examples.stop, -1)[examples] if numbers.shape[0] == 1 else numbers[examples]


class _Chunk(NamedTuple):
    """Some blocks of queries: which ones, the blocks they attend, and what must not be attended."""

    rows: Tensor
    entries: Tensor
    bias: Tensor | None


class _Part:
    """Some heads of some examples, with their keys and values at their places."""

    def __init__(
        self,
        blocks: _Blocks,
        tensors: tuple[Tensor, Tensor, Tensor],
        lists: Tensor,
        rows: list[Tensor],
        where: tuple[slice, slice],
        scale: float,
    ) -> None:
        self.blocks, self.where, self.scale = blocks, where, scale
        examples = range(where[0].start, where[0].stop)
        self.global_rows = [rows[min(example, len(rows) - 1)] for example in examples]
        self.size, self.width = blocks.layout.size, tensors[0].shape[-1]
        self.key, self.value, self.query = (
            blocks.to_places(name, tensor[where], where[0])
            for name, tensor in zip(("key", "value", "query"), (tensors[1], tensors[2], tensors[0]), strict=True)
        )
        self.query.mul_(scale)
        # Numbers of blocks among those of all heads and examples at hand.
        lists = lists if lists.shape[0] == 1 else lists[where[0]]
        lists = lists[:, where[1]].expand(where[0].stop - where[0].start, -1, -1, -1)
        self.heads = lists.shape[0] * lists.shape[1]
        first = torch.arange(self.heads, device="cpu").view(*lists.shape[:2], 1, 1) * blocks.blocks
        empty = lists < 0
        self.lists = (lists.clamp(min=0) + first).flatten(0, 2)
        text = torch.arange(lists.shape[2], device="cpu") + blocks.layout.global_blocks
        self.rows = (text + first[..., 0]).flatten()
        used = blocks.layout.used.view(blocks.layout.used.shape[0], -1, self.size)
        used = (used if used.shape[0] == 1 else used[where[0]])[:, None].expand(*lists.shape[:2], -1, -1).flatten(0, 2)
        self.used, self.empty = used, empty.flatten(0, 2)
        partial = ~used.all(dim=1)
        self.masked = (self.empty | partial[self.lists]).any(dim=1)

    def chunks(self, step: int) -> Iterator[_Chunk]:
        """At most `step` blocks of queries at a time."""
        masked = self.masked.tolist()
        for start in range(0, self.rows.shape[0], step):
            some = slice(start, start + step)
            bias = None
            if any(masked[some]):
                seen = self.used[self.lists[some]] & ~self.empty[some][..., None]
                bias = masked_bias(seen.flatten(1)[:, None], self.blocks.dtype)
            yield _Chunk(self.rows[some], self.lists[some].flatten(), bias)

    def rows_of(self, name: str, places: Tensor, chunk: "_Chunk") -> Tensor:
        """The chunk's own blocks, `[rows, size, d]`; where they lie side by side a view."""
        if self.heads > 1:
            return self.of(name, places, chunk.rows)
        first = int(chunk.rows[0])
        return places[first : first + chunk.rows.shape[0]].view(-1, self.size, self.width)

    def write_product(self, target: Tensor, chunk: "_Chunk", left: Tensor, right: Tensor, factor: float) -> None:
        """`left right factor` as the chunk's own blocks of `target`."""
        shape = (left.shape[0], self.size, self.width)
        beside = self.heads == 1
        out = self.rows_of("", target, chunk) if beside else self.take("product", *shape)
        torch.bmm(left, right, out=out)
        if factor != 1.0:
            out.mul_(factor)
        if not beside:
            target.index_copy_(0, chunk.rows, out.view(shape[0], -1))

    def by_example(self, places: Tensor, example: int) -> Tensor:
        """`[heads * blocks, size * d]` of all examples -> `[heads, places, d]` of one, a view."""
        return places.view(len(self.global_rows), -1, self.blocks.places, self.width)[example]

    def global_probs(self, example: int, rows: Tensor) -> Tensor:
        """Probabilities of an example's `rows` over all places: `[heads, rows, places]`."""
        query = self.by_example(self.query, example)[:, rows]
        keys = self.by_example(self.key, example)
        scores = self.take("global scores", *query.shape[:2], keys.shape[1])
        torch.bmm(query, keys.transpose(1, 2), out=scores)
        used = self.used.view(len(self.global_rows), -1, keys.shape[1])[example, 0]
        if not bool(used.all()):
            scores += masked_bias(used, self.blocks.dtype)
        return torch.ops.aten._softmax.out(scores, -1, False, out=self.take("global probs", *scores.shape))

    def global_chunks(self, chunk_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """Example and rows of it at a time, as many as the scores of one chunk hold."""
        heads = self.heads // len(self.global_rows)
        step = max(1, chunk_bytes // (heads * self.blocks.places * self.blocks.dtype.itemsize))
        for example, rows in enumerate(self.global_rows):
            for start in range(0, rows.shape[0], step):
                yield example, rows[start : start + step]

    def of(self, name: str, places: Tensor, numbers: Tensor, entries: int = 1) -> Tensor:
        """Copies of blocks: `[len(numbers) / entries, entries * size, d]` in scratch memory."""
        copies = self.blocks.scratch.take(name, (numbers.shape[0], places.shape[1]), places.dtype)
        torch.index_select(places, 0, numbers, out=copies)
        return copies.view(numbers.shape[0] // entries, entries * self.size, self.width)

    def probs(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """Probabilities `[rows, size, entries * size]`, and the keys `[rows, entries * size, d]` they belong to."""
        entries = chunk.entries.shape[0] // chunk.rows.shape[0]
        query = self.rows_of("queries", self.query, chunk)
        keys = self.of("keys", self.key, chunk.entries, entries)
        scores = self.take("scores", query.shape[0], self.size, keys.shape[1])
        torch.bmm(query, keys.transpose(1, 2), out=scores)
        if chunk.bias is not None:
            scores += chunk.bias
        probs = torch.ops.aten._softmax.out(scores, -1, False, out=self.take("probs", *scores.shape))
        return probs, keys

    def through_softmax(
        self, probs: Tensor, above: Tensor, values: Tensor, dropout: DropoutReplay, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The probabilities after dropout, and the gradient of the scores, from `above`, that of the product."""
        probs_grad = torch.bmm(above, values.transpose(1, 2), out=self.take("probs_grad", *probs.shape))
        used = probs
        if dropout.p > 0.0:
            kept = dropout.kept(probs, self.blocks.scratch, generator)
            probs_grad.mul_(kept)
            used = kept.mul_(probs)
        scores_grad = self.take("scores_grad", *probs.shape)
        torch.ops.aten._softmax_backward_data.out(probs_grad, probs, -1, probs.dtype, grad_input=scores_grad)
        return used, scores_grad

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.blocks.scratch.take(name, shape, self.blocks.dtype)


def _parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    layout: BlockLayout,
    global_rows: list[Tensor],
    scale: float,
) -> tuple[int, Iterator[_Part]]:
    """Blocks of queries at a time, and the parts: as many heads and examples as one chunk holds, at least one head."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads = query.shape[:2]
    rows = max(1, lists.shape[2])
    # Keys and values are copied beside the scores.
    block_bytes = layout.size * max(1, lists.shape[3]) * (layout.size + 2 * query.shape[3]) * dtype.itemsize
    step = max(1, CHUNK_BYTES * torch.get_num_threads() // block_bytes)
    head_step = max(1, min(heads, step // rows))
    batch_step = max(1, min(batch, step // (rows * heads)))

    def parts() -> Iterator[_Part]:
        blocks = _Blocks(layout, dtype, Scratch())
        for start in range(0, batch, batch_step):
            examples = slice(start, min(start + batch_step, batch))
            for head in range(0, heads, head_step):
                where = (examples, slice(head, min(head + head_step, heads)))
                yield _Part(blocks, (query, key, value), lists, global_rows, where, scale)

    return step, parts()


def _write_gradients(
    part: _Part, grad: Tensor, grads: list[Tensor], step: int, dropout: DropoutReplay, generator: torch.Generator
) -> None:
    """Write the part's share of the gradients of query, key and value."""
    blocks, examples = part.blocks, part.where[0]
    result_grad = blocks.to_places("result_grad", grad[part.where], examples)
    if dropout.p > 0.0:
        result_grad.div_(dropout.keep_share)
    if not blocks.layout.is_plain:  # what stands at places without a token is a copy of some token's
        result_grad.view(-1, part.width).masked_fill_(~part.used.reshape(-1, 1), 0.0)
    # Rows that attend everything have nothing to do with the blocks they stand in.
    global_grads = []
    for example, rows in enumerate(part.global_rows):
        own = part.by_example(result_grad, example)
        global_grads.append(own[:, rows])
        own[:, rows] = 0.0
    totals = [part.take(f"grad {name}", *part.key.shape) for name in ("query", "key", "value")]
    totals[1].zero_(), totals[2].zero_()
    for chunk in part.chunks(step):
        entries = chunk.entries.shape[0] // chunk.rows.shape[0]
        probs, keys = part.probs(chunk)
        above = part.rows_of("above", result_grad, chunk)
        values = part.of("values", part.value, chunk.entries, entries)
        used, scores_grad = part.through_softmax(probs, above, values, dropout, generator)
        copies = part.take("copies", *values.shape)
        torch.bmm(used.transpose(1, 2), above, out=copies)
        totals[2].index_add_(0, chunk.entries, copies.view(chunk.entries.shape[0], -1))
        torch.bmm(scores_grad.transpose(1, 2), part.rows_of("queries", part.query, chunk), out=copies)
        totals[1].index_add_(0, chunk.entries, copies.view(chunk.entries.shape[0], -1))
        part.write_product(totals[0], chunk, scores_grad, keys, part.scale)
    _add_global_gradients(part, global_grads, totals, dropout, generator)
    for target, total in zip(grads, totals, strict=True):
        blocks.from_places(target[part.where], total, examples)


def _add_global_gradients(
    part: _Part, grads: list[Tensor], totals: list[Tensor], dropout: DropoutReplay, generator: torch.Generator
) -> None:
    """Add the share of the rows that attend everything, whose gradients are `[heads, rows, d]` an example."""
    done = [0] * len(grads)
    for example, rows in part.global_chunks(CHUNK_BYTES * torch.get_num_threads()):
        above = grads[example][:, done[example] : done[example] + rows.shape[0]]
        done[example] += rows.shape[0]
        query_total, key_total, value_total = (part.by_example(total, example) for total in totals)
        probs = part.global_probs(example, rows)
        values = part.by_example(part.value, example)
        used, scores_grad = part.through_softmax(probs, above, values, dropout, generator)
        value_total.baddbmm_(used.transpose(1, 2), above)
        key_total.baddbmm_(scores_grad.transpose(1, 2), part.by_example(part.query, example)[:, rows])
        query_total[:, rows] = torch.bmm(scores_grad, part.by_example(part.key, example)).mul_(part.scale)


class _BlockAttention(torch.autograd.Function):
    """Blocks over lists of blocks, with dropout of the probabilities."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        query, key, value, lists, layout, global_rows, scale, dropout = args
        batch, heads, length, width = query.shape
        result = query.new_empty(batch, length, heads, width).transpose(1, 2)
        generator = dropout.generator()
        with torch.autocast("cpu", enabled=False):
            step, parts = _parts(query, key, value, lists, layout, global_rows, scale)
            for part in parts:
                mixed = part.take("mixed", *part.key.shape)
                for chunk in part.chunks(step):
                    probs, _ = part.probs(chunk)
                    if dropout.p > 0.0:
                        probs.mul_(dropout.kept(probs, part.blocks.scratch, generator))
                    values = part.of("values", part.value, chunk.entries, chunk.entries.shape[0] // probs.shape[0])
                    part.write_product(mixed, chunk, probs, values, 1.0 / dropout.keep_share)
                for example, rows in part.global_chunks(CHUNK_BYTES * torch.get_num_threads()):
                    probs = part.global_probs(example, rows)
                    if dropout.p > 0.0:
                        probs.mul_(dropout.kept(probs, part.blocks.scratch, generator))
                    all_mixed = torch.bmm(probs, part.by_example(part.value, example)).div_(dropout.keep_share)
                    part.by_example(mixed, example)[:, rows] = all_mixed
                part.blocks.from_places(result[part.where], mixed, part.where[0])
        ctx.save_for_backward(query, key, value, lists, *layout[2:6], *global_rows)
        ctx.options = (layout.size, layout.global_blocks, layout.is_plain, scale, dropout)
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, lists, source, used, place, text_blocks, *global_rows = ctx.saved_tensors
        size, global_blocks, is_plain, scale, dropout = ctx.options
        layout = BlockLayout(size, global_blocks, source, used, place, text_blocks, is_plain)
        grads = [torch.empty_like(x) for x in (query, key, value)]
        generator = dropout.generator()
        with torch.autocast("cpu", enabled=False):
            step, parts = _parts(query, key, value, lists, layout, global_rows, scale)
            for part in parts:
                _write_gradients(part, grad, grads, step, dropout, generator)
        return (*grads, None, None, None, None, None)
