"""Sliding-window attention with optional dilation, a causal form, and extra keys that every query sees."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .dense import biased_attention, dense_attention
from .dense_execution import dense_is_cheaper, dense_is_on
from .fused import fused
from .inputs import check_qkv, count_blocks, masked_bias, zero_padding
from .tokens import TokenSlots, gather_tokens
from .window import (
    Window,
    head_dilations,
    keys_in_windows,
    make_window,
    seen_global_keys,
)
from .window_cpu import cpu_window_attention


# So few rows against the keys of their windows are one small matrix.
_FEW_QUERIES = 64


def sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    radius: int,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
    global_tokens: TokenSlots | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Softmax attention of each query over its window and, in the same softmax, over the global keys.

    Query i attends key j when `j = i + t * dilation` with `|t| <= radius`, or when j is global; a global key inside the
    window counts once. In the causal form only keys `j <= i` count, global ones too. Rows of global tokens are computed
    like any other row.

    Args:
        query: `[batch, heads, length, head_dim]`; in the causal form it may be shorter than the keys, being then the
            last of them (earlier keys come from a cache).
        key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.
        radius: keys on each side, 0 or more (one-sided: a published window of width w is `radius = w // 2`).
        dilation: distance of neighbouring keys of a window, 1 or more; one number, or one a head.
        causal: attend no key after the query.
        global_tokens: the global tokens, none of them padding (`select_tokens`).
        overwrite: without a graph, let the result take the memory of `query`, and set what is padding in `key` and
            `value` to 0 where it stands.

    Returns:
        As `query`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, a negative radius, a dilation below 1 or of the wrong count.

    Beltagy, Peters & Cohan 2020, arXiv 2004.05150. Time O(length * (radius + slots)), memory the same. Inputs that
    windows cover for the most part are computed as one matrix with a mask (`dense_execution`).
    """
    check_qkv(query, key, value, key_padding_mask, last_queries=causal)
    queries, length = query.shape[2], key.shape[2]
    dilations = head_dilations(dilation, query.shape[1])
    window = make_window(radius, causal)
    options = {"window": window, "scale": scale, "dropout_p": dropout_p}
    if queries == length and max(dilations) == 1:
        mixed = _fused(query, key, value, key_padding_mask, global_tokens, **options)
        if mixed is not None:
            return mixed
    query_mask = None if key_padding_mask is None else key_padding_mask[:, length - queries :]
    query = zero_padding(query, query_mask, overwrite)
    key, value = (zero_padding(x, key_padding_mask, overwrite) for x in (key, value))
    steps = sorted(set(dilations))
    if queries < length:
        if queries <= _FEW_QUERIES:
            shape = {"radius": radius, "dilation": dilation, "causal": causal, "queries": queries}
            allowed = sliding_window_allowed(key, key_padding_mask, global_tokens, **shape)
            mixed, _ = dense_attention(query, key, value, allowed, scale=scale, dropout_p=dropout_p)
            return zero_padding(mixed, query_mask)
    sees_all = steps == [1] and not causal and dense_is_on() and radius >= length - 1
    if sees_all or (len(steps) == 1 and dense_is_cheaper(length, window.width, dropout_p)):
        mixed = _dense(query, key, value, key_padding_mask, global_tokens, dilation=steps[0], **options)
        return zero_padding(mixed, query_mask)
    query = F.pad(query, (0, 0, length - queries, 0)) if queries < length else query

    views = steps == [1] and query.device.type == "cpu" and dropout_p < 1.0 and not torch.compiler.is_compiling()
    if views:
        mixed = cpu_window_attention(query, key, value, key_padding_mask, global_tokens, overwrite=overwrite, **options)
    elif len(steps) == 1:
        mixed = _gathered(query, key, value, key_padding_mask, global_tokens, dilation=steps[0], **options)
    else:
        # Heads of one dilation go together; the results are put back in the heads' order.
        groups = [
            torch.tensor([h for h, d in enumerate(dilations) if d == step], device=query.device) for step in steps
        ]
        parts = []
        for step, group in zip(steps, groups, strict=True):
            picked = (x.index_select(1, group) for x in (query, key, value))
            parts.append(_gathered(*picked, key_padding_mask, global_tokens, dilation=step, **options))
        mixed = torch.cat(parts, dim=1).index_select(1, torch.cat(groups).argsort())
    return zero_padding(mixed[:, :, length - queries :], query_mask, overwrite)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    window: Window,
    scale: float | None,
    dropout_p: float,
) -> Tensor | None:
    """The whole of it in one kernel of a GPU; None where there is none."""
    kernel = fused("window", query)
    if kernel is None:
        return None
    slots: dict[str, Tensor | None] = dict.fromkeys(("global_key", "global_value", "global_index", "global_valid"))
    if global_tokens is not None and global_tokens.slots > 0:
        index, valid = global_tokens.index, global_tokens.valid
        slots = {"global_key": gather_tokens(key, index), "global_value": gather_tokens(value, index)}
        slots |= {"global_index": index, "global_valid": valid}
    return kernel(
        query,
        key,
        value,
        key_padding_mask,
        counted=keys_in_windows(key_padding_mask, global_tokens),
        back=window.back,
        ahead=window.ahead,
        causal=window.causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
        **slots,
    )


