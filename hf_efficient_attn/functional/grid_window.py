"""Attention of patches to their neighbours in rows and columns, and of some tokens to everything."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu import in_reach
from .dropout_cpu import cpu_dropout_attention
from .fused import fused
from .grid_tiles import grid_tiles
from .grid_window_cpu import cpu_grid_window
from .inputs import check_qkv, count_blocks, masked_bias, zero_padding
from .neighborhood import Neighborhood, make_neighborhood


def grid_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    grid: tuple[int, int],
    radius: int | tuple[int, int] | list[int],
    num_global: int = 0,
) -> Tensor:
    """Softmax attention of each token of a grid over its neighbours and, in the same softmax, over the global tokens.

    The tokens are `num_global` global ones and then the grid, row by row. Token `(r, c)` of the grid attends `(s, t)`
    when `|r - s| <= radius[0]` and `|c - t| <= radius[1]`: at an edge it has fewer neighbours, and the end of a row is
    no neighbour of the next row's beginning. Global tokens attend everything and are attended by everything.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.
        grid: rows and columns, with `num_global + rows * columns = length`.
        radius: neighbours on each side, 0 or more; one number, or for rows and columns.
        num_global: tokens in front of the grid.

    Returns:
        As `query`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, a negative radius or number of global tokens, a grid of another length.

    Stand-alone self-attention (Ramachandran et al. 2019, arXiv 1906.05909) with windows that end at the edges, and
    Longformer's global tokens (Beltagy, Peters & Cohan 2020, arXiv 2004.05150) with one set of projections. Time
    O(length * (radius[0] * radius[1] + num_global)), memory O(length * (1 + num_global)).
    """
    check_qkv(query, key, value, key_padding_mask)
    shape = make_neighborhood(key.shape[2], grid, radius, num_global)
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = _global_rows(query[:, :, :num_global], key, value, key_padding_mask, scale, dropout_p)
    options = {"scale": scale, "dropout_p": dropout_p}
    mixed = _fused(query, key, value, rows, key_padding_mask, shape, **options)
    if mixed is None:
        on_cpu = query.device.type == "cpu" and dropout_p < 1.0 and not torch.compiler.is_compiling()
        form = cpu_grid_window if on_cpu else _gathered
        mixed = form(query, key, value, rows, key_padding_mask, shape, **options)
    return zero_padding(mixed, key_padding_mask)


def grid_window_allowed(
    length: int,
    key_padding_mask: Tensor | None,
    device: torch.device,
    *,
    grid: tuple[int, int],
    radius: int | tuple[int, int] | list[int],
    num_global: int = 0,
) -> Tensor:
    """Which keys `grid_window_attention` lets a query attend: bool `[batch or 1, 1, length, length]`.

    Memory O(length ** 2).
    """
    shape = make_neighborhood(length, grid, radius, num_global)
    place = torch.arange(length, device=device)
    at = place - num_global
    is_global = place < num_global
    row, column = at // shape.grid[1], at % shape.grid[1]
    near = (row[:, None] - row).abs() <= shape.radius[0]
    near = near & ((column[:, None] - column).abs() <= shape.radius[1])
    allowed = (near | is_global | is_global[:, None])[None, None]
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None]
    return allowed


def _global_rows(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Attention of the global tokens over everything, `[batch, heads, num_global, head_dim]`."""
    if query.shape[2] == 0:
        return query
    bias = None if key_padding_mask is None else masked_bias(key_padding_mask[:, None, None, :], query.dtype)
    if 0.0 < dropout_p < 1.0 and in_reach(query) and not torch.is_autocast_enabled("cpu"):
        return cpu_dropout_attention(query * scale, key, value, bias, dropout_p)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    key_padding_mask: Tensor | None,
    shape: Neighborhood,
    **options: float,
) -> Tensor | None:
    """Tiles of queries against the tiles around them in one kernel of a GPU; None where there is none."""
    kernel = fused("blocks", query)
    if kernel is None:
        return None
    tiles, first = grid_tiles(query, shape), shape.num_global
    used = tiles.used
    if key_padding_mask is not None:
        used = used & key_padding_mask[:, tiles.source[0, 0]][:, None]
    near = (first, shape.grid[1], *shape.reach())
    places = {"size": tiles.size, "front": tiles.front, "grid": near}
    found = kernel(query, key, value, tiles.lists, tiles.source, used, **places, **options)
    if found is None or first == 0:
        return found and found[0]
    return torch.cat([rows, found[0][:, :, first:]], dim=2)


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    key_padding_mask: Tensor | None,
    shape: Neighborhood,
    *,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Tiles of queries, each against the keys around it and the global keys; everything gathered by position."""
    batch, heads, _, width = query.shape
    device, first = query.device, shape.num_global
    tile, reach = shape.tile(), shape.reach()
    counts = [count_blocks(size, step) for size, step in zip(shape.grid, tile, strict=True)]
    own, near = [], []
    for size, step, radius, count in zip(shape.grid, tile, reach, counts, strict=True):
        start = torch.arange(count, device=device)[:, None] * step
        own.append((start + torch.arange(step, device=device)).clamp(max=size - 1))
        near.append(start + torch.arange(-radius, step + radius, device=device))
    usable = [(x >= 0) & (x < size) for x, size in zip(near, shape.grid, strict=True)]
    near = [x.clamp(0, size - 1) for x, size in zip(near, shape.grid, strict=True)]
    query_row = _flat(own[0] * shape.grid[1], own[1], torch.add) + first
    key_row = _flat(near[0] * shape.grid[1], near[1], torch.add) + first
    seen = _flat(usable[0], usable[1], torch.logical_and)
    key_row = torch.cat([torch.arange(first, device=device).expand(key_row.shape[0], -1), key_row], dim=1)
    band = F.pad(shape.band(tile, reach, device), (first, 0), value=True)
    allowed = F.pad(seen, (first, 0), value=True)[None, :, None, :] & band
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, key_row][:, :, None, :]
    bias = masked_bias(allowed, query.dtype).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    def gather(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.transpose(1, 2)[:, index].flatten(0, 1).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        gather(query, query_row),
        gather(key, key_row),
        gather(value, key_row),
        attn_mask=bias,
        dropout_p=dropout_p,
        scale=scale,
    )
    # Where each token of the grid stands in the table of tiles.
    row, column = (torch.arange(size, device=device) for size in shape.grid)
    tiles = (row // tile[0] * counts[1])[:, None] + column // tile[1]
    inside = (row % tile[0] * tile[1])[:, None] + column % tile[1]
    place = (tiles * (tile[0] * tile[1]) + inside).flatten()
    table = mixed.transpose(1, 2).reshape(batch, -1, heads, width)
    return torch.cat([rows, table.index_select(1, place).transpose(1, 2)], dim=2)


def _flat(by_row: Tensor, by_column: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`[tile rows, m]` and `[tile columns, n]` joined: `[tiles, m * n]`."""
    return join(by_row[:, None, :, None], by_column[None, :, None, :]).flatten(2).flatten(0, 1)
