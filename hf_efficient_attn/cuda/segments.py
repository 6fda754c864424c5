"""Means over segments of each example's tokens: what landmarks are."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu import first_derivatives
from .arithmetic import block_of, ceil_div, share_out
from .operators import operator
from .tiles import contiguous, empty_like_rows, load_rows, offsets, places, rows, takes


_TILE = 64


@triton.jit
def _segment_kernel(
    tensor, segment, sums,
    tensor_batch, tensor_head, tensor_token, segment_batch,
    heads, length, landmarks, chunks, chunk_size,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, IS_HALF: tl.constexpr,
):  # fmt: skip
    """Sums over one chunk of the tokens of one head, for one block of segments."""
    blocks = tl.cdiv(landmarks, BLOCK)
    part, group, batch, head = places(chunks * blocks, heads)
    chunk, block = part // blocks, part % blocks
    s = block * BLOCK + tl.arange(0, BLOCK)
    base = tensor + batch * tensor_batch + head * tensor_head
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    start = chunk * chunk_size
    for begin in range(start, tl.minimum(start + chunk_size, length), TILE):
        t = begin + tl.arange(0, TILE)
        own = tl.load(segment + batch * segment_batch + t, mask=t < length, other=landmarks).to(tl.int32)
        there = own < landmarks
        x = load_rows(base, t, there, tensor_token, WIDTH)
        member = s[:, None] == own[None, :]
        # Products with 0 and 1 are exact, in half precision as well.
        if IS_HALF:
            acc = tl.dot(member.to(tl.float32).to(x.dtype), x, acc)
        else:
            acc = tl.dot(member.to(tl.float32), x, acc, input_precision="ieee")
    row = (group * chunks + chunk) * landmarks + s
    tl.store(sums + offsets(row, WIDTH, WIDTH), acc, mask=(s < landmarks)[:, None])


@triton.jit
def _spread_kernel(
    grad, segment, sizes, target,
    target_batch, target_head, target_token, segment_batch, sizes_batch,
    heads, length, landmarks,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens of one head gets of its segments' gradients."""
    tile, group, batch, head = places(tl.cdiv(length, TILE), heads)
    t = tile * TILE + tl.arange(0, TILE)
    own = tl.load(segment + batch * segment_batch + t, mask=t < length, other=landmarks).to(tl.int32)
    there = own < landmarks
    size = tl.load(sizes + batch * sizes_batch + own, mask=there, other=1.0)
    share = load_rows(grad, group * landmarks + own, there, WIDTH, WIDTH) / size[:, None]
    place = target + batch * target_batch + head * target_head + offsets(t, target_token, WIDTH)
    tl.store(place, share.to(target.dtype.element_ty), mask=(t < length)[:, None])


@operator("segment_means")
def _means_op(tensor: Tensor, segment: Tensor, sizes: Tensor) -> Tensor:
    tensor, segment = rows(tensor), segment.contiguous()
    batch, heads, length, width = tensor.shape
    landmarks = sizes.shape[1]
    block = block_of(landmarks)
    blocks = ceil_div(landmarks, block)
    chunks, chunk_size = share_out(length, _TILE, batch * heads * blocks)
    sums = torch.empty(batch, heads, chunks, landmarks, width, dtype=torch.float32, device=tensor.device)
    _segment_kernel[(batch * heads * chunks * blocks,)](
        tensor,
        segment,
        sums,
        *tensor.stride()[:3],
        length if segment.shape[0] > 1 else 0,
        heads,
        length,
        landmarks,
        chunks,
        chunk_size,
        WIDTH=width,
        TILE=_TILE,
        BLOCK=block,
        IS_HALF=tensor.dtype != torch.float32,
        num_warps=4,
        num_stages=2,
    )
    return sums.sum(dim=2) / sizes[:, None]


@_means_op.register_fake
def _(tensor: Tensor, segment: Tensor, sizes: Tensor) -> Tensor:
    batch, heads, _, width = tensor.shape
    return tensor.new_empty(batch, heads, sizes.shape[1], width, dtype=torch.float32)


@operator("segment_means_backward")
def _spread_op(grad: Tensor, segment: Tensor, sizes: Tensor, like: Tensor) -> Tensor:
    """The gradient of each token: its segment's, shared out among its tokens; 0 at padding."""
    grad, segment, sizes = contiguous(grad, segment, sizes)
    batch, heads, landmarks, width = grad.shape
    found, length = empty_like_rows(like), like.shape[2]
    steps = (length if segment.shape[0] > 1 else 0, landmarks if sizes.shape[0] > 1 else 0)
    _spread_kernel[(batch * heads * ceil_div(length, _TILE),)](
        grad, segment, sizes, found, *found.stride()[:3], *steps, heads, length, landmarks,
        WIDTH=width, TILE=_TILE, num_warps=4, num_stages=1,
    )  # fmt: skip
    return found


@_spread_op.register_fake
def _(grad: Tensor, segment: Tensor, sizes: Tensor, like: Tensor) -> Tensor:
    return empty_like_rows(like)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # The tensor for its shape and dtype alone; other operators of attention keep it anyway.
    ctx.save_for_backward(*inputs)


@first_derivatives
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensor, segment, sizes = ctx.saved_tensors
    return _spread_op(grad, segment, sizes, tensor), None, None


_means_op.register_autograd(_backward, setup_context=_keep)


def segment_means(tensor: Tensor, segment: Tensor, sizes: Tensor) -> Tensor | None:
    """The mean of each segment's tokens, in float32 `[batch, heads, landmarks, head_dim]`.

    None for heads that there is no kernel for.

    Args:
        tensor: `[batch, heads, length, head_dim]`.
        segment: `[batch or 1, length]` int64, the segment of each token; at padding, which is not read, as many as
            there are segments.
        sizes: `[batch or 1, landmarks, 1]`, the tokens of each segment, 1 at least.

    Time O(length * landmarks * head_dim), memory O(landmarks * head_dim).
    """
    return _means_op(tensor, segment, sizes) if takes(tensor) else None
