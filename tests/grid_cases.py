"""The rows of the table of mechanisms whose tokens stand on a grid."""

from typing import Any

import oracles
from case_types import Case, Variant
from torch import Tensor

from hf_efficient_attn.functional import grid_window_attention


def grid_for(length: int, num_global: int) -> dict[str, Any]:
    """Global tokens, at most all but one, and the most nearly square grid of the others."""
    num_global = min(num_global, length - 1)
    patches = length - num_global
    rows = next(rows for rows in range(int(patches**0.5), 0, -1) if patches % rows == 0)
    return {"grid": (rows, patches // rows), "num_global": num_global}


def _formula(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: None, *, num_global: int, **kwargs: Any
) -> Tensor:
    return grid_window_attention(query, key, value, keep, **grid_for(key.shape[2], num_global), **kwargs)


def _oracle(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: None, *, radius: Any, num_global: int
) -> Tensor:
    return oracles.grid_window(query, key, value, keep, radius=radius, **grid_for(key.shape[2], num_global))


def _module_oracle(
    weights: dict[str, Tensor],
    x: Tensor,
    keep: Tensor | None,
    heads: int,
    is_global: None,
    *,
    radius: Any,
    num_global: int,
) -> Tensor:
    options = grid_for(x.shape[1], num_global)
    return oracles.grid_window_module(weights, x, keep, heads=heads, radius=radius, **options)


def _neighborhood(rows: int, columns: int, num_global: int = 0) -> Variant:
    options = {"radius": (rows, columns), "num_global": num_global}
    return Variant(options, {"radius": [rows, columns]}, grid=lambda length: grid_for(length, num_global))


GRID_CASES = [
    Case(
        name="neighborhood",
        formula=_formula,
        oracle=_oracle,
        module_oracle=_module_oracle,
        variants={
            "square": _neighborhood(2, 2),
            "wide": _neighborhood(1, 4),
            "tall": _neighborhood(5, 1),
            "own row alone": _neighborhood(0, 1),
            "class token": _neighborhood(2, 1, num_global=1),
            "registers": _neighborhood(1, 2, num_global=5),
        },
        softmax_options={"radius": (100, 100), "num_global": 0},
    ),
]