def sliding_window_allowed(
    key: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    radius: int,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
    queries: int | None = None,
) -> Tensor:
    """Which keys `sliding_window_attention` lets a query attend: bool `[batch or 1, heads, queries, length]`.

    Of `key` `[batch, heads, length, head_dim]` only the shape and device count. Memory O(heads * queries * length).
    """
    heads, length = key.shape[1:3]
    queries = length if queries is None else queries
    window = make_window(radius, causal)
    dilations = torch.tensor(head_dilations(dilation, heads), device=key.device)[:, None, None]
    position = torch.arange(length, device=key.device)
    distance = (position[None, :] - position[length - queries :, None])[None]
    near = (distance >= -window.back * dilations) & (distance <= window.ahead * dilations)
    allowed = ((distance % dilations == 0) & near)[None]
    if global_tokens is not None:
        seen = global_tokens.mask[:, None, None, :]
        allowed = allowed | (seen & (distance <= 0) if causal else seen)
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :] & key_padding_mask[:, None, length - queries :, None]
    return allowed


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    window: Window,
    dilation: int,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Every query against every key, with a mask where it does not see all of them."""
    queries, length = query.shape[2], key.shape[2]
    seen = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if dilation > 1 or (window.causal and global_tokens is not None):
        shape = {"radius": window.radius, "dilation": dilation, "causal": window.causal, "queries": queries}
        seen = sliding_window_allowed(key[:, :1], key_padding_mask, global_tokens, **shape)
    elif window.causal or window.radius < length - 1:
        # Bytes, where the way by positions would take as many whole numbers.
        near = torch.ones(queries, length, dtype=torch.bool, device=key.device)
        near = near.tril_(length - queries + window.ahead).triu_(length - queries - window.back)[None, None]
        if global_tokens is not None:
            near = near | global_tokens.mask[:, None, None, :]
        seen = near if seen is None else near & seen
    bias = None if seen is None else masked_bias(seen, query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return biased_attention(query, key, value, bias, scale=scale, dropout_p=dropout_p)


def _block_size(radius: int) -> int:
    # Small blocks waste few keys, large ones make fewer, larger matrix products. Larger than those of the CPU's path,
    # because here all of them are in memory together, with their keys.
    return max(32, min(256, radius))


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    window: Window,
    dilation: int,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Blocks of queries, each against the `block + width` keys around it and the global keys.

    Dilated windows over n tokens are plain windows over `dilation` interleaved sequences; a block lies in one of them.
    Everything is gathered by position, so that no length is padded and no shape depends on divisibility.
    """
    batch, heads, length, _ = query.shape
    device = query.device
    block = _block_size(window.back)
    blocks = count_blocks(count_blocks(length, dilation), block)
    starts = torch.arange(dilation, device=device)[:, None] + torch.arange(blocks, device=device) * (block * dilation)
    starts = starts.flatten()[:, None]
    query_position = starts + torch.arange(block, device=device) * dilation
    key_position = starts + torch.arange(-window.back, block + window.ahead, device=device) * dilation

    usable = ((key_position >= 0) & (key_position < length))[None]
    example = torch.arange(batch, device=device)[:, None, None]
    key_row = key_position.clamp(0, length - 1)[None].expand(batch, -1, -1)
    counted = keys_in_windows(key_padding_mask, global_tokens)
    if counted is not None:
        usable = usable & counted[example, key_row]
    allowed = usable[:, :, None, :] & window.band(block, device)
    if global_tokens is not None and global_tokens.slots > 0:
        seen = seen_global_keys(global_tokens, window.causal, query_position).expand(batch, *query_position.shape, -1)
        allowed = torch.cat([allowed.expand(batch, -1, -1, -1), seen], dim=3)
        global_row = global_tokens.index[:, None, :]
        key_row = torch.cat([key_row, global_row.expand(-1, key_row.shape[1], -1)], dim=2)
    bias = masked_bias(allowed, query.dtype).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    def gather(tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor.transpose(1, 2)[example, rows].flatten(0, 1).transpose(1, 2)

    query_row = query_position.clamp(max=length - 1)[None].expand(batch, -1, -1)
    mixed = F.scaled_dot_product_attention(
        gather(query, query_row),
        gather(key, key_row),
        gather(value, key_row),
        attn_mask=bias,
        dropout_p=dropout_p,
        scale=scale,
    )
    position = torch.arange(length, device=device)
    step = position // dilation
    row = (position % dilation * blocks + step // block) * block + step % block
    table = mixed.transpose(1, 2).reshape(batch, dilation * blocks * block, heads, value.shape[-1])
    return table.index_select(1, row).transpose(1, 2)
