"""Activations by their names in configs."""

from collections.abc import Callable

from torch import nn
from transformers.activations import ACT2FN


def activation(name: str) -> nn.Module:
    """transformers' activation `name`; torch's fused kernel where the library computes the same step by step.

    `gelu_new` keeps seven tensors as large as its input for backward, the kernel one; results differ by rounding.
    """
    return nn.GELU(approximate="tanh") if name == "gelu_new" else ACT2FN[name]


def head_activation(name: str | None, published: Callable) -> Callable:
    """The activation `name` of a head, `config.head_act`; without a name the `published` one."""
    return published if name is None else activation(name)
