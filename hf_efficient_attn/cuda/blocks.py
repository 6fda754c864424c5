"""Blocks of tokens that attend listed blocks, forward and backward in one pass each.

For BigBird (Zaheer et al. 2020, arXiv 2007.14062), for sorted chunks (Kitaev et al. 2020, arXiv 2001.04451), and for
windows on a grid (Ramachandran et al. 2019, arXiv 1906.05909), whose blocks are tiles.
Gradients of keys and values are added atomically in float32: who attends a block is not known without turning the lists
round.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu import first_derivatives
from .arithmetic import (
    LN_2,
    LOG2_E,
    column_draws,
    draw_key,
    drop_limits,
    kept,
    power_of_2,
    row_draws,
    rowwise,
    softmax_step,
    to_base_2,
)
from .operators import operator
from .room import LARGE_BLOCKS, has_room
from .tiles import contiguous, dropout_seed, empty_like_rows, flags, load_rows, offsets, places, precision, rows, takes


_WARPS = 4
_NO_GRID = (0, 1, 0, 0)


@triton.jit
def _tokens(
    SOURCE, FILLED, first, filled, block, length,
    SIZE: tl.constexpr, TILE: tl.constexpr, HAS_SOURCE: tl.constexpr,
):  # fmt: skip
    """Tokens at a block's places, and which places have one."""
    offset = tl.arange(0, TILE)
    place = block * SIZE + offset
    if HAS_SOURCE:
        there = (offset < SIZE) & (place >= 0)
        token = tl.load(SOURCE + first + place, mask=there, other=0)
        return token, flags(there, FILLED, filled, place, True)
    return place, (offset < SIZE) & (place >= 0) & (place < length)


