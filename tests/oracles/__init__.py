"""Dense, slow references in float64. They define what is right, and import nothing of the package."""

from .big_bird import big_bird, big_bird_module, random_choice
from .common import masked_attention, padding, project, softmax, softmax_module
from .grid_window import grid_window, grid_window_module, neighbours
from .longformer import longformer_module, sliding_window, window
from .nystromformer import nystrom, nystromformer_module
from .performer import performer, performer_module, performer_weights
from .reformer import angular_buckets, attend_pairs, bucket_factors, chunk_pairs, local, local_module, lsh, lsh_module


__all__ = [
    "angular_buckets",
    "attend_pairs",
    "big_bird",
    "big_bird_module",
    "bucket_factors",
    "chunk_pairs",
    "grid_window",
    "grid_window_module",
    "local",
    "local_module",
    "longformer_module",
    "lsh",
    "lsh_module",
    "masked_attention",
    "neighbours",
    "nystrom",
    "nystromformer_module",
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
