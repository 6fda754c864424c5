"""Sliding-window attention on a CPU: windows as overlapping views, and a backward pass that computes them again.

The same function as the gathered form in `sliding_window.py`, for dilation 1 and eager mode. Keys and values are never
expanded and no probabilities are kept: backward replays scores and dropout from the inputs and a seed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import masked_bias
from .tokens import TokenSlots, gather_tokens
from .window import Window, keys_in_windows, seen_global_keys


# Scores in memory at a time, for each thread. Small enough for a core's own cache, where the passes over them are
# several times quicker than in main memory; large enough that calling torch costs little beside the work.
_CHUNK_BYTES = 2**20


def blocked_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    window: Window,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """See `sliding_window_attention`; rows of padding are unspecified."""
    options = _Options(
        window,
        query.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p,
        int(torch.randint(2**62, (), device="cpu")) if dropout_p > 0.0 else 0,
    )
    global_key = global_value = None
    if global_tokens is not None and global_tokens.slots > 0:
        global_key, global_value = (gather_tokens(x, global_tokens.index) for x in (key, value))
    else:
        global_tokens = None
    counted = keys_in_windows(key_padding_mask, global_tokens)
    return _WindowAttention.apply(query, key, value, global_key, global_value, counted, global_tokens, options)


class _Options(NamedTuple):
    """What a call has besides tensors."""

    window: Window
    scale: float
    dropout_p: float
    seed: int

    @property
    def drop_level(self) -> int:
        """Signed 16-bit numbers below this are dropped: a share of `dropout_p`, at most all but one of 65,536."""
        return min(round(self.dropout_p * 2**16), 2**16 - 1) - 2**15

    @property
    def keep_share(self) -> float:
        """The share that dropout keeps, at the 16 bits it is drawn with; never 0, for it divides."""
        return (2**15 - self.drop_level) / 2**16

    def kept(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Which entries dropout keeps, 1.0 or 0.0; 16 random bits an entry, several times quicker than `bernoulli_`."""
        count = like.numel()
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu")
        words.random_(-(2**63), None, generator=generator)
        # Straight into floats: comparing to bool and masking is several times slower.
        return torch.ge(words.view(torch.int16)[:count].view(like.shape), self.drop_level, out=torch.empty_like(like))


