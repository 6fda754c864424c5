"""Sliding-window attention on a CPU: windows as overlapping views, and a backward pass that computes them again.

The same function as the gathered form in `sliding_window.py`, for dilation 1 and eager mode. Keys and values are never
expanded and no probabilities are kept: backward replays scores and dropout from the inputs and a seed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import CHUNK_BYTES, DropoutReplay, draw_replay, first_derivatives
from .tokens import TokenSlots, gather_tokens
from .window import Window, keys_in_windows
from .window_blocks import WindowBias, WindowBlocks


def cpu_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    window: Window,
    scale: float | None,
    dropout_p: float,
    overwrite: bool,
) -> Tensor:
    """See `sliding_window_attention`; rows of padding are unspecified."""
    options = _Options(
        window,
        query.shape[-1] ** -0.5 if scale is None else scale,
        draw_replay(dropout_p),
    )
    if global_tokens is not None and global_tokens.slots == 0:
        global_tokens = None
    counted = keys_in_windows(key_padding_mask, global_tokens)
    if overwrite:
        # Each part reads its queries before it writes its rows.
        saved = _Saved(query, key, value, counted, global_tokens)
        _attend(saved, options, CHUNK_BYTES * torch.get_num_threads(), query)
        return query
    return _WindowAttention.apply(query, key, value, counted, global_tokens, options)


class _Options(NamedTuple):
    """What a call has besides tensors."""

    window: Window
    scale: float
    dropout: DropoutReplay


class _Saved(NamedTuple):
    """What forward and backward both read."""

    query: Tensor
    key: Tensor
    value: Tensor
    counted: Tensor | None
    global_tokens: TokenSlots | None

    @property
    def dtype(self) -> torch.dtype:
        """The one to compute in."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def slots(self) -> int:
        """Global keys an example."""
        return 0 if self.global_tokens is None else self.global_tokens.slots


