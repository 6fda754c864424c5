"""The feed-forward layer on a CPU, some tokens at a time, keeping one wide tensor for the backward pass and not two."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .modules import TOKENS_AT_ONCE


def feed_forward(
    states: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor | None,
    outer_weight: Tensor,
    outer_bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """`linear(activation(linear(states)))`, whose backward pass computes the activation again.

    Args:
        states: `[..., width]` on a CPU, in the dtype of weights and biases.
        inner_weight, inner_bias: `[inner, width]` and `[inner]`, or no bias.
        outer_weight, outer_bias: `[out, inner]` and `[out]`, or no bias.
        activation: works on each entry alone, without parameters or random numbers.

    Returns:
        `[..., out]`.

    Chen et al. 2016, arXiv 1604.06174 (computing again). Memory `inner` numbers a token until backward, besides chunks.
    """
    rows = states.reshape(-1, states.shape[-1])
    result, _ = _FeedForward.apply(rows, inner_weight, inner_bias, outer_weight, outer_bias, activation)
    return result.view(*states.shape[:-1], outer_weight.shape[0])


class _FeedForward(torch.autograd.Function):
    """In the form that `torch.func` takes as well; `states` are `[rows, width]`."""

    @staticmethod
    def forward(
        states: Tensor,
        inner_weight: Tensor,
        inner_bias: Tensor | None,
        outer_weight: Tensor,
        outer_bias: Tensor | None,
        activation: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        inner = F.linear(states, inner_weight, inner_bias)
        result = states.new_empty(states.shape[0], outer_weight.shape[0])
        for part, into in zip(inner.split(TOKENS_AT_ONCE), result.split(TOKENS_AT_ONCE), strict=True):
            active = activation(part)
            if outer_bias is None:
                torch.mm(active, outer_weight.t(), out=into)
            else:
                torch.addmm(outer_bias, active, outer_weight.t(), out=into)
        return result, inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        *tensors, inner = ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        # Gradients of gradients are torch's own.
        through = _plain_gradients if torch.is_grad_enabled() else _gradients
        return *through(grad, tensors, inner, ctx.activation, ctx.needs_input_grad[:5]), None


def _plain_gradients(
    grad: Tensor,
    tensors: list[Tensor | None],
    inner: Tensor,
    activation: Callable[[Tensor], Tensor],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    states, inner_weight, inner_bias, outer_weight, outer_bias = tensors
    result = F.linear(activation(F.linear(states, inner_weight, inner_bias)), outer_weight, outer_bias)
    wanted = [tensor for tensor, wants in zip(tensors, needed, strict=True) if wants]
    found = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
    return [next(found) if wants else None for wants in needed]


def _gradients(
    grad: Tensor,
    tensors: list[Tensor | None],
    inner: Tensor,
    activation: Callable[[Tensor], Tensor],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    states, inner_weight, _, outer_weight, _ = tensors
    # The states' is written, the others are added to.
    fresh = (torch.empty_like, *(torch.zeros_like,) * 4)
    found = [make(x) if wants else None for make, x, wants in zip(fresh, tensors, needed, strict=True)]
    states_grad, inner_weight_grad, inner_bias_grad, outer_weight_grad, outer_bias_grad = found
    if outer_bias_grad is not None:
        torch.sum(grad, dim=0, out=outer_bias_grad)
    for start in range(0, states.shape[0], TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        with torch.enable_grad():
            before = inner[part].detach().requires_grad_()
            active = activation(before)
        if outer_weight_grad is not None:
            outer_weight_grad.addmm_(grad[part].t(), active.detach())
        if not any(needed[:3]):
            continue
        (before_grad,) = torch.autograd.grad(active, before, torch.mm(grad[part], outer_weight))
        if inner_weight_grad is not None:
            inner_weight_grad.addmm_(before_grad.t(), states[part])
        if inner_bias_grad is not None:
            inner_bias_grad += before_grad.sum(dim=0)
        if states_grad is not None:
            torch.mm(before_grad, inner_weight, out=states_grad[part])
    return found
