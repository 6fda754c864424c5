"""A depthwise convolution over tokens, one kernel a head, as products with a band that is laid out in registers.

The form of `functional.nearby`, without a copy of each window in memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu import first_derivatives
from .arithmetic import ceil_div, share_out
from .operators import operator
from .tiles import empty_like_rows, flags, load_rows, offsets, places, precision, rows, takes


_TILE, _SPAN = 64, 128  # tokens of results, and those around them that one program sees
MOST_TAPS = _SPAN - _TILE + 1


@triton.jit
def _window(
    tensor, keep, first_flag, start, step, length, SPAN: tl.constexpr, HAS_KEEP: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows from `start` on, 0 outside of the text and at padding."""
    token = start + tl.arange(0, SPAN)
    there = flags((token >= 0) & (token < length), keep, first_flag, token, HAS_KEEP)
    return load_rows(tensor, token, there, step, WIDTH)


@triton.jit
def _convolve(
    VALUE, WEIGHT, BASE, KEEP, OUT, v_b, v_h, v_n, b_b, b_h, b_n, o_b, o_h, o_n, length, heads, taps,
    HAS_BASE: tl.constexpr, HAS_KEEP: tl.constexpr, FLIPPED: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, pair, example, head = places(tl.cdiv(length, TILE), heads)
    first, flag = tile * TILE, example * length
    start = first - taps // 2
    near = _window(VALUE + example * v_b + head * v_h, KEEP, flag, start, v_n, length, SPAN, HAS_KEEP, WIDTH)
    tap = tl.arange(0, SPAN)[None, :] - tl.arange(0, TILE)[:, None]
    inside = (tap >= 0) & (tap < taps)
    place = taps - 1 - tap if FLIPPED else tap
    band = tl.load(WEIGHT + head * taps + place, mask=inside, other=0.0)
    sums = tl.dot(band, near, input_precision=PRECISION)
    token = first + tl.arange(0, TILE)
    valid = flags(token < length, KEEP, flag, token, HAS_KEEP)
    sums = tl.where(valid[:, None], sums, 0.0)
    if HAS_BASE:
        base = load_rows(BASE + example * b_b + head * b_h, token, token < length, b_n, WIDTH)
        sums += base.to(tl.float32)
    target = OUT + example * o_b + head * o_h + offsets(token, o_n, WIDTH)
    tl.store(target, sums.to(OUT.dtype.element_ty), mask=(token < length)[:, None])


@triton.jit
def _kernel_gradients(
    GRAD, VALUE, KEEP, PARTS, g_b, g_h, g_n, v_b, v_h, v_n, length, heads, taps, chunks, size,
    HAS_KEEP: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk of tokens the gradient of the whole band; only its diagonals count."""
    chunk, pair, example, head = places(chunks, heads)
    GRAD, VALUE = GRAD + example * g_b + head * g_h, VALUE + example * v_b + head * v_h
    flag = example * length
    band = tl.zeros([TILE, SPAN], tl.float32)
    for first in range(chunk * size, tl.minimum(chunk * size + size, length), TILE):
        grad = _window(GRAD, KEEP, flag, first, g_n, length, TILE, HAS_KEEP, WIDTH)
        near = _window(VALUE, KEEP, flag, first - taps // 2, v_n, length, SPAN, HAS_KEEP, WIDTH)
        band = tl.dot(grad, tl.trans(near), band, input_precision=PRECISION)
    place = (pair * chunks + chunk) * TILE + tl.arange(0, TILE)
    tl.store(PARTS + place[:, None] * SPAN + tl.arange(0, SPAN)[None, :], band)


def _launch(value: Tensor, weight: Tensor, base: Tensor | None, keep: Tensor | None, flipped: bool) -> Tensor:
    value, weight = rows(value), weight.contiguous()
    base, keep = None if base is None else rows(base), None if keep is None else keep.contiguous()
    batch, heads, length, width = value.shape
    out = empty_like_rows(value)
    steps = (value if base is None else base).stride()[:3]
    _convolve[(ceil_div(length, _TILE) * batch * heads,)](
        value, weight, base, keep, out, *value.stride()[:3], *steps, *out.stride()[:3], length, heads, weight.shape[1],
        base is not None, keep is not None, flipped, width, _TILE, _SPAN, precision(value), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@operator("add_nearby")
def _add_op(mixed: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    return _launch(value, weight, mixed, keep, False)


@_add_op.register_fake
def _(mixed, value, weight, keep):  # noqa: ANN001, ANN202
    return empty_like_rows(value)


@operator("add_nearby_backward")
def _gradients_op(grad: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of values and weight."""
    grad, value = rows(grad), rows(value)
    keep = None if keep is None else keep.contiguous()
    batch, heads, length, width = value.shape
    taps = weight.shape[1]
    value_grad = _launch(grad, weight, None, keep, True)
    chunks, size = share_out(length, _TILE, batch * heads)
    parts = value.new_empty(batch, heads * chunks, _TILE, _SPAN, dtype=torch.float32)
    _kernel_gradients[(chunks * batch * heads,)](
        grad, value, keep, parts, *grad.stride()[:3], *value.stride()[:3], length, heads, taps, chunks, size,
        keep is not None, width, _TILE, _SPAN, precision(value), num_warps=4, num_stages=2,
    )  # fmt: skip
    band = parts.unflatten(1, (heads, chunks)).sum(dim=(0, 2))
    column = torch.arange(_TILE, device=value.device)[:, None] + torch.arange(taps, device=value.device)
    return value_grad, band.gather(2, column.expand(heads, -1, -1)).sum(dim=1).to(weight.dtype)


@_gradients_op.register_fake
def _(grad, value, weight, keep):  # noqa: ANN001, ANN202
    return empty_like_rows(value), torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


@first_derivatives
def _differentiate(ctx: Any, grad: Tensor) -> tuple:
    return grad, *_gradients_op(grad, *ctx.saved_tensors), None


_add_op.register_autograd(_differentiate, setup_context=_setup)


def add_nearby(mixed: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor | None:
    """`functional.add_nearby`, arguments and all; None for sizes that there is no kernel for.

    Time O(length * taps), memory O(length).
    """
    if not takes(mixed, value) or weight.dtype != value.dtype or weight.shape[1] > MOST_TAPS:
        return None
    return _add_op(mixed, value, weight, keep)
