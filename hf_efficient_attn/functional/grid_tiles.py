"""A grid of tokens in tiles: blocks for the kernels of a GPU, and the tiles that each one's windows reach."""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import count_blocks
from .kept import Kept
from .neighborhood import Neighborhood


class GridTiles(NamedTuple):
    """Tiles as blocks of `size` places: first those of the tokens in front of the grid, then tile by tile.

    Args:
        size: places of a tile.
        front: blocks of the tokens in front.
        lists: int32 `[1, 1, tiles, entries]`, the blocks that a tile's windows reach into; -1 for none.
        source: int32 `[1, 1, places]`, the token at each place; any where there is none.
        used: bool `[1, 1, places]`, whether there is one.
    """

    size: int
    front: int
    lists: Tensor
    source: Tensor
    used: Tensor


def grid_tiles(like: Tensor, shape: Neighborhood) -> GridTiles:
    """The tiles of a grid, for tensors like this one; in eager mode made once for each shape, and kept."""
    return _TILES(like, shape, like.device)


def _make_tiles(shape: Neighborhood, device: torch.device) -> GridTiles:
    tile, reach, first = shape.tile(), shape.reach(), shape.num_global
    size = tile[0] * tile[1]
    front = (first + size - 1) // size
    counts = [count_blocks(length, step) for length, step in zip(shape.grid, tile, strict=True)]
    # The next tile's nearest token is one step away from this one's farthest.
    around = [(radius + step - 1) // step for radius, step in zip(reach, tile, strict=True)]
    near, there = [], []
    for count, steps in zip(counts, around, strict=True):
        number = torch.arange(count, device=device)[:, None] + torch.arange(-steps, steps + 1, device=device)
        near.append(number)
        there.append((number >= 0) & (number < count))
    tiles = near[0][:, None, :, None] * counts[1] + near[1][None, :, None, :] + front
    exists = there[0][:, None, :, None] & there[1][None, :, None, :]
    lists = torch.where(exists, tiles, -1).flatten(2).flatten(0, 1)
    lists = torch.cat([torch.arange(front, device=device).expand(lists.shape[0], -1), lists], dim=1)

    row, column = (
        torch.arange(count, device=device)[:, None] * step + torch.arange(step, device=device)
        for count, step in zip(counts, tile, strict=True)
    )
    token = row[:, None, :, None] * shape.grid[1] + column[None, :, None, :] + first
    inside = (row < shape.grid[0])[:, None, :, None] & (column < shape.grid[1])[None, :, None, :]
    place = torch.arange(front * size, device=device)
    source = torch.cat([place, token.flatten()])
    used = torch.cat([place < first, inside.flatten()])
    source = torch.where(used, source, 0).int()
    return GridTiles(size, front, lists.int()[None, None], source[None, None], used[None, None])


_TILES = Kept(_make_tiles)
