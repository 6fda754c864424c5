"""Gradients of `features.feature_sums`: features are computed again, and never written to memory."""

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
    key,
    value,
    keep,
    high,
    low,
    seed,
    tops,
    sums_high,
    sums_low,
    ones_grad,
    key_grad,
    value_grad,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    grad_batch,
    grad_head,
    grad_token,
    weight_group,
    heads,
    length,
    features,
    scale,
    half,
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
    HALF_NORM: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
):
    """Gradients of one tile of keys and values, over all features; tokens are the rows."""
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
    key_at = key + batch * key_batch + head * key_head + t_long[:, None] * key_token + c[None, :]
    value_at = value + batch * value_batch + head * value_head + t_long[:, None] * value_token + c[None, :]
    k = tl.load(key_at, mask=there[:, None], other=0.0)
    v = tl.load(value_at, mask=there[:, None], other=0.0)
    k_high, k_low = split(k, INPUT_PARTS)
    v_high, v_low = split(v, INPUT_PARTS)
    shifts = tl.zeros([TILE], tl.float32)
    if HALF_NORM:
        wide = k.to(tl.float32)
        shifts = tl.sum(wide * wide, axis=1) * half
    shifts = tl.where(there, shifts, float("inf"))
    if DROPOUT:
        drawn = draw_key(seed, group)
        token_lines = draw_lines(drawn, t, 0)
        whole = tl.where(draws(token_lines) >= first_kept, factor_kept, 0.0)
    key_sum = tl.zeros([TILE, WIDTH], tl.float32)
    value_sum = tl.zeros([TILE, WIDTH], tl.float32)
    logit_sum = tl.zeros([TILE], tl.float32)
    for begin in range(0, features, BLOCK):
        f = begin + tl.arange(0, BLOCK)
        inside = f < features
        weight_at = group_long * weight_group + f[:, None] * WIDTH + c[None, :]
        w = tl.load(high + weight_at, mask=inside[:, None], other=0.0)
        w_low = w
        if WEIGHT_PARTS == 2:
            w_low = tl.load(low + weight_at, mask=inside[:, None], other=0.0)
        row = group_long * features + f
        above_at = row[:, None] * WIDTH + c[None, :]
        above = tl.load(sums_high + above_at, mask=inside[:, None], other=0.0)
        above_low = tl.load(sums_low + above_at, mask=inside[:, None], other=0.0)
        top = tl.load(tops + row, mask=inside, other=float("inf")) * log2_e
        above_ones = tl.load(ones_grad + row, mask=inside, other=0.0)
        logits = tl.zeros([TILE, BLOCK], tl.float32)
        logits = product(k_high, k_low, tl.trans(w), tl.trans(w_low), logits, INPUT_PARTS, WEIGHT_PARTS) * scale
        phi = tl.exp2(logits - shifts[:, None] - top[None, :])
        grad = tl.zeros([TILE, BLOCK], tl.float32)
        grad = product(v_high, v_low, tl.trans(above), tl.trans(above_low), grad, INPUT_PARTS, 2)
        kept = phi
        if DROPOUT:
            if WHOLE_KEYS:
                grad = grad * whole[:, None]
                kept = phi * whole[:, None]
            else:
                feature_lines = draw_lines(drawn, f, 0x2545F491)
                stays = draws(token_lines[:, None] ^ feature_lines[None, :]) >= first_kept
                grad = tl.where(stays, grad * factor_kept, 0.0)
                kept = tl.where(stays, phi * factor_kept, 0.0)
        kept_high, kept_low = split(kept, PARTS)
        value_sum = product(kept_high, kept_low, above, above_low, value_sum, PARTS, PARTS)
        grad = phi * (grad + above_ones[None, :])
        if HALF_NORM:
            logit_sum += tl.sum(grad, axis=1)
        grad_high, grad_low = split(grad, PARTS)
        if PARTS == 2:
            key_sum = product(grad_high, grad_low, w, w_low, key_sum, PARTS, WEIGHT_PARTS)
        else:
            key_sum = tl.dot(grad_high, w, key_sum)
    key_sum = key_sum * root
    if HALF_NORM:
        key_sum = key_sum - k.to(tl.float32) * (logit_sum * root * root)[:, None]
    grad_at = batch * grad_batch + head * grad_head + t_long[:, None] * grad_token + c[None, :]
    tl.store(key_grad + grad_at, key_sum.to(key_grad.dtype.element_ty), mask=exists[:, None])
    tl.store(value_grad + grad_at, value_sum.to(value_grad.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _weight_kernel(
    key,
    value,
    keep,
    high,
    low,
    seed,
    tops,
    sums_high,
    sums_low,
    ones_grad,
    weight_grad,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    weight_group,
    heads,
    length,
    features,
    chunks,
    chunk_size,
    scale,
    half,
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
    HALF_NORM: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
):
    """What one chunk of tokens adds to the gradient of one block of weights; features are the rows."""
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
    above_at = row[:, None] * WIDTH + c[None, :]
    above = tl.load(sums_high + above_at, mask=inside[:, None], other=0.0)
    above_low = tl.load(sums_low + above_at, mask=inside[:, None], other=0.0)
    top = tl.load(tops + row, mask=inside, other=float("inf")) * log2_e
    above_ones = tl.load(ones_grad + row, mask=inside, other=0.0)
    if DROPOUT:
        drawn = draw_key(seed, group)
        feature_lines = draw_lines(drawn, f, 0x2545F491)
    key_base = key + batch * key_batch + head * key_head
    value_base = value + batch * value_batch + head * value_head
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    start = chunk * chunk_size
    for begin in range(start, tl.minimum(start + chunk_size, length), TILE):
        t = begin + tl.arange(0, TILE)
        there = t < length
        if HAS_KEEP:
            there = there & (tl.load(keep + batch * length + t, mask=there, other=0) != 0)
        t_long = t.to(tl.int64)
        k = tl.load(key_base + t_long[:, None] * key_token + c[None, :], mask=there[:, None], other=0.0)
        v = tl.load(value_base + t_long[:, None] * value_token + c[None, :], mask=there[:, None], other=0.0)
        k_high, k_low = split(k, INPUT_PARTS)
        v_high, v_low = split(v, INPUT_PARTS)
        logits = tl.zeros([BLOCK, TILE], tl.float32)
        logits = product(w, w_low, tl.trans(k_high), tl.trans(k_low), logits, WEIGHT_PARTS, INPUT_PARTS) * scale
        if HALF_NORM:
            wide = k.to(tl.float32)
            logits = logits - (tl.sum(wide * wide, axis=1) * half)[None, :]
        phi = tl.where(there[None, :], tl.exp2(logits - top[:, None]), 0.0)
        grad = tl.zeros([BLOCK, TILE], tl.float32)
        grad = product(above, above_low, tl.trans(v_high), tl.trans(v_low), grad, 2, INPUT_PARTS)
        if DROPOUT:
            token_lines = draw_lines(drawn, t, 0)
            if WHOLE_KEYS:
                grad = grad * tl.where(draws(token_lines) >= first_kept, factor_kept, 0.0)[None, :]
            else:
                stays = draws(feature_lines[:, None] ^ token_lines[None, :]) >= first_kept
                grad = tl.where(stays, grad * factor_kept, 0.0)
        grad_high, grad_low = split(phi * (grad + above_ones[:, None]), PARTS)
        acc = product(grad_high, grad_low, k_high, k_low, acc, PARTS, INPUT_PARTS)
    found = (group_long * chunks + chunk) * features + f
    tl.store(weight_grad + found[:, None] * WIDTH + c[None, :], acc * root, mask=inside[:, None])


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
    sums_high, sums_low = split_tensor(sums_grad)
    shared = (
        key,
        value,
        None if keep is None else keep.contiguous().view(torch.uint8),
        *split_tensor(weights),
        seed,
        top.contiguous(),
        sums_high,
        sums_low,
        ones_grad.float().contiguous(),
    )
    sizes = (features * width if weights.dim() == 4 else 0, heads, length, features)
    strides = (*key.stride()[:3], *value.stride()[:3])
    numbers = (root * LOG2_E, root * root / 2 * LOG2_E, root, LOG2_E, *drop_limits(dropout_p))
    options = {
        "WIDTH": width,
        "BLOCK": block,
        "INPUT_PARTS": parts_of(key.dtype),
        "WEIGHT_PARTS": parts_of(weights.dtype),
        "PARTS": 2 if precise else parts_of(key.dtype),
        "HALF_NORM": half_norm,
        "HAS_KEEP": keep is not None,
        "DROPOUT": dropout_p > 0.0,
        "WHOLE_KEYS": whole_keys,
        "num_stages": 2 if width <= 64 else 1,
    }
    key_grad, value_grad = empty_like_rows(key), empty_like_rows(value)
    tile = 128 if length > 64 else 64
    grid, warps = (groups * triton.cdiv(length, tile),), tile // 16
    outputs = (key_grad, value_grad, *strides, *key_grad.stride()[:3])
    _token_kernel[grid](*shared, *outputs, *sizes, *numbers, TILE=tile, num_warps=warps, **options)
    if not want_weights:
        return key_grad, value_grad, weights.new_empty(0)
    blocks = triton.cdiv(features, block)
    chunks, chunk_size = share_out(length, 64, groups * blocks)
    found = torch.empty(batch, heads, chunks, features, width, dtype=torch.float32, device=key.device)
    grid, sizes = (groups * chunks * blocks,), (*sizes, chunks, chunk_size)
    _weight_kernel[grid](*shared, found, *strides, *sizes, *numbers, TILE=64, num_warps=4, **options)
    over = (2,) if weights.dim() == 4 else (0, 1, 2)
    return key_grad, value_grad, found.sum(dim=over).to(weights.dtype)


@sum_gradients.register_fake
def _(
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
    weights_grad = weights.new_empty(weights.shape) if want_weights else weights.new_empty(0)
    return empty_like_rows(key), empty_like_rows(value), weights_grad
