"""Kernels of a GPU, written in Triton, as operators of torch. `KERNELS` is what `functional.fused` finds by name."""

from collections.abc import Callable
from typing import Any

from .blocks import block_attention
from .window import window_attention


KERNELS: dict[str, Callable[..., Any]] = {"blocks": block_attention, "window": window_attention}
