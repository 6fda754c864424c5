"""Attention mechanisms as modules. `ATTENTIONS` maps a name to its class; adding a mechanism is adding a row."""

from .base import SelfAttention
from .longformer import LongformerSelfAttention
from .performer import PerformerSelfAttention
from .softmax import SoftmaxSelfAttention


ATTENTIONS: dict[str, type[SelfAttention]] = {
    "longformer": LongformerSelfAttention,
    "performer": PerformerSelfAttention,
    "softmax": SoftmaxSelfAttention,
}

__all__ = [
    "ATTENTIONS",
    "LongformerSelfAttention",
    "PerformerSelfAttention",
    "SelfAttention",
    "SoftmaxSelfAttention",
]
