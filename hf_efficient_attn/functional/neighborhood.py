"""What every way of computing attention on a grid shares: the grid, the reach and the tiles."""

from typing import NamedTuple

import torch
from torch import Tensor


# Queries of a tile. Small tiles waste few keys around them; below some tens of queries matrix products get slow.
_TILE = 64


class Neighborhood(NamedTuple):
    """Tokens on a grid, behind `num_global` others, and how far they see.

    Args:
        grid: rows and columns.
        radius: rows and columns on each side.
        num_global: tokens in front of the grid, which attend everything and are attended by everything.
    """

    grid: tuple[int, int]
    radius: tuple[int, int]
    num_global: int

    def tile(self) -> tuple[int, int]:
        """Rows and columns of the queries that are computed together: a square, unless the grid is narrow."""
        side = 8
        if torch.compiler.is_compiling():
            return side, side  # the grid is no number then
        rows, columns = self.grid
        if rows <= columns:
            height = min(rows, side)
            return height, min(columns, _TILE // height)
        width = min(columns, side)
        return min(rows, _TILE // width), width

    def reach(self) -> tuple[int, int]:
        """The radius, no longer than the grid."""
        if torch.compiler.is_compiling():
            return self.radius
        return tuple(min(radius, size - 1) for radius, size in zip(self.radius, self.grid, strict=True))

    def band(self, tile: tuple[int, int], reach: tuple[int, int], device: torch.device) -> Tensor:
        """Which keys around a tile its queries see: bool `[tile rows * columns, span rows * columns]`."""
        near = []
        for size, radius in zip(tile, reach, strict=True):
            offset = torch.arange(size + 2 * radius, device=device) - torch.arange(size, device=device)[:, None]
            near.append((offset >= 0) & (offset <= 2 * radius))
        by_row, by_column = near
        both = by_row[:, None, :, None] & by_column[None, :, None, :]
        return both.flatten(2).flatten(0, 1)


def make_neighborhood(
    length: int, grid: tuple[int, int], radius: int | tuple[int, int] | list[int], num_global: int
) -> Neighborhood:
    """A `Neighborhood`; raises `ValueError` for a negative number, or a grid that does not make `length` tokens."""
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise ValueError(f"grid = {grid}: give rows and columns, two numbers.")
    rows, columns = grid
    radius = (radius, radius) if isinstance(radius, int) else radius
    if not isinstance(radius, tuple | list) or len(radius) != 2 or min(radius) < 0:
        raise ValueError(f"radius = {radius}: give one number, or rows and columns, of 0 or more.")
    if num_global < 0:
        raise ValueError(f"num_global = {num_global}: it must be 0 or more.")
    if not torch.compiler.is_compiling() and (min(grid) < 1 or num_global + rows * columns != length):
        raise ValueError(
            f"grid = {rows} x {columns} behind num_global = {num_global} makes {num_global + rows * columns} tokens, "
            f"but there are {length}; give the rows and columns of the patches."
        )
    return Neighborhood((rows, columns), tuple(radius), num_global)
