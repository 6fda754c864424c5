"""Attention mechanisms as modules; `ATTENTIONS` maps a name to its class."""

from .base import SelfAttention
from .big_bird import BigBirdSelfAttention
from .local import LocalSelfAttention
from .longformer import LongformerSelfAttention
from .lsh import LSHSelfAttention
from .named import ATTENTIONS
from .neighborhood import NeighborhoodSelfAttention
from .nystromformer import NystromformerSelfAttention
from .performer import PerformerSelfAttention
from .softmax import SoftmaxSelfAttention


__all__ = [
    "ATTENTIONS",
    "BigBirdSelfAttention",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "LongformerSelfAttention",
    "NeighborhoodSelfAttention",
    "NystromformerSelfAttention",
    "PerformerSelfAttention",
    "SelfAttention",
    "SoftmaxSelfAttention",
]
