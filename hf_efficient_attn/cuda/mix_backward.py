"""Gradients of `features.feature_mix`: probabilities are computed again from what their rows were divided by."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    LOG2_E,
    block_of,
    draw_key,
    draw_lines,
    draws,
    drop_limits,
    parts_of,
    product,
    share_out,
    split,
    split_tensor,
)
from .operators import operator
from .tiles import empty_like_rows, rows


@triton.jit
def _token_kernel(
    query,
    above,
    result,
    keep,
    high,
    low,
    table_high,
    table_low,
    normalisers,
    bias,
    seed,
    lse,
    delta,
    query_grad,
    query_batch,
    query_head,
    query_token,
    above_batch,
    above_head,
    above_token,
    result_batch,
    result_head,
    result_token,
    weight_group,
    heads,
    length,
    features,
    scale,
    root,
    log2_e,
    first_kept,
    factor_kept,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Gradients of one tile of queries, over all features, and each row's `above . result`; tokens are the rows."""
    tiles = tl.cdiv(length, TILE)
    program = tl.program_id(0)
    group = program // tiles
    batch = (group // heads).to(tl.int64)
    head = group % heads
    group_long = group.to(tl.int64)
    t = (program % tiles) * TILE + tl.arange(0, TILE)
    t_long = t.to(tl.int64)
    c = tl.arange(0, WIDTH)
    exists = t < length
    there = exists
    if HAS_KEEP:
        there = exists & (tl.load(keep + batch * length + t, mask=exists, other=0) != 0)
    query_at = query + batch * query_batch + head * query_head + t_long[:, None] * query_token + c[None, :]
    above_at = above + batch * above_batch + head * above_head + t_long[:, None] * above_token + c[None, :]
    # The gradient and the result lie alike: both as the heads are merged.
    result_offset = batch * result_batch + head * result_head + t_long[:, None] * result_token + c[None, :]
    q = tl.load(query_at, mask=there[:, None], other=0.0)
    g = tl.load(above_at, mask=there[:, None], other=0.0)
    r = tl.load(result + result_offset, mask=there[:, None], other=0.0)
    row_delta = tl.sum(g.to(tl.float32) * r.to(tl.float32), axis=1)
    tl.store(delta + group_long * length + t, row_delta, mask=exists)
    row_lse = tl.load(lse + group_long * length + t, mask=exists, other=float("inf"))
    q_high, q_low = split(q, INPUT_PARTS)
    g_high, g_low = split(g, INPUT_PARTS)
    if DROPOUT:
        drawn = draw_key(seed, group)
        token_lines = draw_lines(drawn, t, 0)
    acc = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, features, BLOCK):
        f = begin + tl.arange(0, BLOCK)
        inside = f < features
        weight_at = group_long * weight_group + f[:, None] * WIDTH + c[None, :]
        w = tl.load(high + weight_at, mask=inside[:, None], other=0.0)
        w_low = w
        if WEIGHT_PARTS == 2:
            w_low = tl.load(low + weight_at, mask=inside[:, None], other=0.0)
        row = group_long * features + f
        table_at = row[:, None] * WIDTH + c[None, :]
        values = tl.load(table_high + table_at, mask=inside[:, None], other=0.0)
        values_low = tl.load(table_low + table_at, mask=inside[:, None], other=0.0)
        norm = tl.load(normalisers + row, mask=inside, other=0.0)
        if HAS_BIAS:
            shifts = tl.load(bias + row, mask=inside, other=float("-inf")) * log2_e
        else:
            shifts = tl.where(inside, 0.0, float("-inf"))
        logits = tl.zeros([TILE, BLOCK], tl.float32)
        logits = product(q_high, q_low, tl.trans(w), tl.trans(w_low), logits, INPUT_PARTS, WEIGHT_PARTS) * scale
        p = tl.exp2(logits + shifts[None, :] - row_lse[:, None])
        grad = tl.zeros([TILE, BLOCK], tl.float32)
        grad = product(g_high, g_low, tl.trans(values), tl.trans(values_low), grad, INPUT_PARTS, 2)
        if DROPOUT:
            feature_lines = draw_lines(drawn, f, 0x2545F491)
            kept = draws(token_lines[:, None] ^ feature_lines[None, :]) >= first_kept
            grad = tl.where(kept, grad * factor_kept, 0.0)
        grad = p * (grad - norm[None, :] * row_delta[:, None])
        grad_high, grad_low = split(grad, PARTS)
        if PARTS == 2:
            acc = product(grad_high, grad_low, w, w_low, acc, PARTS, WEIGHT_PARTS)
        else:
            acc = tl.dot(grad_high, w, acc)
    tl.store(query_grad + result_offset, (acc * root).to(query_grad.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _feature_kernel(
    query,
    above,
    keep,
    high,
    low,
    table_high,
    table_low,
    normalisers,
    bias,
    seed,
    lse,
    delta,
    weight_grad,
    table_grad,
    normaliser_grad,
    bias_grad,
    query_batch,
    query_head,
    query_token,
    above_batch,
    above_head,
    above_token,
    weight_group,
    heads,
    length,
    features,
    chunks,
    chunk_size,
    scale,
    root,
    log2_e,
    first_kept,
    factor_kept,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WANT_WEIGHTS: tl.constexpr,
):
    """What one chunk of tokens adds to the gradients of one block of features; features are the rows."""
    blocks = tl.cdiv(features, BLOCK)
    program = tl.program_id(0)
    block = program % blocks
    chunk = (program // blocks) % chunks
    group = (program // blocks) // chunks
    batch = (group // heads).to(tl.int64)
    head = group % heads
    group_long = group.to(tl.int64)
    f = block * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    inside = f < features
    weight_at = group_long * weight_group + f[:, None] * WIDTH + c[None, :]
    w = tl.load(high + weight_at, mask=inside[:, None], other=0.0)
    w_low = w
    if WEIGHT_PARTS == 2:
        w_low = tl.load(low + weight_at, mask=inside[:, None], other=0.0)
    row = group_long * features + f
    table_at = row[:, None] * WIDTH + c[None, :]
    values = tl.load(table_high + table_at, mask=inside[:, None], other=0.0)
    values_low = tl.load(table_low + table_at, mask=inside[:, None], other=0.0)
    norm = tl.load(normalisers + row, mask=inside, other=0.0)
    if HAS_BIAS:
        shifts = tl.load(bias + row, mask=inside, other=float("-inf")) * log2_e
    else:
        shifts = tl.where(inside, 0.0, float("-inf"))
    if DROPOUT:
        drawn = draw_key(seed, group)
        feature_lines = draw_lines(drawn, f, 0x2545F491)
    query_base = query + batch * query_batch + head * query_head
    above_base = above + batch * above_batch + head * above_head
    table_sum = tl.zeros([BLOCK, WIDTH], tl.float32)
    weight_sum = tl.zeros([BLOCK, WIDTH], tl.float32)
    norm_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    start = chunk * chunk_size
    for begin in range(start, tl.minimum(start + chunk_size, length), TILE):
        t = begin + tl.arange(0, TILE)
        exists = t < length
        there = exists
        if HAS_KEEP:
            there = there & (tl.load(keep + batch * length + t, mask=there, other=0) != 0)
        t_long = t.to(tl.int64)
        q = tl.load(query_base + t_long[:, None] * query_token + c[None, :], mask=there[:, None], other=0.0)
        g = tl.load(above_base + t_long[:, None] * above_token + c[None, :], mask=there[:, None], other=0.0)
        row_lse = tl.load(lse + group_long * length + t, mask=exists, other=float("inf"))
        row_delta = tl.load(delta + group_long * length + t, mask=exists, other=0.0)
        q_high, q_low = split(q, INPUT_PARTS)
        g_high, g_low = split(g, INPUT_PARTS)
        logits = tl.zeros([BLOCK, TILE], tl.float32)
        logits = product(w, w_low, tl.trans(q_high), tl.trans(q_low), logits, WEIGHT_PARTS, INPUT_PARTS) * scale
        p = tl.exp2(logits + shifts[:, None] - row_lse[None, :])
        kept = p
        grad = tl.zeros([BLOCK, TILE], tl.float32)
        grad = product(values, values_low, tl.trans(g_high), tl.trans(g_low), grad, 2, INPUT_PARTS)
        if DROPOUT:
            token_lines = draw_lines(drawn, t, 0)
            stays = draws(feature_lines[:, None] ^ token_lines[None, :]) >= first_kept
            grad = tl.where(stays, grad * factor_kept, 0.0)
            kept = tl.where(stays, p * factor_kept, 0.0)
        kept_high, kept_low = split(kept, PARTS)
        table_sum = product(kept_high, kept_low, g_high, g_low, table_sum, PARTS, INPUT_PARTS)
        shared = p * row_delta[None, :]
        norm_sum -= tl.sum(shared, axis=1)
        grad = p * grad - norm[:, None] * shared
        bias_sum += tl.sum(grad, axis=1)
        if WANT_WEIGHTS:
            grad_high, grad_low = split(grad, PARTS)
            weight_sum = product(grad_high, grad_low, q_high, q_low, weight_sum, PARTS, INPUT_PARTS)
    found = (group_long * chunks + chunk) * features + f
    found_at = found[:, None] * WIDTH + c[None, :]
    tl.store(table_grad + found_at, table_sum, mask=inside[:, None])
    tl.store(normaliser_grad + found, norm_sum, mask=inside)
    tl.store(bias_grad + found, bias_sum, mask=inside)
    if WANT_WEIGHTS:
        tl.store(weight_grad + found_at, weight_sum * root, mask=inside[:, None])


@operator("feature_mix_backward")
def mix_gradients(
    query: Tensor,
    weights: Tensor,
    table: Tensor,
    normalisers: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    seed: Tensor | None,
    result: Tensor,
    lse: Tensor,
    above: Tensor,
    root: float,
    dropout_p: float,
    precise: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, weights (an empty tensor if they are not wanted), table, normalisers and bias."""
    query, above = rows(query), rows(above)
    batch, heads, length, width = query.shape
    features, groups, block = weights.shape[-2], batch * heads, block_of(weights.shape[-2])
    shared = (
        None if keep is None else keep.contiguous().view(torch.uint8),
        *split_tensor(weights),
        *split_tensor(table),
        normalisers.contiguous(),
        None if bias is None else bias.contiguous(),
        seed,
        lse,
    )
    sizes = (features * width if weights.dim() == 4 else 0, heads, length, features)
    strides = (*query.stride()[:3], *above.stride()[:3])
    numbers = (root * LOG2_E, root, LOG2_E, *drop_limits(dropout_p))
    options = {
        "WIDTH": width,
        "BLOCK": block,
        "INPUT_PARTS": parts_of(query.dtype),
        "WEIGHT_PARTS": parts_of(weights.dtype),
        "PARTS": 2 if precise else parts_of(query.dtype),
        "HAS_BIAS": bias is not None,
        "HAS_KEEP": keep is not None,
        "DROPOUT": dropout_p > 0.0,
        "num_stages": 2 if width <= 64 else 1,
    }
    query_grad, delta = empty_like_rows(query), torch.empty_like(lse)
    if result.stride() != query_grad.stride():
        result = empty_like_rows(query).copy_(result)
    tile = 128 if length > 64 else 64
    grid, warps = (groups * triton.cdiv(length, tile),), tile // 16
    outputs = (delta, query_grad, *strides, *query_grad.stride()[:3])
    arguments = (query, above, result, *shared, *outputs, *sizes, *numbers)
    _token_kernel[grid](*arguments, TILE=tile, num_warps=warps, **options)
    blocks = triton.cdiv(features, block)
    chunks, chunk_size = share_out(length, 64, groups * blocks)
    shape = (batch, heads, chunks, features)
    lines = [torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2)]
    tables = [torch.empty(*shape, width, dtype=torch.float32, device=query.device) for _ in range(1 + want_weights)]
    outputs = (delta, tables[-1], tables[0], *lines)
    grid, sizes = (groups * chunks * blocks,), (*sizes, chunks, chunk_size)
    options["WANT_WEIGHTS"] = want_weights
    arguments = (query, above, *shared, *outputs, *strides, *sizes, *numbers)
    _feature_kernel[grid](*arguments, TILE=64, num_warps=4, **options)
    weight_grad = weights.new_empty(0)
    if want_weights:
        weight_grad = tables[1].sum(dim=(2,) if weights.dim() == 4 else (0, 1, 2)).to(weights.dtype)
    return query_grad, weight_grad, tables[0].sum(dim=2), *(x.sum(dim=2) for x in lines)


@mix_gradients.register_fake
def _(
    query: Tensor,
    weights: Tensor,
    table: Tensor,
    normalisers: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    seed: Tensor | None,
    result: Tensor,
    lse: Tensor,
    above: Tensor,
    root: float,
    dropout_p: float,
    precise: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight_grad = weights.new_empty(weights.shape) if want_weights else weights.new_empty(0)
    lines = [normalisers.new_empty(normalisers.shape) for _ in range(2)]
    return empty_like_rows(query), weight_grad, table.new_empty(table.shape), *lines
