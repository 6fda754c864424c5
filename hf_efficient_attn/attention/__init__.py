"""Attention mechanisms as modules. `ATTENTIONS` maps a name to its class; adding a mechanism is adding a row."""

from .base import SelfAttention
from .longformer import LongformerSelfAttention
from .softmax import SoftmaxSelfAttention


ATTENTIONS: dict[str, type[SelfAttention]] = {
    "longformer": LongformerSelfAttention,
    "softmax": SoftmaxSelfAttention,
}

__all__ = ["ATTENTIONS", "LongformerSelfAttention", "SelfAttention", "SoftmaxSelfAttention"]
