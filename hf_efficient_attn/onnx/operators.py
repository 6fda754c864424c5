"""Operators of torch that its exporter has no translation for."""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18 as op


def sort_stable(tensor: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """As the largest or smallest of all: ONNX puts equal ones in their order, and so is always stable."""
    count = op.Shape(tensor, start=dim, end=None if dim == -1 else dim + 1)
    return op.TopK(tensor, count, axis=dim, largest=descending, sorted=True)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.sort.stable: sort_stable}
"""Operator -> its translation, as `torch.onnx.export` takes them."""
