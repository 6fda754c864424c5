"""Timing functions of one process against each other, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor


def take_turns(
    runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds by `clock` of each run, one after the other in `repeats` turns, after a turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def forward_or_gradients(attend: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> Callable[[], object]:
    """A run of `attend(*tensors)`: in inference mode, or with the gradients of all tensors."""
    import torch

    if not backward:

        def forward() -> Tensor:
            with torch.inference_mode():
                return attend(*tensors)

        return forward
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad_outputs=tensors[0])
