"""Whether a formula that goes through features can have the fused kernels for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .fused import fused


_HEAD_DIMS = (16, 32, 64, 128)


class FeatureKernels(NamedTuple):
    """The two passes: sums over keys, and what queries mix of them."""

    sums: Callable[..., Any]
    mix: Callable[..., Any]


def feature_kernels(query: Tensor, key: Tensor, value: Tensor) -> FeatureKernels | None:
    """The kernels for these `[batch, heads, length, head_dim]`; None where torch's operations have to do."""
    sums, mix = fused("feature_sums", query), fused("feature_mix", query)
    if sums is None or mix is None or query.shape[-1] not in _HEAD_DIMS:
        return None
    if not query.dtype == key.dtype == value.dtype:
        return None
    return FeatureKernels(sums, mix)
