"""Sliding-window attention with optional dilation and extra keys that every query sees."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import check_qkv, masked_bias, zero_padding
from .tokens import TokenSlots, gather_tokens


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
    global_tokens: TokenSlots | None = None,
) -> Tensor:
    """Softmax attention of each query over its window and, in the same softmax, over the global keys.

    Query i attends key j when `j = i + t * dilation` with `|t| <= radius`, or when j is global; a global key inside the
    window counts once. Rows of global tokens are computed like any other row.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.
        radius: keys on each side, 0 or more (one-sided: a published window of width w is `radius = w // 2`).
        dilation: distance of neighbouring keys of a window, 1 or more; one number, or one a head.
        global_tokens: the global tokens, none of them padding (`select_tokens`).

    Returns:
        `[batch, heads, length, head_dim]`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, a negative radius, a dilation below 1 or of the wrong count.

    Beltagy, Peters & Cohan 2020, arXiv 2004.05150. Time O(length * (radius + slots)), memory the same.
    """
    check_qkv(query, key, value, key_padding_mask)
    dilations = check_window(radius, dilation, query.shape[1])
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    local_mask, global_key, global_value, global_valid = key_padding_mask, None, None, None
    if global_tokens is not None and global_tokens.slots > 0:
        global_key, global_value = (gather_tokens(x, global_tokens.index) for x in (key, value))
        global_valid = global_tokens.valid
        # A global key stands in a column of its own, so its place in the window must not count it again.
        local_mask = ~global_tokens.mask if key_padding_mask is None else key_padding_mask & ~global_tokens.mask

    def attend(heads: slice | Tensor, step: int) -> Tensor:
        pick = [None if x is None else x[:, heads] for x in (query, key, value, global_key, global_value)]
        return _dilated(*pick, local_mask, global_valid, radius=radius, dilation=step, scale=scale, dropout_p=dropout_p)

    if len(set(dilations)) == 1:
        mixed = attend(slice(None), dilations[0])
    else:
        steps = sorted(set(dilations))
        groups = [[head for head, step in enumerate(dilations) if step == wanted] for wanted in steps]
        parts = [
            attend(torch.tensor(heads, device=query.device), step) for heads, step in zip(groups, steps, strict=True)
        ]
        order = sorted(range(len(dilations)), key=[head for heads in groups for head in heads].__getitem__)
        mixed = torch.cat(parts, dim=1)[:, torch.tensor(order, device=query.device)]
    return zero_padding(mixed, key_padding_mask)


def check_window(radius: int, dilation: int | Sequence[int], heads: int) -> tuple[int, ...]:
    """`dilation` as one number a head; raises `ValueError` for a radius or dilation that makes no window."""
    if radius < 0:
        raise ValueError(f"radius = {radius}: the number of keys on each side must be 0 or more.")
    dilations = (dilation,) * heads if isinstance(dilation, int) else tuple(dilation)
    if len(dilations) != heads:
        raise ValueError(f"dilation has {len(dilations)} entries for {heads} heads; give one number or one a head.")
    if min(dilations) < 1:
        raise ValueError(f"dilation = {dilation}: each entry must be 1 (no gaps) or more.")
    return dilations


def dense_sliding_window_mask(
    length: int, heads: int, *, radius: int, dilation: int | Sequence[int] = 1, device: torch.device | None = None
) -> Tensor:
    """The window as a matrix: `[1, heads, length, length]` bool, True = attend. Memory O(heads * length^2)."""
    dilations = torch.tensor(check_window(radius, dilation, heads), device=device)[:, None, None]
    position = torch.arange(length, device=device)
    distance = (position[None, :] - position[:, None]).abs()[None]
    return ((distance % dilations == 0) & (distance <= radius * dilations))[None]


def _dilated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    local_mask: Tensor | None,
    global_valid: Tensor | None,
    *,
    radius: int,
    dilation: int,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """A window of dilation d over n tokens is d plain windows over the interleaved sequences of n / d tokens."""
    if dilation == 1:
        return _blocked(
            query, key, value, global_key, global_value, local_mask, global_valid, radius, scale, dropout_p
        )
    batch, heads, length, _ = query.shape
    extra = (dilation - length % dilation) % dilation
    steps = (length + extra) // dilation

    def interleave(tensor: Tensor) -> Tensor:
        padded = F.pad(tensor, (0, 0, 0, extra)).view(batch, heads, steps, dilation, tensor.shape[-1])
        return padded.permute(0, 3, 1, 2, 4).reshape(batch * dilation, heads, steps, tensor.shape[-1])

    mask = local_mask if local_mask is not None else query.new_ones(batch, length, dtype=torch.bool)
    mask = F.pad(mask, (0, extra)).view(batch, steps, dilation).transpose(1, 2).reshape(batch * dilation, steps)
    if global_key is not None:
        global_key, global_value, global_valid = (
            x.repeat_interleave(dilation, dim=0) for x in (global_key, global_value, global_valid)
        )
    query, key, value = interleave(query), interleave(key), interleave(value)
    mixed = _blocked(query, key, value, global_key, global_value, mask, global_valid, radius, scale, dropout_p)
    mixed = mixed.view(batch, dilation, heads, steps, -1).permute(0, 2, 3, 1, 4)
    return mixed.reshape(batch, heads, steps * dilation, -1)[:, :, :length]


def _block_size(radius: int) -> int:
    # Small blocks waste few keys, large ones make fewer, larger matrix products.
    return max(32, min(256, radius))


def _blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    global_key: Tensor | None,
    global_value: Tensor | None,
    local_mask: Tensor | None,
    global_valid: Tensor | None,
    radius: int,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Blocks of queries, each against the `block + 2 * radius` keys around it and the global keys."""
    batch, heads, length, head_dim = query.shape
    block = _block_size(radius)
    blocks = (length + block - 1) // block
    span = block + 2 * radius
    tail = blocks * block - length

    def windows(tensor: Tensor, extra_keys: Tensor | None) -> Tensor:
        spans = F.pad(tensor, (0, 0, radius, radius + tail)).unfold(2, span, block).permute(0, 2, 1, 4, 3)
        if extra_keys is not None:
            extra_keys = extra_keys[:, None].expand(-1, blocks, -1, -1, -1)
            spans = torch.cat([spans, extra_keys.to(spans.dtype)], dim=3)
        return spans.flatten(0, 1)

    if local_mask is None:
        local_mask = torch.ones(1, length, dtype=torch.bool, device=query.device)
    usable = F.pad(local_mask, (radius, radius + tail)).unfold(1, span, block)
    offset = torch.arange(span, device=query.device)[None, :] - torch.arange(block, device=query.device)[:, None]
    in_window = (offset >= 0) & (offset <= 2 * radius)
    allowed = usable[:, :, None, :] & in_window
    if global_key is not None:
        seen = global_valid[:, None, None, :].expand(-1, blocks, block, -1)
        allowed = torch.cat([allowed.expand(batch, -1, -1, -1), seen], dim=3)
    bias = masked_bias(allowed, query.dtype).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    query = F.pad(query, (0, 0, 0, tail)).unflatten(2, (blocks, block)).transpose(1, 2).flatten(0, 1)
    mixed = F.scaled_dot_product_attention(
        query, windows(key, global_key), windows(value, global_value), attn_mask=bias, dropout_p=dropout_p, scale=scale
    )
    mixed = mixed.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
    return mixed[:, :, :length]
