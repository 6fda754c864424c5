"""Whether a formula that goes through features can have the fused kernels for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .fused import fused


class FeatureKernels(NamedTuple):
    """The two passes: sums over keys, and what queries mix of them; the sums are None for heads they are not for."""

    sums: Callable[..., Any]
    mix: Callable[..., Any]


def feature_kernels(query: Tensor, key: Tensor, value: Tensor) -> FeatureKernels | None:
    """The kernels for these `[batch, heads, length, head_dim]`; None where torch's operations have to do."""
    sums, mix = fused("feature_sums", query), fused("feature_mix", query)
    if sums is None or mix is None or not query.dtype == key.dtype == value.dtype:
        return None
    return FeatureKernels(sums, mix)
