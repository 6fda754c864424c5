"""Backward passes that compute things again, and so have no derivative of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A `backward` of `torch.autograd.Function` without a graph.

    torch's own `once_differentiable` lets second derivatives through as zeros where the first gradient is a constant.

    Raises:
        RuntimeError: at `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of gradients (create_graph=True) do not go through this kernel, which computes its "
                "probabilities or states again; use attn_implementation='eager', and reversible=False in a Reformer."
            )
        return backward(ctx, *grads)

    return checked
