"""The forward kernels of `features`, and what starts them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import (
    LN_2,
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
    whole_factors,
)
from .tiles import contiguous, empty_like_rows, flags, load_biases, load_rows, load_split, offsets, places, rows


_TILE = 64  # tokens at a time in the sums, where features are the rows
_JOINED = 16  # features at a time where sums of chunks are added up


@triton.jit
def _sum_kernel(
    key, value, keep, high, low, seed, sums, ones, tops,
    key_batch, key_head, key_token, value_batch, value_head, value_token, weight_group,
    heads, length, features, chunks, chunk_size, scale, half, first_kept, factor_kept,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, PARTS: tl.constexpr, HALF_NORM: tl.constexpr, HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr, WHOLE_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of features of one head, over one chunk of its tokens. Logarithms are of base 2 in here."""
    blocks = tl.cdiv(features, BLOCK)
    part, group, batch, head = places(chunks * blocks, heads)
    chunk, block = part // blocks, part % blocks
    f = block * BLOCK + tl.arange(0, BLOCK)
    inside = f < features
    w, w_low = load_split(high, low, group * weight_group + f, inside, WIDTH, WEIGHT_PARTS)
    if DROPOUT:
        drawn = draw_key(seed, group)
        feature_lines = column_draws(drawn, f)
    key_base = key + batch * key_batch + head * key_head
    value_base = value + batch * value_batch + head * value_head
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    start = chunk * chunk_size
    for begin in range(start, tl.minimum(start + chunk_size, length), TILE):
        t = begin + tl.arange(0, TILE)
        there = flags(t < length, keep, batch * length, t, HAS_KEEP)
        k = load_rows(key_base, t, there, key_token, WIDTH)
        k_high, k_low = split(k, INPUT_PARTS)
        logits = pairwise(w, w_low, k_high, k_low, WEIGHT_PARTS, INPUT_PARTS) * scale
        if HALF_NORM:
            logits = logits - (rowwise(k, k) * half)[None, :]
        logits = tl.where(there[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        phi = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(phi, axis=1)
        if DROPOUT:
            token_lines = row_draws(drawn, t)
            if WHOLE_KEYS:
                phi = phi * whole_factors(token_lines, first_kept, factor_kept)[None, :]
            else:
                stays = kept(feature_lines, token_lines, first_kept)
                phi = tl.where(stays, phi * factor_kept, 0.0)
        v = load_rows(value_base, t, there, value_token, WIDTH)
        v_high, v_low = split(v, INPUT_PARTS)
        phi_high, phi_low = split(phi, PARTS)
        acc = product(phi_high, phi_low, v_high, v_low, acc * shrink[:, None], PARTS, INPUT_PARTS)
        top = higher
    row = (group * chunks + chunk) * features + f
    tl.store(sums + offsets(row, WIDTH, WIDTH), acc, mask=inside[:, None])
    tl.store(ones + row, total, mask=inside)
    tl.store(tops + row, top, mask=inside)


@triton.jit
def _mix_kernel(
    query, keep, high, low, table_high, table_low, normalisers, bias, seed, result, lse,
    query_batch, query_head, query_token, result_batch, result_head, result_token, weight_group,
    heads, length, features, scale, first_kept, factor_kept,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, INPUT_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEEP: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one head over all features, like softmax attention whose keys are the weights."""
    tile, group, batch, head = places(tl.cdiv(length, TILE), heads)
    t = tile * TILE + tl.arange(0, TILE)
    exists = t < length
    there = flags(exists, keep, batch * length, t, HAS_KEEP)
    q = load_rows(query + batch * query_batch + head * query_head, t, there, query_token, WIDTH)
    q_high, q_low = split(q, INPUT_PARTS)
    if DROPOUT:
        drawn = draw_key(seed, group)
        token_lines = row_draws(drawn, t)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, WIDTH], tl.float32)
    for begin in range(0, features, BLOCK):
        f = begin + tl.arange(0, BLOCK)
        inside = f < features
        w, w_low = load_split(high, low, group * weight_group + f, inside, WIDTH, WEIGHT_PARTS)
        row = group * features + f
        norm = tl.load(normalisers + row, mask=inside, other=0.0)
        shifts = load_biases(bias, row, inside, HAS_BIAS)
        logits = pairwise(q_high, q_low, w, w_low, INPUT_PARTS, WEIGHT_PARTS) * scale
        logits = logits + shifts[None, :]
        higher = tl.maximum(top, tl.max(logits, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p * norm[None, :], axis=1)
        if DROPOUT:
            feature_lines = column_draws(drawn, f)
            stays = kept(token_lines, feature_lines, first_kept)
            p = tl.where(stays, p * factor_kept, 0.0)
        p_high, p_low = split(p, PARTS)
        values, values_low = load_split(table_high, table_low, row, inside, WIDTH, 2)
        acc = product(p_high, p_low, values, values_low, acc * shrink[:, None], PARTS, 2)
        top = higher
    # Nothing to attend is a row of zeros; infinity makes its probabilities 0 in the backward pass.
    empty = (total == 0.0) | (there == 0)
    total = tl.where(empty, 1.0, total)
    acc = tl.where(empty[:, None], 0.0, acc / total[:, None])
    tl.store(lse + group * length + t, tl.where(empty, float("inf"), top + tl.log2(total)), mask=exists)
    target = result + batch * result_batch + head * result_head + offsets(t, result_token, WIDTH)
    tl.store(target, acc.to(result.dtype.element_ty), mask=exists[:, None])


@triton.jit
def _join_kernel(
    sums, ones, tops, all_sums, all_ones, all_tops,
    features, chunks, natural,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of all chunks of a head, for one block of features, from each chunk's own and its largest logarithm."""
    blocks = tl.cdiv(features, BLOCK)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    f = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = f < features
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for chunk in range(0, chunks):
        row = (group * chunks + chunk) * features + f
        top = tl.maximum(top, tl.load(tops + row, mask=inside, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for chunk in range(0, chunks):
        row = (group * chunks + chunk) * features + f
        share = tl.exp2(tl.load(tops + row, mask=inside, other=float("-inf")) - top)
        total += share * tl.load(ones + row, mask=inside, other=0.0)
        acc += share[:, None] * load_rows(sums, row, inside, WIDTH, WIDTH)
    row = group * features + f
    tl.store(all_tops + row, top * natural, mask=inside)
    tl.store(all_ones + row, total, mask=inside)
    tl.store(all_sums + offsets(row, WIDTH, WIDTH), acc, mask=inside[:, None])


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
    blocks = ceil_div(features, block)
    chunks, chunk_size = share_out(length, _TILE, groups * blocks)
    sums = torch.empty(batch, heads, chunks, features, width, dtype=torch.float32, device=key.device)
    ones, tops = (torch.empty(sums.shape[:-1], dtype=torch.float32, device=key.device) for _ in range(2))
    _sum_kernel[(groups * chunks * blocks,)](
        key,
        value,
        *contiguous(keep),
        *split_tensor(weights),
        seed,
        sums,
        ones,
        tops,
        *key.stride()[:3],
        *value.stride()[:3],
        features if weights.dim() == 4 else 0,
        heads,
        length,
        features,
        chunks,
        chunk_size,
        root * LOG2_E,
        root * root / 2 * LOG2_E,
        *drop_limits(dropout_p),
        **split_options(key, weights, precise),
        TILE=_TILE,
        HALF_NORM=half_norm,
        HAS_KEEP=keep is not None,
        DROPOUT=dropout_p > 0.0,
        WHOLE_KEYS=whole_keys,
        num_warps=4,
        num_stages=2,
    )
    found = sums.new_empty(batch, heads, features, width)
    lines = [sums.new_empty(batch, heads, features) for _ in range(2)]
    grid = (groups * ceil_div(features, _JOINED),)
    _join_kernel[grid](
        sums, ones, tops, found, *lines, features, chunks, LN_2, WIDTH=width, BLOCK=_JOINED, num_warps=4, num_stages=1
    )
    return found, *lines


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
    result = empty_like_rows(query)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    _mix_kernel[(groups * ceil_div(length, tile),)](
        query,
        *contiguous(keep),
        *split_tensor(weights),
        *split_tensor(table),
        *contiguous(normalisers, bias),
        seed,
        result,
        lse,
        *query.stride()[:3],
        *result.stride()[:3],
        features if weights.dim() == 4 else 0,
        heads,
        length,
        features,
        root * LOG2_E,
        *drop_limits(dropout_p),
        **split_options(query, weights, precise),
        TILE=tile,
        HAS_BIAS=bias is not None,
        HAS_KEEP=keep is not None,
        DROPOUT=dropout_p > 0.0,
        num_warps=8 if tile == 128 else 4,
        num_stages=2,
    )
    return result, lse
