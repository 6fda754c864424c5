"""Kernels of a GPU, written in Triton, as operators of torch. `KERNELS` is what `functional.fused` finds by name."""

from collections.abc import Callable
from typing import Any


KERNELS: dict[str, Callable[..., Any]] = {}
