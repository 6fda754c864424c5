"""Dense, slow references in float64. They define what is right, and import nothing of the package."""

from .big_bird import big_bird, big_bird_module, random_choice
from .common import masked_attention, padding, project, softmax, softmax_module
from .longformer import longformer_module, sliding_window, window
from .performer import performer, performer_module, performer_weights


__all__ = [
    "big_bird",
    "big_bird_module",
    "longformer_module",
    "masked_attention",
    "padding",
    "performer",
    "performer_module",
    "performer_weights",
    "project",
    "random_choice",
    "sliding_window",
    "softmax",
    "softmax_module",
    "window",
]
