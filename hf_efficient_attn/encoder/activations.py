"""Activations by name, as fused functions where torch has them."""

from torch import nn
from transformers.activations import ACT2FN


# The same function; the former is a chain of six operations, which costs more than the matrix products around it.
_FUSED = {"gelu_new": "gelu_pytorch_tanh"}


def make_activation(name: str) -> nn.Module:
    """The activation that transformers calls `name`."""
    return ACT2FN[_FUSED.get(name, name)]
