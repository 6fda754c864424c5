"""Sliding-window attention with optional dilation and extra keys that every query sees."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import check_qkv, count_blocks, masked_bias, zero_padding
from .tokens import TokenSlots
from .window_blocks import blocked_window_attention


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
    options = {"radius": radius, "scale": scale, "dropout_p": dropout_p}
    steps = sorted(set(dilations))
    views = steps == [1] and query.device.type == "cpu" and dropout_p < 1.0 and not torch.compiler.is_compiling()
    if views:
        mixed = blocked_window_attention(query, key, value, key_padding_mask, global_tokens, **options)
    elif len(steps) == 1:
        mixed = _blocked(query, key, value, key_padding_mask, global_tokens, dilation=steps[0], **options)
    else:
        # Heads of one dilation go together; the results are put back in the heads' order.
        groups = [
            torch.tensor([h for h, d in enumerate(dilations) if d == step], device=query.device) for step in steps
        ]
        parts = []
        for step, group in zip(steps, groups, strict=True):
            picked = (x.index_select(1, group) for x in (query, key, value))
            parts.append(_blocked(*picked, key_padding_mask, global_tokens, dilation=step, **options))
        mixed = torch.cat(parts, dim=1).index_select(1, torch.cat(groups).argsort())
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


def _block_size(radius: int) -> int:
    # Small blocks waste few keys, large ones make fewer, larger matrix products.
    return max(32, min(256, radius))


def _blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_tokens: TokenSlots | None,
    *,
    radius: int,
    dilation: int,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Blocks of queries, each against the `block + 2 * radius` keys around it and the global keys.

    Dilated windows over n tokens are plain windows over `dilation` interleaved sequences; a block lies in one of them.
    Everything is gathered by position, so that no length is padded and no shape depends on divisibility.
    """
    batch, heads, length, head_dim = query.shape
    device = query.device
    block = _block_size(radius)
    span = block + 2 * radius
    blocks = count_blocks(count_blocks(length, dilation), block)
    starts = torch.arange(dilation, device=device)[:, None] + torch.arange(blocks, device=device) * (block * dilation)
    starts = starts.flatten()[:, None]
    query_position = starts + torch.arange(block, device=device) * dilation
    key_position = starts + torch.arange(-radius, block + radius, device=device) * dilation

    usable = ((key_position >= 0) & (key_position < length))[None]
    example = torch.arange(batch, device=device)[:, None, None]
    key_row = key_position.clamp(0, length - 1)[None].expand(batch, -1, -1)
    if key_padding_mask is not None:
        usable = usable & key_padding_mask[example, key_row]
    if global_tokens is not None and global_tokens.slots > 0:
        # A global key stands in a column of its own, so its place in the window must not count it again.
        usable = usable & ~global_tokens.mask[example, key_row]
    offset = torch.arange(span, device=device)[None, :] - torch.arange(block, device=device)[:, None]
    allowed = usable[:, :, None, :] & ((offset >= 0) & (offset <= 2 * radius))
    if global_tokens is not None and global_tokens.slots > 0:
        seen = global_tokens.valid[:, None, None, :].expand(-1, allowed.shape[1], block, -1)
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
