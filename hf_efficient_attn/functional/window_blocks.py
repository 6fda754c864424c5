"""Sliding-window attention on a CPU: windows as overlapping views, and a backward pass that computes them again.

The same function as the gathered form in `sliding_window.py`, for dilation 1 and eager mode. Keys and values are never
expanded and no probabilities are kept: backward replays scores and dropout from the log-sum-exp of each row and a seed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import masked_bias
from .tokens import TokenSlots, gather_tokens


# Not a public name of torch, so its absence is no error: the plain products do the same.
_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

# Scores in memory at a time: enough for large matrix products, little beside a layer's activations.
_CHUNK_BYTES = 48 * 2**20


def blocked_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    radius: int,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """See `sliding_window_attention`; rows of padding are unspecified."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    local_mask, slots_valid, global_key, global_value = key_padding_mask, None, None, None
    if global_tokens is not None and global_tokens.slots > 0:
        # A global key stands in a column of its own, so its place in the window must not count it again.
        local_mask = ~global_tokens.mask if key_padding_mask is None else key_padding_mask & ~global_tokens.mask
        slots_valid = global_tokens.valid
        global_key, global_value = (gather_tokens(x, global_tokens.index) for x in (key, value))
    seed = int(torch.randint(2**62, (), device="cpu")) if dropout_p > 0.0 else 0
    return _WindowAttention.apply(
        query, key, value, global_key, global_value, local_mask, slots_valid, radius, scale, dropout_p, seed
    )


