"""Kernels of a GPU, written in Triton, as operators of torch. `FUSED` is what `functional.fused` finds by name."""

from collections.abc import Callable
from typing import Any

from .blocks import block_attention
from .features import feature_mix, feature_sums
from .inverse import pinv_iterations
from .nearby import add_nearby
from .room import NARROW, has_room
from .segments import segment_means
from .window import window_attention


FUSED: dict[str, Callable[..., Any]] = {
    "add_nearby": add_nearby,
    "blocks": block_attention,
    "feature_mix": feature_mix,
    "feature_sums": feature_sums,
    "pinv_iterations": pinv_iterations,
    "segment_means": segment_means,
    "window": window_attention,
}
if not has_room(NARROW):
    FUSED.clear()
