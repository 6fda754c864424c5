"""Attention mechanisms as modules. `ATTENTIONS` maps a name to its class; adding a mechanism is adding a row."""

from .base import SelfAttention
from .big_bird import BigBirdSelfAttention
from .local import LocalSelfAttention
from .longformer import LongformerSelfAttention
from .lsh import LSHSelfAttention
from .nystromformer import NystromformerSelfAttention
from .performer import PerformerSelfAttention
from .softmax import SoftmaxSelfAttention


ATTENTIONS: dict[str, type[SelfAttention]] = {
    "big_bird": BigBirdSelfAttention,
    "local": LocalSelfAttention,
    "longformer": LongformerSelfAttention,
    "lsh": LSHSelfAttention,
    "nystromformer": NystromformerSelfAttention,
    "performer": PerformerSelfAttention,
    "softmax": SoftmaxSelfAttention,
}

__all__ = [
    "ATTENTIONS",
    "BigBirdSelfAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "LongformerSelfAttention",
    "NystromformerSelfAttention",
    "PerformerSelfAttention",
    "SelfAttention",
    "SoftmaxSelfAttention",
]
