"""Operators of torch that its exporter has no translation for."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op


def sort_stable(tensor: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """As the largest or smallest of all: ONNX puts equal ones in their order, and so is always stable."""
    count = op.Shape(tensor, start=dim, end=None if dim == -1 else dim + 1)
    return op.TopK(tensor, count, axis=dim, largest=descending, sorted=True)


def cummax(tensor: Any, dim: int) -> tuple[Any, Any]:
    """As the largest of a triangle: ONNX has no running maximum. Memory O(size^2) along the last dimension."""
    if dim != -1:
        raise NotImplementedError(f"cummax over dimension {dim}; only the last one has a translation.")
    place = op.Range(0, op.Squeeze(op.Shape(tensor, start=-1)), 1)
    later = op.Greater(op.Unsqueeze(place, [0]), op.Unsqueeze(place, [1]))
    lowest = op.CastLike(op.Constant(value_float=float("-inf")), tensor)
    seen = op.Where(later, lowest, op.Unsqueeze(tensor, [-2]))
    return op.ReduceMax(seen, [-1], keepdims=0), op.ArgMax(seen, axis=-1, keepdims=0, select_last_index=1)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.sort.stable: sort_stable,
    torch.ops.aten.cummax.default: cummax,
}
"""Operator -> its translation, as `torch.onnx.export` takes them."""