class _Part:
    """Some heads of some examples, in blocks; `bias` is that of the examples."""

    def __init__(
        self, shape: WindowBlocks, saved: _Saved, where: tuple[slice, slice], scale: float, bias: WindowBias
    ) -> None:
        self.shape, self.where, self.scale, self.bias = shape, where, scale, bias
        self.outer = saved.query[where].shape[:2]
        self.query = shape.blocks("query", saved.query[where]).mul_(scale)
        self.key_rows = shape.rows("key", saved.key[where])
        self.value_rows = shape.rows("value", saved.value[where])
        self.slots = saved.slots
        self.global_key = self.global_value = None
        if self.slots > 0:
            self.global_index = saved.global_tokens.index[where[0]]
            self.global_key, self.global_value = (
                gather_tokens(x[where], self.global_index).flatten(0, 1).to(saved.dtype)
                for x in (saved.key, saved.value)
            )

    def chunks(self, step: int) -> Iterator[slice]:
        """Ranges of at most `step` blocks of a head, or all of them if there is more than one head."""
        step = step if self.outer.numel() == 1 else self.shape.count
        for start in range(0, self.shape.count, step):
            yield slice(start, min(start + step, self.shape.count))

    def of(self, blocks: slice, tensor: Tensor) -> Tensor:
        """Those blocks of `[heads * count, size, d]`."""
        return tensor[blocks] if self.outer.numel() == 1 else tensor

    def by_head(self, blocks: Tensor) -> Tensor:
        """`[blocks, size, d]` -> `[heads, blocks a head * size, d]`, a view."""
        return blocks.view(self.outer.numel(), -1, blocks.shape[-1])

    def products(self, name: str, left: Tensor, windows: Tensor, global_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """`left` `[blocks, size, d]` times windows `[blocks, span, d]` and global rows.

        Returns:
            The products with the windows, `[blocks, size, span]`, and room for all, `[blocks, size, span + slots]`, in
            which those with the global rows stand. Without global rows both are the same memory.
        """
        shape, span = self.shape, self.shape.span
        # Not straight into the room: torch takes a detour to write a product into memory with gaps.
        local = shape.take(f"{name} of windows", *left.shape[:2], span)
        torch.bmm(left, windows.transpose(1, 2), out=local)
        if self.slots == 0:
            return local, local
        both = shape.take(name, *left.shape[:2], span + self.slots)
        self.by_head(both)[:, :, span:] = torch.bmm(self.by_head(left), global_rows.transpose(1, 2))
        return local, both

    def probs(self, blocks: slice) -> Tensor:
        """Probabilities of windows and global keys together, `[blocks, size, span + slots]`."""
        span = self.shape.span
        query, keys = self.of(blocks, self.query), self.shape.windows("keys", self.key_rows, blocks)
        local, scores = self.products("scores", query, keys, self.global_key)
        split = scores.view(*self.outer, -1, *scores.shape[1:])
        torch.add(local.view(*self.outer, -1, *local.shape[1:]), self.bias.band, out=split[..., :span])
        if any(self.bias.has_keys[blocks]):
            split[..., :span] += self.bias.keys[:, None, blocks]
        if self.slots > 0:
            split[..., span:] += self.bias.extra[:, None, blocks]
        return torch.ops.aten._softmax.out(scores, -1, False, out=self.shape.take("probs", *scores.shape))

    def mix(self, weights: Tensor, windows: Tensor, global_rows: Tensor | None) -> Tensor:
        """`weights` `[blocks, size, span + slots]` times windows and global rows, `[blocks, size, d]`."""
        span = self.shape.span
        mixed = self.shape.take("mixed", *weights.shape[:2], windows.shape[2])
        torch.bmm(weights[:, :, :span], windows, out=mixed)
        if self.slots > 0:
            self.by_head(mixed).baddbmm_(self.by_head(weights)[:, :, span:], global_rows)
        return mixed

    def add_adjoint_(
        self, rows: Tensor, global_rows: Tensor | None, weights: Tensor, left: Tensor, blocks: slice
    ) -> None:
        """Add the transpose of `weights` times `left` to the rows and global rows they came from."""
        span = self.shape.span
        windows = self.shape.take("gradient of windows", weights.shape[0], span, left.shape[-1])
        self.shape.add_windows_(rows, blocks, torch.bmm(weights[:, :, :span].transpose(1, 2), left, out=windows))
        if self.slots > 0:
            global_rows.baddbmm_(self.by_head(weights)[:, :, span:].transpose(1, 2), self.by_head(left))

    def write(self, target: Tensor, mixed: Tensor, blocks: slice) -> None:
        """Put `[blocks, size, d]` into `target` `[batch, heads, length, d]`."""
        shape, mixed = self.shape, mixed.view(*self.outer, -1, mixed.shape[-1])
        start, stop = blocks.start * shape.size, min(blocks.stop * shape.size, shape.length)
        target[self.where][:, :, start:stop] = mixed[:, :, : stop - start]

    def write_rows(self, target: Tensor, rows: Tensor, global_rows: Tensor | None) -> None:
        """Put rows of tokens, and what global ones have besides, into `target` `[batch, heads, length, d]`."""
        tokens = self.shape.inner(rows).unflatten(0, tuple(self.outer))
        if global_rows is not None:
            index = self.global_index[:, None, :, None].expand(*self.outer, -1, rows.shape[-1])
            tokens.scatter_add_(2, index, global_rows.view(index.shape))
        target[self.where] = tokens[:, :, : self.shape.length]


def _parts(shape: WindowBlocks, saved: _Saved, scale: float, chunk_bytes: int) -> tuple[int, Iterator[_Part]]:
    """Blocks at a time, and the parts: as many heads, and examples, as one chunk holds, at least one head."""
    batch, heads = saved.query.shape[:2]
    block_bytes = shape.size * (shape.span + saved.slots) * shape.dtype.itemsize
    at_once = max(1, chunk_bytes // block_bytes)
    head_step = max(1, min(heads, at_once // shape.count))
    batch_step = max(1, min(batch, at_once // (shape.count * heads)))

    def parts() -> Iterator[_Part]:
        bias = None
        for start in range(0, batch, batch_step):
            examples = slice(start, min(start + batch_step, batch))
            if bias is None or saved.counted is not None:
                tokens = saved.global_tokens and TokenSlots(*(x[examples] for x in saved.global_tokens))
                bias = shape.bias(None if saved.counted is None else saved.counted[examples], tokens)
            for head in range(0, heads, head_step):
                where = (examples, slice(head, min(head + head_step, heads)))
                yield _Part(shape, saved, where, scale, bias)

    return at_once, parts()


def _attend(saved: _Saved, options: _Options, chunk_bytes: int, result: Tensor) -> None:
    """Write what the queries get into `result`, which may be their own memory."""
    shape = WindowBlocks(saved.query.shape[2], options.window, saved.dtype)
    generator = options.dropout.generator()
    with torch.autocast("cpu", enabled=False):
        step, parts = _parts(shape, saved, options.scale, chunk_bytes)
        for part in parts:
            for blocks in part.chunks(step):
                probs = part.probs(blocks)
                if options.dropout.p > 0.0:
                    probs.mul_(options.dropout.kept(probs, shape.scratch, generator))
                mixed = part.mix(probs, shape.windows("values", part.value_rows, blocks), part.global_value)
                part.write(result, mixed.div_(options.dropout.keep_share), blocks)


def _write_gradients(
    part: _Part, grad: Tensor, grads: list[Tensor], step: int, options: _Options, generator: torch.Generator
) -> None:
    """Write the part's share of the gradients of query, key and value."""
    shape = part.shape
    key_grad, value_grad = (
        shape.zero_rows(name, part.outer.numel(), part.query.shape[-1]) for name in ("key_grad", "value_grad")
    )
    global_key_grad = global_value_grad = None
    if part.slots > 0:
        global_key_grad, global_value_grad = torch.zeros_like(part.global_key), torch.zeros_like(part.global_value)
    result_grad = shape.blocks("result_grad", grad[part.where]).div_(options.dropout.keep_share)
    for blocks in part.chunks(step):
        above, query = part.of(blocks, result_grad), part.of(blocks, part.query)
        probs = part.probs(blocks)
        values = shape.windows("values", part.value_rows, blocks)
        local, probs_grad = part.products("probs_grad", above, values, part.global_value)
        used = probs
        if options.dropout.p > 0.0:
            kept = options.dropout.kept(probs, shape.scratch, generator)
            torch.mul(local, kept[:, :, : shape.span], out=probs_grad[:, :, : shape.span])
            probs_grad[:, :, shape.span :] *= kept[:, :, shape.span :]
            used = kept.mul_(probs)
        elif part.slots > 0:
            probs_grad[:, :, : shape.span] = local
        part.add_adjoint_(value_grad, global_value_grad, used, above, blocks)
        scores_grad = shape.take("scores_grad", *probs.shape)
        torch.ops.aten._softmax_backward_data.out(probs_grad, probs, -1, shape.dtype, grad_input=scores_grad)
        part.add_adjoint_(key_grad, global_key_grad, scores_grad, query, blocks)
        query_grad = part.mix(scores_grad, shape.windows("keys", part.key_rows, blocks), part.global_key)
        part.write(grads[0], query_grad.mul_(part.scale), blocks)
    part.write_rows(grads[1], key_grad, global_key_grad)
    part.write_rows(grads[2], value_grad, global_value_grad)


class _WindowAttention(torch.autograd.Function):
    """Window and global keys in one softmax, with dropout of the probabilities."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        saved, options = _Saved(*args[:-1]), args[-1]
        batch, heads, length, width = saved.query.shape
        chunk_bytes = CHUNK_BYTES * torch.get_num_threads()
        result = saved.query.new_empty(batch, length, heads, width).transpose(1, 2)
        _attend(saved, options, chunk_bytes, result)
        ctx.save_for_backward(*saved[:4], *(saved.global_tokens or ()))
        ctx.options = (options, chunk_bytes)
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved = _Saved(*tensors[:4], TokenSlots(*tensors[4:]) if len(tensors) > 4 else None)
        options, chunk_bytes = ctx.options
        shape = WindowBlocks(saved.query.shape[2], options.window, saved.dtype)
        grads = [torch.empty_like(x) for x in saved[:3]]
        generator = options.dropout.generator()
        with torch.autocast("cpu", enabled=False):
            step, parts = _parts(shape, saved, options.scale, chunk_bytes)
            for part in parts:
                _write_gradients(part, grad, grads, step, options, generator)
        return (*grads, None, None, None)