class _Blocks:
    """The blocks of one length: `count` blocks of `size` queries, each with the `span` keys around it.

    "Rows" below are the tokens of all heads behind one another, each head filled up to whole blocks, with the keys
    that the first and last block look back and ahead to around them.
    """

    def __init__(self, length: int, window: Window) -> None:
        # Small blocks waste few keys; below 32 queries matrix products get slow. A short input needs neither long
        # blocks nor a window longer than itself.
        self.length = length
        self.window = Window(min(window.radius, length - 1), window.causal)
        self.size = min(64, max(32, window.radius), length)
        self.count = (length + self.size - 1) // self.size
        self.span = self.size + self.window.width
        self.padded = self.count * self.size

    def blocks(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """`[examples, heads, length, d]` -> contiguous `[examples * heads * count, size, d]`, zeros at the end."""
        *outer, _, width = tensor.shape
        padded = torch.empty(*outer, self.padded, width, dtype=dtype, device="cpu")
        padded[:, :, : self.length] = tensor
        padded[:, :, self.length :] = 0.0
        return padded.view(-1, self.size, width)

    def rows(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """`[examples, heads, length, d]` -> rows `[examples * heads * padded + width, d]`, zeros around."""
        *outer, _, width = tensor.shape
        rows = self.empty_rows(outer[0] * outer[1], width, dtype)
        inner = self.inner(rows).view(*outer, self.padded, width)
        inner[:, :, : self.length] = tensor
        return rows

    def empty_rows(self, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """Rows of zeros."""
        return torch.zeros(heads * self.padded + self.window.width, width, dtype=dtype, device="cpu")

    def inner(self, rows: Tensor) -> Tensor:
        """The rows of tokens, without what is around them: a view."""
        return rows[self.window.back : rows.shape[0] - self.window.ahead]

    def windows(self, rows: Tensor, blocks: slice, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys `start` to `stop` of the windows of some blocks: overlapping views `[blocks, stop - start, d]`."""
        stop = self.span if stop is None else stop
        width = rows.shape[-1]
        return rows.as_strided(
            (blocks.stop - blocks.start, stop - start, width),
            (self.size * width, width, 1),
            (blocks.start * self.size + start) * width,
        )

    def add_windows_(self, rows: Tensor, blocks: slice, windows: Tensor) -> None:
        """Add windows `[blocks, span, d]` to the rows they view."""
        # Pieces of at most one block do not overlap each other.
        for start in range(0, self.span, self.size):
            stop = min(start + self.size, self.span)
            self.windows(rows, blocks, start, stop).add_(windows[:, start:stop])

    def bias(self, counted: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Additive mask of the windows, `[examples, count, size, span]`; `counted` is `[examples, length]` bool."""
        examples = 1 if counted is None else counted.shape[0]
        usable = torch.zeros(examples, self.padded + self.window.width, dtype=torch.bool, device="cpu")
        usable[:, self.window.back : self.window.back + self.length] = True if counted is None else counted
        usable = usable.unfold(1, self.span, self.size)[:, :, None, :]
        return masked_bias(usable & self.window.band(self.size, usable.device), dtype)

    def global_bias(self, global_tokens: TokenSlots, dtype: torch.dtype) -> Tensor:
        """Additive mask of the global keys, `[examples, count, size, slots]`."""
        position = torch.arange(self.padded, device="cpu").view(self.count, self.size)
        seen = seen_global_keys(global_tokens, self.window.causal, position)
        return masked_bias(seen, dtype).expand(-1, self.count, self.size, -1)


class _Saved(NamedTuple):
    """What forward and backward both read."""

    query: Tensor
    key: Tensor
    value: Tensor
    global_key: Tensor | None
    global_value: Tensor | None
    counted: Tensor | None
    global_tokens: TokenSlots | None

    @property
    def dtype(self) -> torch.dtype:
        """The one to compute in."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def slots(self) -> int:
        """Global keys an example."""
        return 0 if self.global_key is None else self.global_key.shape[2]


class _Part:
    """Some heads of some examples, in blocks; `bias` and `global_bias` are those of the examples."""

    def __init__(
        self,
        shape: _Blocks,
        saved: _Saved,
        where: tuple[slice, slice],
        scale: float,
        biases: tuple[Tensor, Tensor | None],
    ) -> None:
        self.shape, self.where, self.scale = shape, where, scale
        self.bias, self.global_bias = biases
        self.outer = saved.query[where].shape[:2]
        self.query = shape.blocks(saved.query[where], saved.dtype).mul_(scale)
        self.key_rows, self.value_rows = (shape.rows(x[where], saved.dtype) for x in (saved.key, saved.value))
        self.slots = saved.slots
        self.global_key = self.global_value = None
        if self.slots > 0:
            self.global_key, self.global_value = (
                x[where].flatten(0, 1).to(saved.dtype) for x in (saved.global_key, saved.global_value)
            )

    def chunks(self, step: int) -> Iterator[slice]:
        """Ranges of at most `step` of the part's blocks, or all of them if it has more than one head."""
        blocks = self.query.shape[0]
        step = blocks if blocks > self.shape.count else step
        for start in range(0, blocks, step):
            yield slice(start, min(start + step, blocks))

    def by_head(self, blocks: Tensor) -> Tensor:
        """`[blocks, size, d]` -> `[heads, blocks a head * size, d]`, a view."""
        return blocks.reshape(self.outer.numel(), -1, blocks.shape[-1])

    def products(self, left: Tensor, rows: Tensor, global_rows: Tensor | None, blocks: slice) -> Tensor:
        """`left` `[blocks, size, d]` times windows and global rows, `[blocks, size, span + slots]`."""
        span = self.shape.span
        both = left.new_empty(*left.shape[:2], span + self.slots)
        torch.bmm(left, self.shape.windows(rows, blocks).transpose(1, 2), out=both[:, :, :span])
        if self.slots > 0:
            torch.bmm(self.by_head(left), global_rows.transpose(1, 2), out=self.by_head(both)[:, :, span:])
        return both

    def probs(self, blocks: slice) -> Tensor:
        """Probabilities of windows and global keys together, `[blocks, size, span + slots]`."""
        span = self.shape.span
        scores = self.products(self.query[blocks], self.key_rows, self.global_key, blocks)
        split = scores.view(*self.outer, -1, *scores.shape[1:])
        split[..., :span] += self.bias[:, None, blocks]
        if self.slots > 0:
            split[..., span:] += self.global_bias[:, None, blocks]
        return scores.softmax(dim=-1)

    def mix(self, weights: Tensor, rows: Tensor, global_rows: Tensor | None, blocks: slice) -> Tensor:
        """`weights` `[blocks, size, span + slots]` times windows and global rows, `[blocks, size, d]`."""
        span = self.shape.span
        mixed = torch.bmm(weights[:, :, :span], self.shape.windows(rows, blocks))
        if self.slots > 0:
            self.by_head(mixed).baddbmm_(self.by_head(weights)[:, :, span:], global_rows)
        return mixed

    def result_rows(self, blocks: slice) -> slice:
        """The tokens that some blocks of one head, or all blocks of several, are about."""
        if self.query.shape[0] > self.shape.count:
            return slice(0, self.shape.length)
        return slice(blocks.start * self.shape.size, min(blocks.stop * self.shape.size, self.shape.length))

    def write(self, target: Tensor, mixed: Tensor, blocks: slice) -> None:
        """Put `[blocks, size, d]` into `target` `[batch, heads, length, d]`."""
        rows = self.result_rows(blocks)
        mixed = mixed.view(*self.outer, -1, mixed.shape[-1])
        target[self.where][:, :, rows] = mixed[:, :, : rows.stop - rows.start].to(target.dtype)


def _parts(shape: _Blocks, saved: _Saved, scale: float, chunk_bytes: int) -> tuple[int, Iterator[_Part]]:
    """Blocks at a time, and the parts: as many heads, and examples, as one chunk holds, at least one head."""
    batch, heads = saved.query.shape[:2]
    block_bytes = shape.size * (shape.span + saved.slots) * saved.dtype.itemsize
    at_once = max(1, chunk_bytes // block_bytes)
    head_step = max(1, min(heads, at_once // shape.count))
    batch_step = max(1, min(batch, at_once // (shape.count * heads)))

    def parts() -> Iterator[_Part]:
        bias, global_bias = shape.bias(None, saved.dtype) if saved.counted is None else None, None
        for start in range(0, batch, batch_step):
            examples = slice(start, min(start + batch_step, batch))
            if saved.counted is not None:
                bias = shape.bias(saved.counted[examples], saved.dtype)
            if saved.global_tokens is not None:
                tokens = TokenSlots(*(x[examples] for x in saved.global_tokens))
                global_bias = shape.global_bias(tokens, saved.dtype)
            for head in range(0, heads, head_step):
                where = (examples, slice(head, min(head + head_step, heads)))
                yield _Part(shape, saved, where, scale, (bias, global_bias))

    return at_once, parts()


def _add_gradients(
    part: _Part, grad: Tensor, grads: list[Tensor | None], step: int, options: _Options, generator: torch.Generator
) -> None:
    """Write the part's share of the gradients of query, key, value, global key and global value."""
    shape, where, dtype = part.shape, part.where, part.query.dtype
    heads, width = part.outer.numel(), part.query.shape[-1]
    key_grad, value_grad = (shape.empty_rows(heads, width, dtype) for _ in range(2))
    if part.slots > 0:
        global_key_grad, global_value_grad = torch.zeros_like(part.global_key), torch.zeros_like(part.global_value)
    result_grad = shape.blocks(grad[where], dtype).div_(options.keep_share)
    for blocks in part.chunks(step):
        query, above = part.query[blocks], result_grad[blocks]
        probs = part.probs(blocks)
        probs_grad = part.products(above, part.value_rows, part.global_value, blocks)
        used = probs
        if options.dropout_p > 0.0:
            kept = options.kept(probs, generator)
            probs_grad.mul_(kept)
            used = kept.mul_(probs)
        scores_grad = torch.ops.aten._softmax_backward_data(probs_grad, probs, -1, dtype)
        for rows, weights, left in ((value_grad, used, above), (key_grad, scores_grad, query)):
            shape.add_windows_(rows, blocks, torch.bmm(weights[:, :, : shape.span].transpose(1, 2), left))
        if part.slots > 0:
            for total, weights, left in (
                (global_value_grad, used, above),
                (global_key_grad, scores_grad, query),
            ):
                extra = part.by_head(weights)[:, :, shape.span :]
                total.baddbmm_(extra.transpose(1, 2), part.by_head(left))
        query_grad = part.mix(scores_grad, part.key_rows, part.global_key, blocks).mul_(part.scale)
        part.write(grads[0], query_grad, blocks)
    for target, rows in ((grads[1], key_grad), (grads[2], value_grad)):
        tokens = shape.inner(rows).view(*part.outer, shape.padded, width)
        target[where] = tokens[:, :, : shape.length].to(target.dtype)
    if part.slots > 0:
        for target, total in ((grads[3], global_key_grad), (grads[4], global_value_grad)):
            target[where] = total.view(*part.outer, -1, width).to(target.dtype)


class _WindowAttention(torch.autograd.Function):
    """Window and global keys in one softmax, with dropout of the probabilities."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        saved, options = _Saved(*args[:-1]), args[-1]
        batch, heads, length, width = saved.query.shape
        shape = _Blocks(length, options.window)
        chunk_bytes = _CHUNK_BYTES * torch.get_num_threads()
        result = saved.query.new_empty(batch, length, heads, width).transpose(1, 2)
        generator = torch.Generator().manual_seed(options.seed)
        with torch.autocast("cpu", enabled=False):
            step, parts = _parts(shape, saved, options.scale, chunk_bytes)
            for part in parts:
                for blocks in part.chunks(step):
                    probs = part.probs(blocks)
                    if options.dropout_p > 0.0:
                        probs.mul_(options.kept(probs, generator))
                    mixed = part.mix(probs, part.value_rows, part.global_value, blocks)
                    part.write(result, mixed.div_(options.keep_share), blocks)
        ctx.save_for_backward(*saved[:6], *(saved.global_tokens or ()))
        ctx.options = (options, chunk_bytes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        saved = _Saved(*tensors[:6], TokenSlots(*tensors[6:]) if len(tensors) > 6 else None)
        options, chunk_bytes = ctx.options
        shape = _Blocks(saved.query.shape[2], options.window)
        grads = [None if x is None else torch.empty_like(x) for x in saved[:5]]
        generator = torch.Generator().manual_seed(options.seed)
        with torch.autocast("cpu", enabled=False):
            step, parts = _parts(shape, saved, options.scale, chunk_bytes)
            for part in parts:
                _add_gradients(part, grad, grads, step, options, generator)
        return (*grads, None, None, None)
