"""Windows on a grid in the kernel of blocks: tiles find their neighbours, whatever the grid."""

import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICE

from hf_efficient_attn.functional import fused_kernels, grid_window_allowed, grid_window_attention
from hf_efficient_attn.functional.grid_tiles import grid_tiles
from hf_efficient_attn.functional.neighborhood import make_neighborhood


HEAD_DIM = 16
# Rows, columns, radius, global tokens: several tiles each way, a narrow grid, a window wider than the grid.
GRIDS = [
    (19, 13, (2, 9), 3),
    (13, 19, (8, 1), 0),
    (3, 50, (1, 7), 70),
    (9, 9, (40, 0), 1),
    (17, 2, (0, 0), 2),
]


@pytest.mark.parametrize(("rows", "columns", "radius", "num_global"), GRIDS)
def test_tiles_list_those_that_their_windows_reach(
    rows: int, columns: int, radius: tuple[int, int], num_global: int
) -> None:
    """Each token stands at one place, and a tile lists another exactly if some pair of theirs is allowed."""
    length = num_global + rows * columns
    shape = make_neighborhood(length, (rows, columns), radius, num_global)
    tiles = grid_tiles(torch.empty(0), shape)
    source, filled, lists = tiles.source[0, 0].long(), tiles.used[0, 0], tiles.lists[0, 0].long()
    assert source[filled].sort().values.tolist() == list(range(length))
    window = {"grid": (rows, columns), "radius": radius, "num_global": num_global}
    allowed = grid_window_allowed(length, None, torch.device("cpu"), **window)[0, 0]
    at_places = allowed[source][:, source] & filled & filled[:, None]
    blocks = at_places.unflatten(1, (-1, tiles.size)).unflatten(0, (-1, tiles.size)).any(dim=3).any(dim=1)
    listed = torch.zeros(len(lists), len(blocks) + 1, dtype=torch.bool)
    listed.scatter_(1, torch.where(lists < 0, len(blocks), lists), True)
    in_order = lists.sort(dim=1).values
    assert (in_order.diff(dim=1)[in_order[:, 1:] >= 0] > 0).all(), "none twice"
    assert torch.equal(listed[:, :-1], blocks[tiles.front :])


def given(length: int, batch: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(batch, 2, length, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(4)]
    keep = torch.rand(batch, length, generator=generator) < 0.7
    keep[-1] = False
    return rows, keep


@pytest.mark.parametrize(("rows", "columns", "radius", "num_global"), GRIDS[:3])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_portable_way(
    rows: int,
    columns: int,
    radius: tuple[int, int],
    num_global: int,
    padded: bool,
    used: list[str],
) -> None:
    """Padding is anywhere, one example has nothing else; NaN stands there."""
    length = num_global + rows * columns
    (*inputs, weight), keep = given(length, 2 if padded else 1)
    keep = keep if padded else None
    found = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        own = [x.to(device, dtype) for x in inputs]
        mask = None if keep is None else keep.to(device)
        if mask is not None:
            own = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in own]
        own = [x.requires_grad_() for x in own]
        shape = {"grid": (rows, columns), "radius": radius, "num_global": num_global}
        mixed = grid_window_attention(*own, mask, **shape)
        found.append([mixed, *torch.autograd.grad((mixed * weight.to(mixed)).sum(), own)])
    assert used == ["blocks"]
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu().double(), right, rtol=2e-4, atol=2e-4)


def test_a_graph_of_any_grid_has_the_kernel(used: list[str]) -> None:
    compiled = torch.compile(grid_window_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for grid in ((9, 10), (17, 5)):
        inputs = [x[:1].to(DEVICE, torch.float32) for x in given(grid[0] * grid[1] + 2, 1)[0][:3]]
        shape = {"grid": grid, "radius": (3, 2), "num_global": 2}
        found = []
        for form in (compiled, grid_window_attention):
            own = [x.clone().requires_grad_() for x in inputs]
            mixed = form(*own, **shape)
            found.append([mixed, *torch.autograd.grad(mixed.square().sum(), own)])
        torch.testing.assert_close(found[0], found[1])
    assert used.count("blocks") > 2, "while tracing too"


def test_tiles_made_while_evaluating_serve_training(used: list[str]) -> None:
    inputs = [x[:1].to(DEVICE, torch.float32) for x in given(7 * 11, 1)[0][:3]]
    shape = {"grid": (7, 11), "radius": 2}
    with torch.inference_mode():
        right = grid_window_attention(*inputs, **shape)
    inputs = [x.requires_grad_() for x in inputs]
    mixed = grid_window_attention(*inputs, **shape)
    mixed.sum().backward()
    torch.testing.assert_close(mixed, right)
    with fused_kernels(False):
        torch.testing.assert_close(grid_window_attention(*inputs, **shape), right, rtol=1e-4, atol=1e-5)
    assert used == ["blocks"] * 2
