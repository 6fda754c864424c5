"""Gradients of `features.feature_sums`: features are computed again, and never written to memory."""

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
    to_base_2,
    whole_factors,
)
from .operators import operator
from .tiles import contiguous, empty_like_rows, flags, load_rows, load_split, offsets, places, rows, tile_of_gradients


@triton.jit
def _token_kernel(
    key, value, keep, high, low, seed, tops, sums_high, sums_low, ones_grad, key_grad, value_grad,
    key_batch, key_head, key_token, value_batch, value_head, value_token, grad_batch, grad_head, grad_token,
    weight_group,
    heads, length, features, scale, half, root, first_kept, factor_kept,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, PARTS: tl.constexpr, HALF_NORM: tl.constexpr, HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all features; tokens are the rows."""
    tile, group, batch, head = places(tl.cdiv(length, TILE), heads)
    t = tile * TILE + tl.arange(0, TILE)
    exists = t < length
    there = flags(exists, keep, batch * length, t, HAS_KEEP)
    k = load_rows(key + batch * key_batch + head * key_head, t, there, key_token, WIDTH)
    v = load_rows(value + batch * value_batch + head * value_head, t, there, value_token, WIDTH)
    k_high, k_low = split(k, INPUT_PARTS)
    v_high, v_low = split(v, INPUT_PARTS)
    shifts = tl.zeros([TILE], tl.float32)
    if HALF_NORM:
        shifts = rowwise(k, k) * half
    shifts = tl.where(there, shifts, float("inf"))
    if DROPOUT:
        drawn = draw_key(seed, group)
        token_lines = row_draws(drawn, t)
        whole = whole_factors(token_lines, first_kept, factor_kept)
    key_sum = tl.zeros([TILE, WIDTH], tl.float32)
    value_sum = tl.zeros([TILE, WIDTH], tl.float32)
    logit_sum = tl.zeros([TILE], tl.float32)
    for begin in range(0, features, BLOCK):
        f = begin + tl.arange(0, BLOCK)
        inside = f < features
        w, w_low = load_split(high, low, group * weight_group + f, inside, WIDTH, WEIGHT_PARTS)
        row = group * features + f
        above, above_low = load_split(sums_high, sums_low, row, inside, WIDTH, 2)
        top = to_base_2(tl.load(tops + row, mask=inside, other=float("inf")))
        above_ones = tl.load(ones_grad + row, mask=inside, other=0.0)
        logits = pairwise(k_high, k_low, w, w_low, INPUT_PARTS, WEIGHT_PARTS) * scale
        phi = tl.exp2(logits - shifts[:, None] - top[None, :])
        grad = pairwise(v_high, v_low, above, above_low, INPUT_PARTS, 2)
        spread = phi
        if DROPOUT:
            if WHOLE_KEYS:
                grad = grad * whole[:, None]
                spread = phi * whole[:, None]
            else:
                feature_lines = column_draws(drawn, f)
                stays = kept(token_lines, feature_lines, first_kept)
                grad = tl.where(stays, grad * factor_kept, 0.0)
                spread = tl.where(stays, phi * factor_kept, 0.0)
        spread_high, spread_low = split(spread, PARTS)
        value_sum = product(spread_high, spread_low, above, above_low, value_sum, PARTS, PARTS)
        grad = phi * (grad + above_ones[None, :])
        if HALF_NORM:
            logit_sum += tl.sum(grad, axis=1)
        grad_high, grad_low = split(grad, PARTS)
        key_sum = product(grad_high, grad_low, w, w_low, key_sum, PARTS, WEIGHT_PARTS if PARTS == 2 else 1)
    key_sum = key_sum * root
    if HALF_NORM:
        key_sum = key_sum - k.to(tl.float32) * (logit_sum * root * root)[:, None]
    grad_at = batch * grad_batch + head * grad_head + offsets(t, grad_token, WIDTH)
    tl.store(key_grad + grad_at, key_sum.to(key_grad.dtype.element_ty), mask=exists[:, None])
    tl.store(value_grad + grad_at, value_sum.to(value_grad.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _weight_kernel(
    key, value, keep, high, low, seed, tops, sums_high, sums_low, ones_grad, weight_grad,
    key_batch, key_head, key_token, value_batch, value_head, value_token, weight_group,
    heads, length, features, chunks, chunk_size, scale, half, root, first_kept, factor_kept,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, PARTS: tl.constexpr, HALF_NORM: tl.constexpr, HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr,
):  # fmt: skip
    """What one chunk of tokens adds to the gradient of one block of weights; features are the rows."""
    blocks = tl.cdiv(features, BLOCK)
    part, group, batch, head = places(chunks * blocks, heads)
    chunk, block = part // blocks, part % blocks
    f = block * BLOCK + tl.arange(0, BLOCK)
    inside = f < features
    w, w_low = load_split(high, low, group * weight_group + f, inside, WIDTH, WEIGHT_PARTS)
    row = group * features + f
    above, above_low = load_split(sums_high, sums_low, row, inside, WIDTH, 2)
    top = to_base_2(tl.load(tops + row, mask=inside, other=float("inf")))
    above_ones = tl.load(ones_grad + row, mask=inside, other=0.0)
    if DROPOUT:
        drawn = draw_key(seed, group)
        feature_lines = column_draws(drawn, f)
    key_base = key + batch * key_batch + head * key_head
    value_base = value + batch * value_batch + head * value_head
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    start = chunk * chunk_size
    for begin in range(start, tl.minimum(start + chunk_size, length), TILE):
        t = begin + tl.arange(0, TILE)
        there = flags(t < length, keep, batch * length, t, HAS_KEEP)
        k = load_rows(key_base, t, there, key_token, WIDTH)
        v = load_rows(value_base, t, there, value_token, WIDTH)
        k_high, k_low = split(k, INPUT_PARTS)
        v_high, v_low = split(v, INPUT_PARTS)
        logits = pairwise(w, w_low, k_high, k_low, WEIGHT_PARTS, INPUT_PARTS) * scale
        if HALF_NORM:
            logits = logits - (rowwise(k, k) * half)[None, :]
        phi = tl.where(there[None, :], tl.exp2(logits - top[:, None]), 0.0)
        grad = pairwise(above, above_low, v_high, v_low, 2, INPUT_PARTS)
        if DROPOUT:
            token_lines = row_draws(drawn, t)
            if WHOLE_KEYS:
                grad = grad * whole_factors(token_lines, first_kept, factor_kept)[None, :]
            else:
                stays = kept(feature_lines, token_lines, first_kept)
                grad = tl.where(stays, grad * factor_kept, 0.0)
        grad_high, grad_low = split(phi * (grad + above_ones[:, None]), PARTS)
        acc = product(grad_high, grad_low, k_high, k_low, acc, PARTS, INPUT_PARTS)
    found = (group * chunks + chunk) * features + f
    tl.store(weight_grad + offsets(found, WIDTH, WIDTH), acc * root, mask=inside[:, None])


@operator("feature_sums_backward")
def sum_gradients(
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    keep: Tensor | None,
    seed: Tensor | None,
    top: Tensor,
    sums_grad: Tensor,
    ones_grad: Tensor,
    root: float,
    half_norm: bool,
    dropout_p: float,
    whole_keys: bool,
    precise: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, values and, if they are wanted, weights; else an empty tensor in their place."""
    key, value = rows(key), rows(value)
    batch, heads, length, width = key.shape
    features, groups, block = weights.shape[-2], batch * heads, block_of(weights.shape[-2])
    shared = (
        key,
        value,
        *contiguous(keep),
        *split_tensor(weights),
        seed,
        top.contiguous(),
        *split_tensor(sums_grad),
        ones_grad.float().contiguous(),
    )
    sizes = (features if weights.dim() == 4 else 0, heads, length, features)
    strides = (*key.stride()[:3], *value.stride()[:3])
    numbers = (root * LOG2_E, root * root / 2 * LOG2_E, root, *drop_limits(dropout_p))
    options = {
        **split_options(key, weights, precise),
        "HALF_NORM": half_norm,
        "HAS_KEEP": keep is not None,
        "DROPOUT": dropout_p > 0.0,
        "WHOLE_KEYS": whole_keys,
        "num_stages": 2 if width <= 64 else 1,
    }
    key_grad, value_grad = empty_like_rows(key), empty_like_rows(value)
    tile = tile_of_gradients(length)
    grid, warps = (groups * ceil_div(length, tile),), tile // 16
    outputs = (key_grad, value_grad, *strides, *key_grad.stride()[:3])
    _token_kernel[grid](*shared, *outputs, *sizes, *numbers, TILE=tile, num_warps=warps, **options)
    if not want_weights:
        return key_grad, value_grad, weights.new_empty(0)
    blocks = ceil_div(features, block)
    chunks, chunk_size = share_out(length, 64, groups * blocks)
    found = torch.empty(batch, heads, chunks, features, width, dtype=torch.float32, device=key.device)
    grid, sizes = (groups * chunks * blocks,), (*sizes, chunks, chunk_size)
    _weight_kernel[grid](*shared, found, *strides, *sizes, *numbers, TILE=64, num_warps=4, **options)
    over = (2,) if weights.dim() == 4 else (0, 1, 2)
    return key_grad, value_grad, found.sum(dim=over).to(weights.dtype)


@sum_gradients.register_fake
def _(key: Tensor, value: Tensor, weights: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    weights_grad = weights.new_empty(weights.shape if others[-1] else 0)
    return empty_like_rows(key), empty_like_rows(value), weights_grad
