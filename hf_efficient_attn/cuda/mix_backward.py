"""Gradients of `features.feature_mix`: probabilities are computed again from what their rows were divided by."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    LOG2_E,
    block_of,
    ceil_div,
    column_draws,
    draw_key,
    drop_limits,
    kept,
    pairwise,
    product,
    row_draws,
    rowwise,
    share_out,
    split,
    split_options,
    split_tensor,
)
from .operators import operator
from .tiles import (
    contiguous,
    empty_like_rows,
    flags,
    load_biases,
    load_rows,
    load_split,
    offsets,
    places,
    rows,
    tile_of_gradients,
)


@triton.jit
def _token_kernel(
    query, above, result, keep, high, low, table_high, table_low, normalisers, bias, seed, lse, delta, query_grad,
    query_batch, query_head, query_token, above_batch, above_head, above_token, result_batch, result_head,
    result_token, weight_group,
    heads, length, features, scale, root, first_kept, factor_kept,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries, over all features, and each row's `above . result`; tokens are the rows."""
    tile, group, batch, head = places(tl.cdiv(length, TILE), heads)
    t = tile * TILE + tl.arange(0, TILE)
    exists = t < length
    there = flags(exists, keep, batch * length, t, HAS_KEEP)
    q = load_rows(query + batch * query_batch + head * query_head, t, there, query_token, WIDTH)
    g = load_rows(above + batch * above_batch + head * above_head, t, there, above_token, WIDTH)
    # The gradient and the result lie alike: both as the heads are merged.
    result_offset = batch * result_batch + head * result_head + offsets(t, result_token, WIDTH)
    r = tl.load(result + result_offset, mask=there[:, None], other=0.0)
    row_delta = rowwise(g, r)
    tl.store(delta + group * length + t, row_delta, mask=exists)
    row_lse = tl.load(lse + group * length + t, mask=exists, other=float("inf"))
    q_high, q_low = split(q, INPUT_PARTS)
    g_high, g_low = split(g, INPUT_PARTS)
    if DROPOUT:
        drawn = draw_key(seed, group)
        token_lines = row_draws(drawn, t)
    acc = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, features, BLOCK):
        f = begin + tl.arange(0, BLOCK)
        inside = f < features
        w, w_low = load_split(high, low, group * weight_group + f, inside, WIDTH, WEIGHT_PARTS)
        row = group * features + f
        values, values_low = load_split(table_high, table_low, row, inside, WIDTH, 2)
        norm = tl.load(normalisers + row, mask=inside, other=0.0)
        shifts = load_biases(bias, row, inside, HAS_BIAS)
        logits = pairwise(q_high, q_low, w, w_low, INPUT_PARTS, WEIGHT_PARTS) * scale
        p = tl.exp2(logits + shifts[None, :] - row_lse[:, None])
        grad = pairwise(g_high, g_low, values, values_low, INPUT_PARTS, 2)
        if DROPOUT:
            feature_lines = column_draws(drawn, f)
            stays = kept(token_lines, feature_lines, first_kept)
            grad = tl.where(stays, grad * factor_kept, 0.0)
        grad = p * (grad - norm[None, :] * row_delta[:, None])
        grad_high, grad_low = split(grad, PARTS)
        acc = product(grad_high, grad_low, w, w_low, acc, PARTS, WEIGHT_PARTS if PARTS == 2 else 1)
    tl.store(query_grad + result_offset, (acc * root).to(query_grad.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _feature_kernel(
    query, above, keep, high, low, table_high, table_low, normalisers, bias, seed, lse, delta, weight_grad,
    table_grad, normaliser_grad, bias_grad,
    query_batch, query_head, query_token, above_batch, above_head, above_token, weight_group,
    heads, length, features, chunks, chunk_size, scale, root, first_kept, factor_kept,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr, WANT_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """What one chunk of tokens adds to the gradients of one block of features; features are the rows."""
    blocks = tl.cdiv(features, BLOCK)
    part, group, batch, head = places(chunks * blocks, heads)
    chunk, block = part // blocks, part % blocks
    f = block * BLOCK + tl.arange(0, BLOCK)
    inside = f < features
    w, w_low = load_split(high, low, group * weight_group + f, inside, WIDTH, WEIGHT_PARTS)
    row = group * features + f
    values, values_low = load_split(table_high, table_low, row, inside, WIDTH, 2)
    norm = tl.load(normalisers + row, mask=inside, other=0.0)
    shifts = load_biases(bias, row, inside, HAS_BIAS)
    if DROPOUT:
        drawn = draw_key(seed, group)
        feature_lines = column_draws(drawn, f)
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
        there = flags(exists, keep, batch * length, t, HAS_KEEP)
        q = load_rows(query_base, t, there, query_token, WIDTH)
        g = load_rows(above_base, t, there, above_token, WIDTH)
        row_lse = tl.load(lse + group * length + t, mask=exists, other=float("inf"))
        row_delta = tl.load(delta + group * length + t, mask=exists, other=0.0)
        q_high, q_low = split(q, INPUT_PARTS)
        g_high, g_low = split(g, INPUT_PARTS)
        logits = pairwise(w, w_low, q_high, q_low, WEIGHT_PARTS, INPUT_PARTS) * scale
        p = tl.exp2(logits + shifts[:, None] - row_lse[None, :])
        spread = p
        grad = pairwise(values, values_low, g_high, g_low, 2, INPUT_PARTS)
        if DROPOUT:
            token_lines = row_draws(drawn, t)
            stays = kept(feature_lines, token_lines, first_kept)
            grad = tl.where(stays, grad * factor_kept, 0.0)
            spread = tl.where(stays, p * factor_kept, 0.0)
        spread_high, spread_low = split(spread, PARTS)
        table_sum = product(spread_high, spread_low, g_high, g_low, table_sum, PARTS, INPUT_PARTS)
        shared = p * row_delta[None, :]
        norm_sum -= tl.sum(shared, axis=1)
        grad = p * grad - norm[:, None] * shared
        bias_sum += tl.sum(grad, axis=1)
        if WANT_WEIGHTS:
            grad_high, grad_low = split(grad, PARTS)
            weight_sum = product(grad_high, grad_low, q_high, q_low, weight_sum, PARTS, INPUT_PARTS)
    found = (group * chunks + chunk) * features + f
    found_at = offsets(found, WIDTH, WIDTH)
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
        *contiguous(keep),
        *split_tensor(weights),
        *split_tensor(table),
        *contiguous(normalisers, bias),
        seed,
        lse,
    )
    sizes = (features if weights.dim() == 4 else 0, heads, length, features)
    strides = (*query.stride()[:3], *above.stride()[:3])
    numbers = (root * LOG2_E, root, *drop_limits(dropout_p))
    options = {
        **split_options(query, weights, precise),
        "HAS_BIAS": bias is not None,
        "HAS_KEEP": keep is not None,
        "DROPOUT": dropout_p > 0.0,
        "num_stages": 2 if width <= 64 else 1,
    }
    query_grad, delta = empty_like_rows(query), torch.empty_like(lse)
    if result.stride() != query_grad.stride():
        result = empty_like_rows(query).copy_(result)
    tile = tile_of_gradients(length)
    grid, warps = (groups * ceil_div(length, tile),), tile // 16
    outputs = (delta, query_grad, *strides, *query_grad.stride()[:3])
    arguments = (query, above, result, *shared, *outputs, *sizes, *numbers)
    _token_kernel[grid](*arguments, TILE=tile, num_warps=warps, **options)
    blocks = ceil_div(features, block)
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
def _(query: Tensor, weights: Tensor, table: Tensor, normalisers: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weight_grad = weights.new_empty(weights.shape if others[-1] else 0)
    lines = [normalisers.new_empty(normalisers.shape) for _ in range(2)]
    return empty_like_rows(query), weight_grad, table.new_empty(table.shape), *lines
