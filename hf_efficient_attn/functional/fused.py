"""Fused kernels of a GPU, where the package has put them: one table, which the formulas ask."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


_ENABLED = ContextVar("fused_kernels", default=True)


class FusedTable:
    """Where the kernels come from, and for which tensors they are. The package itself fills in the source.

    Model code that travels without the package finds no source, and computes everything in the portable way.
    """

    source: Callable[[], Mapping[str, Callable[..., Any]]] | None = None
    """Gives kernels by name; asked when a tensor they are for first meets a formula, so that nothing loads before."""

    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)


@contextmanager
def fused_kernels(enabled: bool = True) -> Iterator[None]:
    """Whether half-precision tensors on a GPU go through this package's own kernels, for the calls inside.

    By default they do. The functions are the same but for rounding. A compiled graph has the kernels in any case. With
    gradient checkpointing, which calls forward again in the backward pass, put both passes inside.

    Args:
        enabled: False computes everything with torch's operations alone.
    """
    token = _ENABLED.set(enabled)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def fused(name: str, tensor: Tensor) -> Callable[..., Any] | None:
    """The kernel of that name if there is one for tensors like this one; None where torch's operations have to do.

    Never while exporting: a program that is to run elsewhere has no such operators.
    """
    source = FusedTable.source
    if source is None or tensor.device.type not in FusedTable.devices or tensor.dtype not in FusedTable.dtypes:
        return None
    if torch.compiler.is_exporting():
        return None
    if not torch.compiler.is_compiling() and (not _ENABLED.get() or not is_plain_tensor(tensor)):
        return None
    return source().get(name)


def is_plain_tensor(tensor: Tensor) -> bool:
    """No `DTensor` or the like, and none that `torch.func` stands in for."""
    own = type(tensor) in (Tensor, nn.Parameter)
    return own and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