class _Windows:
    """The blocks of one length: `count` blocks of `size` queries, each with the `span` keys around it."""

    def __init__(self, length: int, radius: int) -> None:
        # A short input needs neither long blocks nor a window longer than itself.
        self.length, self.radius = length, min(radius, length - 1)
        self.size = min(128, max(32, radius), length)
        self.count = (length + self.size - 1) // self.size
        self.span = self.size + 2 * self.radius
        self.padded = self.count * self.size

    def blocks(self, tensor: Tensor) -> Tensor:
        """`[heads, length, d]` -> contiguous `[heads * count, size, d]`, zeros at the end."""
        heads, _, width = tensor.shape
        padded = tensor.new_zeros(heads, self.padded, width)
        padded[:, : self.length] = tensor
        return padded.view(heads * self.count, self.size, width)

    def unblock(self, tensor: Tensor) -> Tensor:
        """`[heads * count, size, d]` -> `[heads, length, d]`, a view."""
        return tensor.view(-1, self.padded, tensor.shape[-1])[:, : self.length]

    def buffer(self, tensor: Tensor) -> Tensor:
        """`[heads, length, d]` -> rows of all heads behind one another with `radius` zeros around, `[rows, d]`.

        The last window of a head runs into the next head's keys, which the bias hides.
        """
        heads, _, width = tensor.shape
        rows = tensor.new_zeros(heads * self.padded + 2 * self.radius, width)
        rows[self.radius : self.radius + heads * self.padded].view(heads, self.padded, width)[:, : self.length] = tensor
        return rows

    def views(self, rows: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys `start` to `stop` of every window of a buffer: overlapping views `[heads * count, stop - start, d]`."""
        stop = self.span if stop is None else stop
        width = rows.shape[-1]
        windows = (rows.shape[0] - 2 * self.radius) // self.size
        return rows.as_strided((windows, stop - start, width), (self.size * width, width, 1), start * width)

    def overlap_add(self, windows: Tensor) -> Tensor:
        """Adjoint of `views(buffer(x))`: `[heads * count, span, d]` -> `[heads, length, d]`."""
        width = windows.shape[-1]
        rows = windows.new_zeros(windows.shape[0] * self.size + 2 * self.radius, width)
        # Pieces of at most one block do not overlap each other.
        for start in range(0, self.span, self.size):
            stop = min(start + self.size, self.span)
            self.views(rows, start, stop).add_(windows[:, start:stop])
        return self.unblock(rows[self.radius : rows.shape[0] - self.radius])

    def repeat(self, tensor: Tensor) -> Tensor:
        """`[heads, slots, d]` -> `[heads * count, slots, d]`: the same for every block."""
        return tensor[:, None].expand(-1, self.count, -1, -1).flatten(0, 1)

    def sum_blocks(self, tensor: Tensor) -> Tensor:
        """Adjoint of `repeat`."""
        return tensor.unflatten(0, (-1, self.count)).sum(dim=1)

    def bias(self, local_mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask of one example, `[count, size, span]`; `local_mask` is `[length]` bool."""
        usable = torch.zeros(self.padded + 2 * self.radius, dtype=torch.bool, device=device)
        usable[self.radius : self.radius + self.length] = True if local_mask is None else local_mask
        offset = torch.arange(self.span, device=device)[None, :] - torch.arange(self.size, device=device)[:, None]
        in_window = (offset >= 0) & (offset <= 2 * self.radius)
        return masked_bias(usable.unfold(0, self.span, self.size)[:, None, :] & in_window, dtype)


class _Scores(NamedTuple):
    """Scores of some heads in blocks, `[heads * count, size, span]`, and those of global keys, `[..., slots]`."""

    local: Tensor
    extra: Tensor | None

    def minus_exp_(self, row: Tensor) -> "_Scores":
        """`exp(scores - row)`, in place; `row` is `[heads * count, size, 1]`."""
        for part in self.parts():
            part.sub_(row).exp_()
        return self

    def parts(self) -> list[Tensor]:
        return [self.local] if self.extra is None else [self.local, self.extra]


class _Heads:
    """Some heads of one example, in blocks."""

    def __init__(self, windows: _Windows, saved: "_Saved", example: int, heads: slice, scale: float) -> None:
        def pick(tensor: Tensor) -> Tensor:
            return tensor[example, heads].to(saved.compute_dtype)

        self.windows = windows
        self.query = windows.blocks(pick(saved.query)) * scale
        self.key_rows, self.value_rows = windows.buffer(pick(saved.key)), windows.buffer(pick(saved.value))
        self.global_key = self.global_value = self.global_bias = None
        if saved.global_key is not None:
            self.global_key, self.global_value = (
                windows.repeat(pick(x)) for x in (saved.global_key, saved.global_value)
            )
            self.global_bias = masked_bias(saved.slots_valid[example], saved.compute_dtype)

    def scores(self, bias: Tensor) -> _Scores:
        """Masked, scaled scores."""
        local = torch.bmm(self.query, self.windows.views(self.key_rows).transpose(1, 2))
        local.unflatten(0, (-1, self.windows.count)).add_(bias)
        if self.global_key is None:
            return _Scores(local, None)
        return _Scores(local, torch.bmm(self.query, self.global_key.transpose(1, 2)).add_(self.global_bias))

    def attend(self, bias: Tensor, dropout_p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The result `[heads * count, size, d]` and the log-sum-exp of the scores `[heads * count, size, 1]`."""
        scores = self.scores(bias)
        top = torch.stack([x.amax(dim=-1, keepdim=True) for x in scores.parts()]).amax(dim=0)
        scores.minus_exp_(top)
        total = sum(x.sum(dim=-1, keepdim=True) for x in scores.parts())
        mixed = None
        for probs, values in zip(scores.parts(), self.values(), strict=True):
            if dropout_p > 0.0:
                probs.masked_fill_(_dropped(probs.shape, dropout_p, generator), 0.0)
            mixed = torch.bmm(probs, values) if mixed is None else mixed.baddbmm_(probs, values)
        return mixed.div_(total * _keep_share(dropout_p)), top.add_(total.log_())

    def attend_fused(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same without dropout, the windows through torch's fused kernel and the global keys joined to them."""
        split = (-1, self.windows.count)
        query, key, value = (
            x.unflatten(0, split)
            for x in (self.query, self.windows.views(self.key_rows), self.windows.views(self.value_rows))
        )
        mixed, total = _FUSED(query, key, value, attn_mask=bias[None], scale=1.0)
        mixed, total = mixed.flatten(0, 1), total.flatten(0, 1)[:, :, None].to(mixed.dtype)
        if self.global_key is None:
            return mixed, total
        extra = torch.bmm(self.query, self.global_key.transpose(1, 2)).add_(self.global_bias)
        joined = torch.logaddexp(total, extra.logsumexp(dim=-1, keepdim=True))
        mixed = mixed * (total - joined).exp_()
        return mixed.baddbmm_(extra.sub_(joined).exp_(), self.global_value), joined

    def values(self) -> list[Tensor]:
        """Values of the windows and of the global keys, in the order of `_Scores.parts`."""
        local = self.windows.views(self.value_rows)
        return [local] if self.global_value is None else [local, self.global_value]

    def keys(self) -> list[Tensor]:
        """Keys, likewise."""
        local = self.windows.views(self.key_rows)
        return [local] if self.global_key is None else [local, self.global_key]


class _Saved(NamedTuple):
    """What forward and backward both read."""

    query: Tensor
    key: Tensor
    value: Tensor
    global_key: Tensor | None
    global_value: Tensor | None
    local_mask: Tensor | None
    slots_valid: Tensor | None

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.promote_types(self.query.dtype, torch.float32)


def _drop_level(dropout_p: float) -> int:
    """Signed 16-bit numbers below this are dropped: a share of `dropout_p`, at most all but one of 65,536."""
    return min(round(dropout_p * 2**16), 2**16 - 1) - 2**15


def _dropped(shape: torch.Size, dropout_p: float, generator: torch.Generator) -> Tensor:
    """Which entries dropout removes, bool; 16 random bits an entry, several times quicker than `bernoulli_`."""
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None, generator=generator)
    return (words.view(torch.int16)[:count] < _drop_level(dropout_p)).view(shape)


class _WindowAttention(torch.autograd.Function):
    """Window and global keys in one softmax, with dropout of the probabilities."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        saved = _Saved(*args[:7])
        radius, scale, dropout_p, seed = args[7:]
        batch, heads, length, width = saved.query.shape
        windows = _Windows(length, radius)
        result = saved.query.new_empty(batch, length, heads, width).transpose(1, 2)
        totals = torch.empty(batch, heads * windows.count, windows.size, 1, dtype=saved.compute_dtype, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", enabled=False):
            for example, group, rows, bias in _groups(windows, saved):
                part = _Heads(windows, saved, example, group, scale)
                if dropout_p > 0.0 or _FUSED is None:
                    mixed, total = part.attend(bias, dropout_p, generator)
                else:
                    mixed, total = part.attend_fused(bias)
                result[example, group] = windows.unblock(mixed).to(result.dtype)
                totals[example, rows] = total
        ctx.save_for_backward(*saved, result, totals)
        ctx.options = (radius, scale, dropout_p, seed)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, result, totals = ctx.saved_tensors
        saved = _Saved(*saved)
        radius, scale, dropout_p, seed = ctx.options
        windows = _Windows(saved.query.shape[2], radius)
        grads = [None if x is None else torch.zeros_like(x, dtype=saved.compute_dtype) for x in saved[:5]]
        grad_query, grad_key, grad_value, grad_global_key, grad_global_value = grads
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", enabled=False):
            for example, group, rows, bias in _groups(windows, saved):
                part = _Heads(windows, saved, example, group, scale)
                probs = part.scores(bias).minus_exp_(totals[example, rows])
                rows_grad = windows.blocks(grad[example, group].to(saved.compute_dtype))
                inner = (rows_grad * windows.blocks(result[example, group].to(saved.compute_dtype))).sum(
                    -1, keepdim=True
                )
                query_grad, key_grads, value_grads = None, [], []
                for weights, keys, values in zip(probs.parts(), part.keys(), part.values(), strict=True):
                    used, weights_grad = weights, torch.bmm(rows_grad, values.transpose(1, 2))
                    if dropout_p > 0.0:
                        dropped, share = _dropped(weights.shape, dropout_p, generator), _keep_share(dropout_p)
                        used = weights.masked_fill(dropped, 0.0).div_(share)
                        weights_grad.masked_fill_(dropped, 0.0).div_(share)
                    value_grads.append(torch.bmm(used.transpose(1, 2), rows_grad))
                    scores_grad = weights_grad.sub_(inner).mul_(weights)
                    key_grads.append(torch.bmm(scores_grad.transpose(1, 2), part.query))
                    step = torch.bmm(scores_grad, keys)
                    query_grad = step if query_grad is None else query_grad.add_(step)
                grad_query[example, group] = windows.unblock(query_grad.mul_(scale))
                grad_key[example, group] = windows.overlap_add(key_grads[0])
                grad_value[example, group] = windows.overlap_add(value_grads[0])
                if grad_global_key is not None:
                    grad_global_key[example, group] = windows.sum_blocks(key_grads[1])
                    grad_global_value[example, group] = windows.sum_blocks(value_grads[1])
        inputs_grad = [None if x is None else x.to(saved.query.dtype) for x in grads]
        return (*inputs_grad, None, None, None, None, None, None)


def _keep_share(dropout_p: float) -> float:
    """The share that dropout keeps, at the 16 bits it is drawn with; never 0, for it divides."""
    return (2**15 - _drop_level(dropout_p)) / 2**16


def _groups(windows: _Windows, saved: _Saved) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Example by example some heads at a time: the example, the heads, their rows of blocks, the example's bias."""
    batch, heads = saved.query.shape[:2]
    head_bytes = windows.padded * windows.span * saved.compute_dtype.itemsize
    step = max(1, min(heads, _CHUNK_BYTES // head_bytes))
    bias = None
    for example in range(batch):
        if bias is None or saved.local_mask is not None:
            mask = None if saved.local_mask is None else saved.local_mask[example]
            bias = windows.bias(mask, saved.compute_dtype, saved.query.device)
        for start in range(0, heads, step):
            stop = min(start + step, heads)
            yield example, slice(start, stop), slice(start * windows.count, stop * windows.count), bias
