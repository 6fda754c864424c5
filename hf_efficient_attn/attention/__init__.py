"""Attention mechanisms as modules. `ATTENTIONS` maps a name to its class; adding a mechanism is adding a row."""

from .base import SelfAttention
from .big_bird import BigBirdSelfAttention
from .longformer import LongformerSelfAttention
from .performer import PerformerSelfAttention
from .softmax import SoftmaxSelfAttention


ATTENTIONS: dict[str, type[SelfAttention]] = {
    "big_bird": BigBirdSelfAttention,
    "longformer": LongformerSelfAttention,
    "performer": PerformerSelfAttention,
    "softmax": SoftmaxSelfAttention,
}

__all__ = [
    "ATTENTIONS",
    "BigBirdSelfAttention",
    "LongformerSelfAttention",
    "PerformerSelfAttention",
    "SelfAttention",
    "SoftmaxSelfAttention",
]
