"""Patterns that cover most of the matrix, computed as one: when that is, and the switch for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


_ENABLED = ContextVar("dense_execution", default=True)

# Up to so many tokens calling torch for each block costs more than the work in it, however few keys a query has; fewer
# with dropout, where a CPU has no fused kernel.
_ALWAYS, _ALWAYS_WITH_DROPOUT = 192, 128

# Beyond, a mask of all pairs takes more memory than the states of the tokens.
_MOST = 1024


@contextmanager
def dense_execution(enabled: bool = True) -> Iterator[None]:
    """Whether short inputs may be computed densely, for the calls inside.

    Sliding windows and BigBird's blocks that cover most of a short input are computed as one matrix with a mask, and
    Nyström attention to no more tokens than landmarks as the softmax attention that it is: quicker there, and the same
    function but for rounding. By default it is on. It never happens while compiling or exporting, where no length is
    known.

    With gradient checkpointing, which calls forward again in the backward pass, put both passes inside.

    Args:
        enabled: False computes every input block by block, as a long one.
    """
    token = _ENABLED.set(enabled)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def dense_is_on() -> bool:
    """Whether short inputs may be computed densely now."""
    return not torch.compiler.is_compiling() and _ENABLED.get()


def dense_is_cheaper(length: int, keys: int, dropout_p: float) -> bool:
    """Whether `length` keys a query, with a mask, cost less than `keys`, block by block. By shape alone."""
    if not dense_is_on() or length > _MOST:
        return False
    # Measured on a CPU: torch's fused kernel is about 1.5 times as quick a key as blocks, the one with dropout about as
    # quick. On other devices blocks are copied first, which costs more.
    if dropout_p > 0.0:
        return length <= max(_ALWAYS_WITH_DROPOUT, keys + keys // 8)
    return length <= max(_ALWAYS, keys + keys // 2)
