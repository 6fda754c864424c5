"""Sliding windows and global keys in one pass, forward and backward (Beltagy, Peters & Cohan 2020, arXiv 2004.05150).

Each program takes a block of queries over the span of their windows, as in Dao 2023 (FlashAttention-2, arXiv
2307.08691). Gradients of keys come from programs over blocks of keys, so that nothing is added atomically but for
global keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu import first_derivatives
from .arithmetic import LOG2_E, ceil_div, column_draws, draw_key, drop_limits, kept, row_draws, rowwise, softmax_step
from .operators import operator
from .tiles import contiguous, dropout_seed, empty_like_rows, flags, load_rows, offsets, places, precision, rows, takes


# Queries, keys, warps and stages of a program.
FORWARD, QUERIES, KEYS = (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 2)
_GLOBAL = 16  # global keys at a time


@triton.jit
def _in_window(row, column, back, ahead):
    """Which keys are near enough to which queries."""
    distance = column - row
    return (distance >= -back) & (distance <= ahead)


@triton.jit
def _before(row, INDEX, place, there, CAUSAL: tl.constexpr):
    """Which global keys are there for which queries: if `CAUSAL` those that do not stand after it."""
    allowed = there[None, :] & (row[:, None] >= 0)
    if CAUSAL:
        index = tl.load(INDEX + place, mask=there, other=0)
        allowed = allowed & (index[None, :] <= row[:, None])
    return allowed


@triton.jit
def _forward(
    Q, K, V, GK, GV, GINDEX, GVALID, COUNTED, VALID, SEED, OUT, LSE,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    length, heads, slots, back, ahead, scale, threshold, factor,
    HAS_GLOBAL: tl.constexpr, HAS_COUNTED: tl.constexpr, HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, pair, example, head = places(tl.cdiv(length, BQ), heads)
    Q, K, V = Q + example * q_b + head * q_h, K + example * k_b + head * k_h, V + example * v_b + head * v_h
    row = block * BQ + tl.arange(0, BQ)
    row_is_there = flags(row < length, VALID, example * length, row, HAS_VALID)
    q = load_rows(Q, row, row_is_there, q_n, WIDTH)
    top = tl.full([BQ], -1e30, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    mixed = tl.zeros([BQ, WIDTH], tl.float32)
    if DROPOUT:
        draw = draw_key(SEED, pair)
        row_lines = row_draws(draw, row)
    first = tl.maximum(block * BQ - back, 0) // BK * BK
    last = tl.minimum(block * BQ + BQ + ahead, length)
    for start in range(first, last, BK):
        column = start + tl.arange(0, BK)
        there = flags(column < length, COUNTED, example * length, column, HAS_COUNTED)
        k, v = load_rows(K, column, there, k_n, WIDTH), load_rows(V, column, there, v_n, WIDTH)
        allowed = _in_window(row[:, None], column[None, :], back, ahead) & there[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        probs, shrink, top, total = softmax_step(scores, allowed, top, total)
        if DROPOUT:
            probs = tl.where(kept(row_lines, column_draws(draw, column), threshold), probs * factor, 0.0)
        mixed = tl.dot(probs.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    if HAS_GLOBAL:
        for start in range(0, slots, BG):
            slot = start + tl.arange(0, BG)
            there = flags(slot < slots, GVALID, example * slots, slot, True)
            k = load_rows(GK, pair * slots + slot, there, WIDTH, WIDTH)
            v = load_rows(GV, pair * slots + slot, there, WIDTH, WIDTH)
            allowed = _before(row, GINDEX, example * slots + slot, there, CAUSAL)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            probs, shrink, top, total = softmax_step(scores, allowed, top, total)
            if DROPOUT:
                probs = tl.where(kept(row_lines, column_draws(draw, length + slot), threshold), probs * factor, 0.0)
            mixed = tl.dot(probs.to(v.dtype), v, mixed * shrink[:, None], input_precision=PRECISION)
    some = tl.where(total > 0.0, total, 1.0)
    mixed = tl.where(row_is_there[:, None], mixed / some[:, None], 0.0)
    target = OUT + example * o_b + head * o_h + offsets(row, o_n, WIDTH)
    tl.store(target, mixed.to(OUT.dtype.element_ty), mask=(row < length)[:, None])
    tl.store(LSE + pair * length + row, tl.where(total > 0.0, top + tl.log2(some), 0.0), mask=row < length)


@triton.jit
def _queries(
    Q, K, V, GK, GV, GINDEX, GVALID, COUNTED, VALID, SEED, OUT, LSE, GRAD, DELTA, DQ, DGK, DGV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, d_b, d_h, d_n,
    length, heads, slots, back, ahead, scale, plain_scale, threshold, factor,
    HAS_GLOBAL: tl.constexpr, HAS_COUNTED: tl.constexpr, HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and global keys, and each row's sum of gradient times result."""
    block, pair, example, head = places(tl.cdiv(length, BQ), heads)
    K, V = K + example * k_b + head * k_h, V + example * v_b + head * v_h
    row = block * BQ + tl.arange(0, BQ)
    row_is_there = flags(row < length, VALID, example * length, row, HAS_VALID)
    q = load_rows(Q + example * q_b + head * q_h, row, row_is_there, q_n, WIDTH)
    grad = load_rows(GRAD + example * g_b + head * g_h, row, row_is_there, g_n, WIDTH)
    result = load_rows(OUT + example * o_b + head * o_h, row, row_is_there, o_n, WIDTH)
    delta = rowwise(grad, result)
    lse = tl.load(LSE + pair * length + row, mask=row < length, other=0.0)
    tl.store(DELTA + pair * length + row, delta, mask=row < length)
    dq = tl.zeros([BQ, WIDTH], tl.float32)
    if DROPOUT:
        draw = draw_key(SEED, pair)
        row_lines = row_draws(draw, row)
    first = tl.maximum(block * BQ - back, 0) // BK * BK
    last = tl.minimum(block * BQ + BQ + ahead, length)
    for start in range(first, last, BK):
        column = start + tl.arange(0, BK)
        there = flags(column < length, COUNTED, example * length, column, HAS_COUNTED)
        k, v = load_rows(K, column, there, k_n, WIDTH), load_rows(V, column, there, v_n, WIDTH)
        allowed = _in_window(row[:, None], column[None, :], back, ahead) & there[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        probs = tl.where(allowed, tl.exp2(scores - lse[:, None]), 0.0)
        dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dprobs = tl.where(kept(row_lines, column_draws(draw, column), threshold), dprobs * factor, 0.0)
        dscores = probs * (dprobs - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    if HAS_GLOBAL:
        for start in range(0, slots, BG):
            slot = start + tl.arange(0, BG)
            there = flags(slot < slots, GVALID, example * slots, slot, True)
            k = load_rows(GK, pair * slots + slot, there, WIDTH, WIDTH)
            v = load_rows(GV, pair * slots + slot, there, WIDTH, WIDTH)
            allowed = _before(row, GINDEX, example * slots + slot, there, CAUSAL) & row_is_there[:, None]
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            probs = tl.where(allowed, tl.exp2(scores - lse[:, None]), 0.0)
            dprobs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            spread = probs
            if DROPOUT:
                keep = kept(row_lines, column_draws(draw, length + slot), threshold)
                dprobs, spread = tl.where(keep, dprobs * factor, 0.0), tl.where(keep, probs * factor, 0.0)
            dscores = (probs * (dprobs - delta[:, None])).to(k.dtype)
            dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
            dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION) * plain_scale
            dv = tl.dot(tl.trans(spread.to(grad.dtype)), grad, input_precision=PRECISION)
            place = offsets(pair * slots + slot, WIDTH, WIDTH)
            tl.atomic_add(DGK + place, dk, mask=there[:, None])
            tl.atomic_add(DGV + place, dv, mask=there[:, None])
    target = DQ + example * d_b + head * d_h + offsets(row, d_n, WIDTH)
    tl.store(target, (dq * plain_scale).to(DQ.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def _keys(
    Q, K, V, COUNTED, VALID, SEED, LSE, GRAD, DELTA, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, d_b, d_h, d_n,
    length, heads, back, ahead, scale, plain_scale, threshold, factor,
    HAS_COUNTED: tl.constexpr, HAS_VALID: tl.constexpr, DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values in windows. Matrices are transposed: keys by queries."""
    block, pair, example, head = places(tl.cdiv(length, BK), heads)
    Q, GRAD = Q + example * q_b + head * q_h, GRAD + example * g_b + head * g_h
    column = block * BK + tl.arange(0, BK)
    there = flags(column < length, COUNTED, example * length, column, HAS_COUNTED)
    k = load_rows(K + example * k_b + head * k_h, column, there, k_n, WIDTH)
    v = load_rows(V + example * v_b + head * v_h, column, there, v_n, WIDTH)
    dk, dv = tl.zeros([BK, WIDTH], tl.float32), tl.zeros([BK, WIDTH], tl.float32)
    if DROPOUT:
        draw = draw_key(SEED, pair)
        column_lines = column_draws(draw, column)
    first = tl.maximum(block * BK - ahead, 0) // BQ * BQ
    last = tl.minimum(block * BK + BK + back, length)
    for start in range(first, last, BQ):
        row = start + tl.arange(0, BQ)
        row_is_there = flags(row < length, VALID, example * length, row, HAS_VALID)
        q, grad = load_rows(Q, row, row_is_there, q_n, WIDTH), load_rows(GRAD, row, row_is_there, g_n, WIDTH)
        lse = tl.load(LSE + pair * length + row, mask=row_is_there, other=0.0)
        delta = tl.load(DELTA + pair * length + row, mask=row_is_there, other=0.0)
        allowed = _in_window(row[None, :], column[:, None], back, ahead) & there[:, None] & row_is_there[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        probs = tl.where(allowed, tl.exp2(scores - lse[None, :]), 0.0)
        dprobs = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        spread = probs
        if DROPOUT:
            keep = kept(column_lines, row_draws(draw, row), threshold)
            dprobs, spread = tl.where(keep, dprobs * factor, 0.0), tl.where(keep, probs * factor, 0.0)
        dv = tl.dot(spread.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dscores = probs * (dprobs - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    place = example * d_b + head * d_h + offsets(column, d_n, WIDTH)
    tl.store(DK + place, (dk * plain_scale).to(DK.dtype.element_ty), mask=(column < length)[:, None])
    tl.store(DV + place, dv.to(DV.dtype.element_ty), mask=(column < length)[:, None])


@operator("window_forward")
def window_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    global_index: Tensor | None,
    global_valid: Tensor | None,
    counted: Tensor | None,
    valid: Tensor | None,
    seed: Tensor | None,
    back: int,
    ahead: int,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The result as `query`, and the base-2 logarithm of each row's sum `[batch, heads, length]`.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        global_key, global_value: `[batch, heads, slots, head_dim]`, or None.
        global_index, global_valid: `[batch, slots]`, where they stand and which are there.
        counted: bool `[batch, length]`, keys that count in windows; None for all.
        valid: bool `[batch, length]`, tokens that are no padding; None for all.
        seed: of dropout, one number; None where nothing is dropped.
        back, ahead: keys before and after the query's own.
        causal: a global key counts for no query before it.
    """
    query, key, value = rows(query), rows(key), rows(value)
    counted, valid = contiguous(counted, valid)
    batch, heads, length, width = query.shape
    out, lse = empty_like_rows(query), query.new_empty(batch, heads, length, dtype=torch.float32)
    slots = 0 if global_key is None else global_key.shape[2]
    block_q, block_k, warps, stages = FORWARD
    _forward[(ceil_div(length, block_q) * batch * heads,)](
        query, key, value, *contiguous(global_key, global_value, global_index, global_valid), counted, valid, seed,
        out, lse, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        length, heads, slots, back, ahead, scale * LOG2_E, *drop_limits(dropout_p),
        slots > 0, counted is not None, valid is not None, seed is not None, causal,
        width, block_q, block_k, _GLOBAL, precision(query), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@window_forward.register_fake
def _(query, *args):  # noqa: ANN001, ANN002, ANN202
    return empty_like_rows(query), query.new_empty(*query.shape[:3], dtype=torch.float32)


@operator("window_backward")
def window_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    global_index: Tensor | None,
    global_valid: Tensor | None,
    counted: Tensor | None,
    valid: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    back: int,
    ahead: int,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and of global keys and values (with no slots where there are none)."""
    grad, query, key, value = rows(grad), rows(query), rows(key), rows(value)
    counted, valid = contiguous(counted, valid)
    batch, heads, length, width = query.shape
    slots = 0 if global_key is None else global_key.shape[2]
    dq, dk, dv = empty_like_rows(query), empty_like_rows(key), empty_like_rows(value)
    dgk, dgv = (query.new_zeros(batch, heads, slots, width, dtype=torch.float32) for _ in range(2))
    delta = torch.empty_like(lse)
    shape = (length, heads)
    numbers = (back, ahead, scale * LOG2_E, scale, *drop_limits(dropout_p))
    given = (counted is not None, valid is not None, seed is not None)
    block_q, block_k, warps, stages = QUERIES
    _queries[(ceil_div(length, block_q) * batch * heads,)](
        query, key, value, *contiguous(global_key, global_value, global_index, global_valid), counted, valid, seed,
        out, lse, grad, delta, dq, dgk, dgv,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *grad.stride()[:3],
        *dq.stride()[:3], *shape, slots, *numbers, slots > 0, *given, causal,
        width, block_q, block_k, _GLOBAL, precision(query), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_q, block_k, warps, stages = KEYS
    _keys[(ceil_div(length, block_k) * batch * heads,)](
        query, key, value, counted, valid, seed, lse, grad, delta, dk, dv,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad.stride()[:3], *dk.stride()[:3],
        *shape, *numbers, *given, width, block_q, block_k, precision(query), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk, dv, dgk.to(key.dtype), dgv.to(value.dtype)


@window_backward.register_fake
def _(grad, query, key, value, global_key, *args):  # noqa: ANN001, ANN002, ANN202
    slots = 0 if global_key is None else global_key.shape[2]
    shape = (*query.shape[:2], slots, query.shape[3])
    dq, dk, dv = empty_like_rows(query), empty_like_rows(key), empty_like_rows(value)
    return dq, dk, dv, key.new_empty(shape), value.new_empty(shape)


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001
    *tensors, ctx.back, ctx.ahead, ctx.causal, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)


@first_derivatives
def _differentiate(ctx, grad, grad_lse):  # noqa: ANN001, ANN202
    numbers = (ctx.back, ctx.ahead, ctx.causal, ctx.scale, ctx.dropout_p)
    dq, dk, dv, dgk, dgv = window_backward(grad, *ctx.saved_tensors, *numbers)
    if ctx.saved_tensors[3] is None:
        dgk = dgv = None
    return dq, dk, dv, dgk, dgv, *(None,) * 10


window_forward.register_autograd(_differentiate, setup_context=_setup)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    counted: Tensor | None,
    global_key: Tensor | None,
    global_value: Tensor | None,
    global_index: Tensor | None,
    global_valid: Tensor | None,
    back: int,
    ahead: int,
    causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor | None:
    """`functional.sliding_window_attention` without dilation.

    None for heads of a size that there is no kernel for, and with global tokens where torch is to be deterministic.

    Arguments as in `window_forward`. Time O(length * (back + ahead + slots)), memory O(length).
    """
    adds_atomically = global_key is not None and torch.are_deterministic_algorithms_enabled()
    if not takes(query, key, value) or adds_atomically:
        return None
    seed = dropout_seed(dropout_p, query.device)
    shape = (back, ahead, causal, scale, dropout_p)
    globals_ = (global_key, global_value, global_index, global_valid)
    return window_forward(query, key, value, *globals_, counted, key_padding_mask, seed, *shape)[0]