@triton.jit
def _scores(
    q, k, row, column, there, scale, in_front, columns, down, across,
    CAUSAL: tl.constexpr, PENALTY: tl.constexpr, GRID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores to the base 2, and which count."""
    allowed = there[None, :] & (row[:, None] >= 0)
    if CAUSAL:
        allowed = allowed & (column[None, :] <= row[:, None])
    if GRID:
        at, seen = row - in_front, column - in_front
        lines = (seen // columns)[None, :] - (at // columns)[:, None]
        steps = (seen % columns)[None, :] - (at % columns)[:, None]
        near = (lines >= -down) & (lines <= down) & (steps >= -across) & (steps <= across)
        allowed = allowed & (near | (seen < 0)[None, :])
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if PENALTY:
        scores = tl.where(column[None, :] == row[:, None], scores - 1e5, scores)
    return scores, allowed


@triton.jit
def _forward(
    Q, K, V, LISTS, SOURCE, FILLED, SEED, OUT, LSE,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, l_b, l_h, s_b, s_h, f_b, f_h,
    length, heads, blocks, front, width, scale, threshold, factor, in_front, columns, down, across,
    HAS_SOURCE: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, PENALTY: tl.constexpr, GRID: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, pair, example, head = places(blocks, heads)
    K, V = K + example * k_b + head * k_h, V + example * v_b + head * v_h
    first, filled = example * s_b + head * s_h, example * f_b + head * f_h
    row, row_is_there = _tokens(SOURCE, FILLED, first, filled, block + front, length, SIZE, TILE, HAS_SOURCE)
    q = load_rows(Q + example * q_b + head * q_h, row, row_is_there, q_n, WIDTH)
    top = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, WIDTH], tl.float32)
    if DROPOUT:
        draw = draw_key(SEED, pair)
        row_lines = row_draws(draw, row)
    entries = LISTS + example * l_b + head * l_h + block * width
    for number in range(0, width):
        near = tl.load(entries + number)
        column, there = _tokens(SOURCE, FILLED, first, filled, near, length, SIZE, TILE, HAS_SOURCE)
        k, v = load_rows(K, column, there, k_n, WIDTH), load_rows(V, column, there, v_n, WIDTH)
        scores, allowed = _scores(
            q, k, row, column, there, scale, in_front, columns, down, across, CAUSAL, PENALTY, GRID, PRECISION
        )
        probs, shrink, top, total = softmax_step(scores, allowed, top, total)
        if DROPOUT:
            keep = kept(row_lines, column_draws(draw, column + number * length), threshold)
            probs = tl.where(keep, probs * factor, 0.0)
        mixed = tl.dot(probs.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    some = tl.where(total > 0.0, total, 1.0)
    mixed = mixed / some[:, None]
    target = OUT + example * o_b + head * o_h + offsets(row, o_n, WIDTH)
    tl.store(target, mixed.to(OUT.dtype.element_ty), mask=row_is_there[:, None])
    lse = tl.where(total > 0.0, top + tl.log2(some), 0.0)
    tl.store(LSE + pair * length + row, lse, mask=row_is_there)


@triton.jit
def _backward(
    Q, K, V, LISTS, SOURCE, FILLED, SEED, OUT, LSE, GRAD, GLSE, DQ, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, d_b, d_h, d_n,
    l_b, l_h, s_b, s_h, f_b, f_h,
    length, heads, blocks, front, width, scale, plain_scale, threshold, factor, in_front, columns, down, across,
    HAS_SOURCE: tl.constexpr, DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, PENALTY: tl.constexpr, GRID: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, pair, example, head = places(blocks, heads)
    K, V = K + example * k_b + head * k_h, V + example * v_b + head * v_h
    DK, DV = DK + example * d_b + head * d_h, DV + example * d_b + head * d_h
    first, filled = example * s_b + head * s_h, example * f_b + head * f_h
    row, row_is_there = _tokens(SOURCE, FILLED, first, filled, block + front, length, SIZE, TILE, HAS_SOURCE)
    q = load_rows(Q + example * q_b + head * q_h, row, row_is_there, q_n, WIDTH)
    grad = load_rows(GRAD + example * g_b + head * g_h, row, row_is_there, g_n, WIDTH)
    result = load_rows(OUT + example * o_b + head * o_h, row, row_is_there, o_n, WIDTH)
    lse = tl.load(LSE + pair * length + row, mask=row_is_there, other=0.0)
    # A row's logarithm of its sum has a gradient of its own where several rounds are weighed by it.
    glse = tl.load(GLSE + pair * length + row, mask=row_is_there, other=0.0)
    delta = rowwise(grad, result) - to_base_2(glse)
    dq = tl.zeros([TILE, WIDTH], tl.float32)
    if DROPOUT:
        draw = draw_key(SEED, pair)
        row_lines = row_draws(draw, row)
    entries = LISTS + example * l_b + head * l_h + block * width
    for number in range(0, width):
        near = tl.load(entries + number)
        column, there = _tokens(SOURCE, FILLED, first, filled, near, length, SIZE, TILE, HAS_SOURCE)
        k, v = load_rows(K, column, there, k_n, WIDTH), load_rows(V, column, there, v_n, WIDTH)
        scores, allowed = _scores(
            q, k, row, column, there, scale, in_front, columns, down, across, CAUSAL, PENALTY, GRID, PRECISION
        )
        allowed = allowed & row_is_there[:, None]
        probs = tl.where(allowed, tl.exp2(scores - lse[:, None]), 0.0)
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        spread = probs
        if DROPOUT:
            keep = kept(row_lines, column_draws(draw, column + number * length), threshold)
            dprobs, spread = tl.where(keep, dprobs * factor, 0.0), tl.where(keep, probs * factor, 0.0)
        dscores = (probs * (dprobs - delta[:, None])).to(k.dtype)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * plain_scale
        dv = tl.dot(tl.trans(spread.to(grad.dtype)), grad, input_precision=PRECISION)
        place = offsets(column, d_n, WIDTH)
        tl.atomic_add(DK + place, dk, mask=there[:, None], sem="relaxed")
        tl.atomic_add(DV + place, dv, mask=there[:, None], sem="relaxed")
    target = DQ + example * d_b + head * d_h + offsets(row, d_n, WIDTH)
    tl.store(target, (dq * plain_scale).to(DQ.dtype.element_ty), mask=row_is_there[:, None])


def _steps(*tables: Tensor | None) -> tuple[int, ...]:
    """Strides of examples and heads, 0 where all have the same."""
    found: tuple[int, ...] = ()
    for table in tables:
        found += (0, 0) if table is None else tuple(0 if table.shape[i] == 1 else table.stride(i) for i in (0, 1))
    return found


def _tile(size: int) -> int:
    return max(16, power_of_2(size))


def _stages(size: int, width: int) -> int:
    """Loads on their way at a time; the largest blocks of the widest heads leave no memory for more than one."""
    return 2 if _tile(size) * width <= 64 * 128 else 1


@operator("blocks_forward")
def blocks_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    source: Tensor | None,
    filled: Tensor | None,
    seed: Tensor | None,
    size: int,
    front: int,
    causal: bool,
    exclude_self: bool,
    grid: Sequence[int] | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The result as `query`, 0 where no block is, and the base-2 logarithm of each row's sum `[batch, heads, length]`.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        lists: int32 `[batch or 1, heads or 1, blocks, entries]`, the blocks that each block attends; -1 for none.
        source: int32 `[batch or 1, heads or 1, places]`, the token at each place, `size` places a block; None where
            token and place are the same number.
        filled: bool `[batch or 1, heads or 1, places]`, whether there is one; None with it.
        seed: of dropout, one number; None where nothing is dropped.
        size: tokens of a block.
        front: blocks before the first one of `lists`.
        causal: no token attends one of a higher number.
        exclude_self: a token attends itself only where it may attend nothing else.
        grid: tokens in front of a grid, its columns, and how many rows and columns away a token sees others, besides
            those in front; None where blocks meet whole.
    """
    query, key, value = rows(query), rows(key), rows(value)
    batch, heads, length, width = query.shape
    out, lse = empty_like_rows(query), query.new_empty(batch, heads, length, dtype=torch.float32)
    if source is not None:
        out.zero_(), lse.zero_()
    lists, source, filled = contiguous(lists, source, filled)
    _forward[(lists.shape[2] * batch * heads,)](
        query, key, value, lists, source, filled, seed, out, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *_steps(lists, source, filled),
        length, heads, lists.shape[2], front, lists.shape[3], scale * LOG2_E, *drop_limits(dropout_p),
        *(grid or _NO_GRID), source is not None, seed is not None, causal, exclude_self, grid is not None,
        size, _tile(size), width, precision(query), num_warps=_WARPS, num_stages=_stages(size, width),
    )  # fmt: skip
    return out, lse


@blocks_forward.register_fake
def _(query, *args):  # noqa: ANN001, ANN002, ANN202
    return empty_like_rows(query), query.new_empty(*query.shape[:3], dtype=torch.float32)


@operator("blocks_backward")
def blocks_backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    source: Tensor | None,
    filled: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    size: int,
    front: int,
    causal: bool,
    exclude_self: bool,
    grid: Sequence[int] | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grad, query, key, value = rows(grad), rows(query), rows(key), rows(value)
    batch, heads, _, width = query.shape
    dq, dk, dv = (empty_like_rows(query, torch.float32).zero_() for _ in range(3))
    lists, source, filled = contiguous(lists, source, filled)
    _backward[(lists.shape[2] * batch * heads,)](
        query, key, value, lists, source, filled, seed, out, lse, grad, grad_lse.contiguous(), dq, dk, dv,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *grad.stride()[:3],
        *dq.stride()[:3], *_steps(lists, source, filled), query.shape[2], heads, lists.shape[2], front, lists.shape[3],
        scale * LOG2_E, scale, *drop_limits(dropout_p), *(grid or _NO_GRID),
        source is not None, seed is not None, causal, exclude_self, grid is not None,
        size, _tile(size), width, precision(query), num_warps=_WARPS, num_stages=_stages(size, width),
    )  # fmt: skip
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


@blocks_backward.register_fake
def _(grad, grad_lse, query, key, value, *args):  # noqa: ANN001, ANN002, ANN202
    return empty_like_rows(query), empty_like_rows(key), empty_like_rows(value)


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.numbers = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output)


@first_derivatives
def _differentiate(ctx, grad, grad_lse):  # noqa: ANN001, ANN202
    return *blocks_backward(grad, grad_lse, *ctx.saved_tensors, *ctx.numbers), *(None,) * 11


blocks_forward.register_autograd(_differentiate, setup_context=_setup)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    source: Tensor | None,
    filled: Tensor | None,
    *,
    size: int,
    front: int = 0,
    causal: bool = False,
    exclude_self: bool = False,
    grid: Sequence[int] | None = None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor] | None:
    """What `blocks_forward` gives, the logarithms natural.

    None for sizes that there is no kernel, or no room, for, and where torch is to be deterministic.

    Time O(blocks * entries * size^2), memory O(length) and the lists.
    """
    largest = 128 if has_room(LARGE_BLOCKS) else 64
    if not takes(query, key, value) or size > largest or torch.are_deterministic_algorithms_enabled():
        return None
    seed = dropout_seed(dropout_p, query.device)
    tables = (lists.to(torch.int32), None if source is None else source.to(torch.int32), filled, seed)
    shape = (size, front, causal, exclude_self, grid, scale, dropout_p)
    out, lse = blocks_forward(query, key, value, *tables, *shape)
    return out, lse * LN_2
