"""Several linear maps of the same states, whose backward pass on a CPU sums the states' gradient where it stands."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modules import in_reach_of_training, is_plain


def linear_maps(states: Tensor, maps: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """`tuple(linear(states) for linear in maps)`.

    In training on a CPU each map adds to one gradient of the states, where torch makes one a map and then their sums:
    for a long text touching fresh memory costs more than the sums. Elsewhere as torch does it.

    Args:
        states: `[..., width]`.
        maps: modules from `width` to any number of features.

    Returns:
        `[..., out_features]` for each map.

    Time and memory as the maps themselves, but for the backward pass: one tensor like `states` and not two a map.
    """
    if not _adds_up(states, maps):
        return tuple(linear(states) for linear in maps)
    return _LinearMaps.apply(states, *(x.weight for x in maps), *(x.bias for x in maps))


def _adds_up(states: Tensor, maps: Sequence[nn.Linear]) -> bool:
    """Whether the maps may run as one: on a CPU in training, where nobody notices."""
    return in_reach_of_training(states) and all(is_plain(x, nn.Linear) and x.weight.dtype == states.dtype for x in maps)


class _LinearMaps(torch.autograd.Function):
    """In the form that `torch.func` takes as well; all weights, then all biases."""

    @staticmethod
    def forward(states: Tensor, *weights_and_biases: Tensor | None) -> tuple[Tensor, ...]:
        count = len(weights_and_biases) // 2
        pairs = zip(weights_and_biases[:count], weights_and_biases[count:], strict=True)
        return tuple(F.linear(states, weight, bias) for weight, bias in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
        # The gradients need no bias.
        ctx.save_for_backward(*inputs[: 1 + len(output)])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        states, *weights = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return _gradients(grads, states, weights, ctx.needs_input_grad)


def _gradients(
    grads: tuple[Tensor | None, ...], states: Tensor, weights: list[Tensor], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those of the states, the weights and the biases; in steps that torch can take the gradient of."""
    found: list[Tensor | None] = [None] * len(needed)
    given, total = states.reshape(-1, states.shape[-1]), None
    add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
    for index, (grad, weight) in enumerate(zip(grads, weights, strict=True), 1):
        if grad is None:
            continue
        rows = grad.reshape(-1, grad.shape[-1])
        if needed[0]:
            total = torch.mm(rows, weight) if total is None else add(total, rows, weight)
        if needed[index]:
            found[index] = torch.mm(rows.t(), given)
        if needed[index + len(weights)]:
            found[index + len(weights)] = rows.sum(dim=0)
    found[0] = None if total is None else total.view(states.shape)
    return tuple(found)
