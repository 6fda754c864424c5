"""Weights that a call does not use, and that get a gradient of 0 all the same."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules import in_reach, is_plain


def can_add_idle(states: Tensor, maps: Sequence[nn.Linear]) -> bool:
    """Whether `add_idle` may be used: on a CPU in eager mode, where a map is a weight and a bias and nothing more."""
    plain = all(is_plain(x, nn.Linear) and x.bias is not None for x in maps)
    return plain and in_reach(states) and all(in_reach(x.weight) for x in maps)


def add_idle(states: Tensor, maps: Sequence[nn.Linear]) -> Tensor:
    """`states`, with weights and biases of `maps` in their graph, where these get a gradient of exactly 0."""
    return _Idle.apply(states, *(parameter for x in maps for parameter in (x.weight, x.bias)))


class _Idle(torch.autograd.Function):
    """In the form that `torch.func` takes as well."""

    @staticmethod
    def forward(states: Tensor, *parameters: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.needs_input_grad[1:], ctx.saved_tensors, strict=True)
        return grad, *(torch.zeros_like(x) if wanted else None for wanted, x in needed)
