"""Functions that start kernels, as operators of torch: what a compiled graph holds in one piece."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


NAMESPACE = "hf_efficient_attn"


class Operator:
    """A function of tensors and numbers that starts kernels, on the GPU of its first tensor.

    In eager mode it is called as it is, under a `torch.autograd.Function` where gradients are wanted: torch's own
    way through an operator written in Python takes longer than some kernels.

    Args:
        name: of the operator, in this package's namespace.
        launch: the function, its types annotated; it changes no argument, and no result shares memory with one.
    """

    def __init__(self, name: str, launch: Callable[..., Any]) -> None:
        self._launch = launch
        self._definition = torch.library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=())
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._function: type[torch.autograd.Function] | None = None
        self.register_fake = self._definition.register_fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of `torch.library.custom_op`."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        launch = self._run

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = launch(*inputs)
                setup_context(ctx, inputs, output)
                return output

        Eager.backward = staticmethod(backward)
        self._function = Eager

    def _run(self, first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return self._launch(first, *others)

    def __call__(self, *inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if torch.compiler.is_compiling() or any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
            return self._operator(*inputs)
        if self._function is not None and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._function.apply(*inputs)
        return self._run(*inputs)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an `Operator` of the function it decorates."""
    return lambda launch: Operator(name, launch)
