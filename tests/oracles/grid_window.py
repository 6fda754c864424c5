"""Windows in rows and columns, and global tokens in front of the grid."""

import torch
from torch import Tensor

from .common import masked_attention, padding, project


def neighbours(grid: tuple[int, int], radius: tuple[int, int], num_global: int) -> Tensor:
    """`[n, n]`: tokens of the grid at most `radius` rows and columns apart, and every pair with a global token."""
    places = [None] * num_global + [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    allowed = torch.zeros(len(places), len(places), dtype=torch.bool)
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            if here is None or there is None:
                allowed[i, j] = True
            else:
                allowed[i, j] = abs(here[0] - there[0]) <= radius[0] and abs(here[1] - there[1]) <= radius[1]
    return allowed


def grid_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    grid: tuple[int, int],
    radius: tuple[int, int],
    num_global: int,
) -> Tensor:
    """Neighbours and global tokens in one softmax."""
    batch, heads, length, _ = query.shape
    allowed = neighbours(grid, radius, num_global).expand(batch, heads, -1, -1)
    return masked_attention(query, key, value, allowed & padding(keep, batch, heads, length))


def grid_window_module(
    weights: dict[str, Tensor], states: Tensor, keep: Tensor | None, *, heads: int, **options: object
) -> Tensor:
    """The same with its projections."""
    local = [project(weights, name, states, heads) for name in ("query", "key", "value")]
    return grid_window(*local, keep, **options).permute(0, 2, 1, 3).flatten(2)
