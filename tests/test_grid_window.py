"""Neighborhood attention: what the laws over the table do not see."""

from typing import Any

import oracles
import pytest
import torch
from cases import paddings, qkv
from torch import Tensor

from hf_efficient_attn.attention import NeighborhoodSelfAttention
from hf_efficient_attn.functional import grid_window, grid_window_allowed, grid_window_attention


# Grids with more and less than a tile, narrow ones, one patch; radii beyond the grid.
SHAPES = [
    {"grid": (1, 1), "radius": (3, 3), "num_global": 0},
    {"grid": (1, 150), "radius": (2, 5), "num_global": 1},
    {"grid": (150, 1), "radius": (5, 2), "num_global": 0},
    {"grid": (9, 23), "radius": (0, 0), "num_global": 3},
    {"grid": (23, 9), "radius": (3, 1), "num_global": 1},
    {"grid": (16, 24), "radius": (2, 9), "num_global": 0},
    {"grid": (3, 40), "radius": (8, 0), "num_global": 2},
    {"grid": (17, 17), "radius": (40, 1), "num_global": 1},
]
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


def length_of(shape: dict[str, Any]) -> int:
    return shape["num_global"] + shape["grid"][0] * shape["grid"][1]


def with_grads(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    result = function(*inputs)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result.dtype)
    return [result, *torch.autograd.grad((result * weight).sum(), inputs)]


@EVERY_SHAPE
@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("form", ["kernel", "gathered"])
def test_equals_the_oracle_on_any_grid(
    shape: dict[str, Any], small_chunks: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's kernel, in one chunk and in many, and the form for other devices."""
    if small_chunks:
        monkeypatch.setattr("hf_efficient_attn.functional.grid_window_cpu.CHUNK_BYTES", 1)
    if form == "gathered":
        monkeypatch.setattr(grid_window, "cpu_grid_window", grid_window._gathered)
    length = length_of(shape)
    for keep in paddings(2, length).values():
        inputs = qkv(2, length)
        ours = with_grads(lambda q, k, v: grid_window_attention(q, k, v, keep, **shape), inputs)  # noqa: B023
        right = with_grads(lambda q, k, v: oracles.grid_window(q, k, v, keep, **shape), inputs)  # noqa: B023
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@EVERY_SHAPE
def test_the_dense_mask_is_the_definition(shape: dict[str, Any]) -> None:
    found = grid_window_allowed(length_of(shape), None, torch.device("cpu"), **shape)
    assert torch.equal(found[0, 0], oracles.neighbours(**shape))


def test_images_of_different_size_alone_and_in_one_batch() -> None:
    """Each is a rectangle of a larger grid, wherever it stands, and whatever stands around it."""
    generator = torch.Generator().manual_seed(2)
    sizes, corners, slots = [(11, 13), (4, 9), (1, 2)], [(0, 0), (7, 4), (5, 11)], 2
    options = {"radius": (2, 3), "num_global": slots}
    for poison in (1e3, float("nan")):
        alone, batch = [], [poison * torch.ones(3, 4, slots + 11 * 13, 8, dtype=torch.float64) for _ in range(3)]
        keep = torch.zeros(3, slots + 11 * 13, dtype=torch.bool)
        keep[:, :slots] = True
        for row, ((rows, columns), (top, left)) in enumerate(zip(sizes, corners, strict=True)):
            inputs = torch.randn(3, 1, 4, slots + rows * columns, 8, generator=generator, dtype=torch.float64)
            alone.append(grid_window_attention(*inputs, grid=(rows, columns), **options))
            keep[row, slots:].view(11, 13)[top : top + rows, left : left + columns] = True
            for whole, own in zip(batch, inputs, strict=True):
                whole[row][:, keep[row]] = own[0]
        found = grid_window_attention(*batch, keep, grid=(11, 13), **options)
        for row, expected in enumerate(alone):
            torch.testing.assert_close(found[row][:, keep[row]], expected[0], rtol=0, atol=1e-12)
            assert (found[row][:, ~keep[row]] == 0).all()


def test_rows_and_columns_are_not_exchanged() -> None:
    """A window on the flattened order would reach from the end of one row to the beginning of the next."""
    query, key, _ = (x.detach() for x in qkv(1, 24))
    # The values are marks of the first eight tokens.
    value = torch.eye(24, 8, dtype=torch.float64).expand(1, 4, -1, -1)
    seen = grid_window_attention(query, key, value, grid=(4, 6), radius=(0, 1))
    assert (seen[0, :, 5, 4:6] > 0).all() and (seen[0, :, 5, 6:] == 0).all(), "the end of the first row"
    assert (seen[0, :, 6, 6:8] > 0).all() and (seen[0, :, 6, :6] == 0).all(), "the beginning of the second"


def test_the_kernel_keeps_its_inputs_and_nothing_else() -> None:
    inputs = qkv(1, 64 * 64, torch.float32)
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with hooks:
        grid_window_attention(*inputs, grid=(64, 64), radius=(7, 7))
    assert sum(kept) <= 3 * inputs[0].numel()


def test_second_derivatives_are_refused() -> None:
    inputs = qkv(1, 12)
    result = grid_window_attention(*inputs, grid=(3, 4), radius=1)
    with pytest.raises(RuntimeError, match="eager"):
        torch.autograd.grad(result.sum(), inputs, create_graph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 5)}, "3 x 5 behind num_global = 0 makes 15 tokens, but there are 12"),
        ({"grid": (3, 4), "num_global": 1}, "makes 13 tokens, but there are 12"),
        ({"grid": (0, 4)}, "makes 0 tokens"),
        ({"grid": (3, 4), "num_global": -1}, "num_global = -1"),
        ({"grid": (3, 4), "radius": (1, -1)}, r"radius = \(1, -1\)"),
        ({"grid": (3, 4), "radius": 1.0}, r"radius = 1.0: give one number"),
        ({"grid": (3, 2, 2), "radius": 1}, r"grid = \(3, 2, 2\): give rows and columns"),
        ({"grid": (3, 4), "radius": (1, 1, 1)}, "one number, or rows and columns"),
    ],
)
def test_wrong_grids_are_refused(options: dict[str, Any], message: str) -> None:
    inputs = qkv(1, 12)
    with pytest.raises(ValueError, match=message):
        grid_window_attention(*inputs, **{"radius": 1, **options})


def test_the_module_needs_a_grid() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(
        hidden_size=8, num_attention_heads=2, attention_probs_dropout_prob=0.0, _attn_implementation="sdpa"
    )
    options = NeighborhoodSelfAttention.options_class
    module = NeighborhoodSelfAttention(config, 0, options(radius=1))
    with pytest.raises(ValueError, match=r"needs grid = \(rows, columns\).*'longformer'"):
        module(torch.zeros(1, 6, 8))
    assert module(torch.zeros(1, 6, 8), grid=(2, 3))[0].shape == (1, 6, 8)
    for radius in (-1, [1], [1, -1]):
        with pytest.raises(ValueError, match="radius = "):
            options(radius=radius).check_options()
