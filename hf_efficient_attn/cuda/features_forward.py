"""The forward kernels of `features`, and what starts them."""

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
from .tiles import empty_like_rows, rows


_TILE = 64  # tokens at a time in the sums, where features are the rows


@triton.jit
def _sum_kernel(
    key,
    value,
    keep,
    high,
    low,
    seed,
    sums,
    ones,
    tops,
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
    """One block of features of one head, over one chunk of its tokens. Logarithms are of base 2 in here."""
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
    if DROPOUT:
        drawn = draw_key(seed, group)
        feature_lines = draw_lines(drawn, f, 0x2545F491)
    key_base = key + batch * key_batch + head * key_head
    value_base = value + batch * value_batch + head * value_head
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    start = chunk * chunk_size
    for begin in range(start, tl.minimum(start + chunk_size, length), TILE):
        t = begin + tl.arange(0, TILE)
        there = t < length
        if HAS_KEEP:
            there = there & (tl.load(keep + batch * length + t, mask=there, other=0) != 0)
        t_long = t.to(tl.int64)
        k = tl.load(key_base + t_long[:, None] * key_token + c[None, :], mask=there[:, None], other=0.0)
        k_high, k_low = split(k, INPUT_PARTS)
        logits = tl.zeros([BLOCK, TILE], tl.float32)
        logits = product(w, w_low, tl.trans(k_high), tl.trans(k_low), logits, WEIGHT_PARTS, INPUT_PARTS) * scale
        if HALF_NORM:
            wide = k.to(tl.float32)
            logits = logits - (tl.sum(wide * wide, axis=1) * half)[None, :]
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        phi = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(phi, axis=1)
        if DROPOUT:
            token_lines = draw_lines(drawn, t, 0)
            if WHOLE_KEYS:
                phi = phi * tl.where(draws(token_lines) >= first_kept, factor_kept, 0.0)[None, :]
            else:
                kept = draws(feature_lines[:, None] ^ token_lines[None, :]) >= first_kept
                phi = tl.where(kept, phi * factor_kept, 0.0)
        v = tl.load(value_base + t_long[:, None] * value_token + c[None, :], mask=there[:, None], other=0.0)
        v_high, v_low = split(v, INPUT_PARTS)
        phi_high, phi_low = split(phi, PARTS)
        acc = product(phi_high, phi_low, v_high, v_low, acc * shrink[:, None], PARTS, INPUT_PARTS)
        top = higher
    row = (group_long * chunks + chunk) * features + f
    tl.store(sums + row[:, None] * WIDTH + c[None, :], acc, mask=inside[:, None])
    tl.store(ones + row, total, mask=inside)
    tl.store(tops + row, top, mask=inside)


@triton.jit
def _mix_kernel(
    query,
    keep,
    high,
    low,
    table_high,
    table_low,
    normalisers,
    bias,
    seed,
    result,
    lse,
    query_batch,
    query_head,
    query_token,
    result_batch,
    result_head,
    result_token,
    weight_group,
    heads,
    length,
    features,
    scale,
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
    """One tile of tokens of one head over all features, like softmax attention whose keys are the weights."""
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
    query_at = query + batch * query_batch + head * query_head
    q = tl.load(query_at + t_long[:, None] * query_token + c[None, :], mask=there[:, None], other=0.0)
    q_high, q_low = split(q, INPUT_PARTS)
    if DROPOUT:
        drawn = draw_key(seed, group)
        token_lines = draw_lines(drawn, t, 0)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
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
        norm = tl.load(normalisers + row, mask=inside, other=0.0)
        if HAS_BIAS:
            shifts = tl.load(bias + row, mask=inside, other=float("-inf")) * log2_e
        else:
            shifts = tl.where(inside, 0.0, float("-inf"))
        logits = tl.zeros([TILE, BLOCK], tl.float32)
        logits = product(q_high, q_low, tl.trans(w), tl.trans(w_low), logits, INPUT_PARTS, WEIGHT_PARTS) * scale
        logits = logits + shifts[None, :]
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p * norm[None, :], axis=1)
        if DROPOUT:
            feature_lines = draw_lines(drawn, f, 0x2545F491)
            kept = draws(token_lines[:, None] ^ feature_lines[None, :]) >= first_kept
            p = tl.where(kept, p * factor_kept, 0.0)
        p_high, p_low = split(p, PARTS)
        table_at = row[:, None] * WIDTH + c[None, :]
        values = tl.load(table_high + table_at, mask=inside[:, None], other=0.0)
        values_low = tl.load(table_low + table_at, mask=inside[:, None], other=0.0)
        acc = product(p_high, p_low, values, values_low, acc * shrink[:, None], PARTS, 2)
        top = higher
    # Nothing to attend is a row of zeros; infinity makes its probabilities 0 in the backward pass.
    empty = (total == 0.0) | (there == 0)
    total = tl.where(empty, 1.0, total)
    acc = tl.where(empty[:, None], 0.0, acc / total[:, None])
    tl.store(lse + group_long * length + t, tl.where(empty, float("inf"), top + tl.log2(total)), mask=exists)
    result_at = result + batch * result_batch + head * result_head
    tl.store(
        result_at + t_long[:, None] * result_token + c[None, :],
        acc.to(result.dtype.element_ty),
        mask=exists[:, None],
    )


def sum_over_keys(
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    keep: Tensor | None,
    seed: Tensor | None,
    root: float,
    half_norm: bool,
    dropout_p: float,
    whole_keys: bool,
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `features.feature_sums`."""
    key, value = rows(key), rows(value)
    batch, heads, length, width = key.shape
    features, groups = weights.shape[-2], batch * heads
    block = block_of(features)
    blocks = triton.cdiv(features, block)
    chunks, chunk_size = share_out(length, _TILE, groups * blocks)
    high, low = split_tensor(weights)
    first_kept, factor_kept = drop_limits(dropout_p)
    sums = torch.empty(batch, heads, chunks, features, width, dtype=torch.float32, device=key.device)
    ones, tops = (torch.empty(sums.shape[:-1], dtype=torch.float32, device=key.device) for _ in range(2))
    _sum_kernel[(groups * chunks * blocks,)](
        key,
        value,
        None if keep is None else keep.contiguous().view(torch.uint8),
        high,
        low,
        seed,
        sums,
        ones,
        tops,
        *key.stride()[:3],
        *value.stride()[:3],
        features * width if weights.dim() == 4 else 0,
        heads,
        length,
        features,
        chunks,
        chunk_size,
        root * LOG2_E,
        root * root / 2 * LOG2_E,
        first_kept,
        factor_kept,
        WIDTH=width,
        TILE=_TILE,
        BLOCK=block,
        INPUT_PARTS=parts_of(key.dtype),
        WEIGHT_PARTS=parts_of(weights.dtype),
        PARTS=2 if precise else parts_of(key.dtype),
        HALF_NORM=half_norm,
        HAS_KEEP=keep is not None,
        DROPOUT=dropout_p > 0.0,
        WHOLE_KEYS=whole_keys,
        num_warps=4,
        num_stages=2,
    )
    top = tops.amax(dim=2)
    top.masked_fill_(top == -torch.inf, 0.0)
    share = torch.exp2(tops - top[:, :, None])
    return (sums * share[..., None]).sum(dim=2), (ones * share).sum(dim=2), top / LOG2_E


def mix_for_queries(
    query: Tensor,
    weights: Tensor,
    table: Tensor,
    normalisers: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    seed: Tensor | None,
    root: float,
    dropout_p: float,
    precise: bool,
) -> tuple[Tensor, Tensor]:
    """See `features.feature_mix`; and the logarithms of base 2 of the normalisers, inf where a row is 0."""
    query = rows(query)
    batch, heads, length, width = query.shape
    features, groups = weights.shape[-2], batch * heads
    tile = 128 if length > 64 else 64
    high, low = split_tensor(weights)
    table_high, table_low = split_tensor(table)
    result = empty_like_rows(query)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    first_kept, factor_kept = drop_limits(dropout_p)
    _mix_kernel[(groups * triton.cdiv(length, tile),)](
        query,
        None if keep is None else keep.contiguous().view(torch.uint8),
        high,
        low,
        table_high,
        table_low,
        normalisers.contiguous(),
        None if bias is None else bias.contiguous(),
        seed,
        result,
        lse,
        *query.stride()[:3],
        *result.stride()[:3],
        features * width if weights.dim() == 4 else 0,
        heads,
        length,
        features,
        root * LOG2_E,
        LOG2_E,
        first_kept,
        factor_kept,
        WIDTH=width,
        TILE=tile,
        BLOCK=block_of(features),
        INPUT_PARTS=parts_of(query.dtype),
        WEIGHT_PARTS=parts_of(weights.dtype),
        PARTS=2 if precise else parts_of(query.dtype),
        HAS_BIAS=bias is not None,
        HAS_KEEP=keep is not None,
        DROPOUT=dropout_p > 0.0,
        num_warps=8 if tile == 128 else 4,
        num_stages=2,
    )
    return result, lse
