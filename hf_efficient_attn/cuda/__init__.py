"""Kernels of a GPU, written in Triton, as operators of torch. `FUSED` is what `functional.fused` finds by name."""

from collections.abc import Callable
from typing import Any

import torch

from .blocks import block_attention
from .features import feature_mix, feature_sums
from .inverse import pinv_iterations
from .nearby import add_nearby
from .segments import segment_means
from .window import window_attention


# Bytes of shared memory that the largest kernel takes; those of smaller GPUs were never tried, and have no kernels.
SHARED_MEMORY = 200_000


def have_room(gpus: list[Any], is_nvidia: bool) -> bool:
    """Whether the kernels are for all of these GPUs, as `torch.cuda.get_device_properties` describes them."""
    return all(is_nvidia and getattr(gpu, "shared_memory_per_block_optin", 0) >= SHARED_MEMORY for gpu in gpus)


FUSED: dict[str, Callable[..., Any]] = {
    "add_nearby": add_nearby,
    "blocks": block_attention,
    "feature_mix": feature_mix,
    "feature_sums": feature_sums,
    "pinv_iterations": pinv_iterations,
    "segment_means": segment_means,
    "window": window_attention,
}
if not have_room(
    [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())], torch.version.hip is None
):
    FUSED.clear()
