"""Kernels on a CPU: what those of formulas share, scratch memory and dropout to replay, and those of the frame."""

from .derivatives import first_derivatives
from .feed_forward import feed_forward
from .idle import add_idle, can_add_idle
from .modules import (
    TOKENS_AT_ONCE,
    can_overwrite,
    in_reach,
    in_reach_of_training,
    is_plain,
    is_recorder,
    without_autocast,
)
from .projections import linear_maps
from .residual import dropout, dropout_add
from .scratch import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay


__all__ = [
    "CHUNK_BYTES",
    "TOKENS_AT_ONCE",
    "DropoutReplay",
    "Scratch",
    "add_idle",
    "can_add_idle",
    "can_overwrite",
    "draw_replay",
    "dropout",
    "dropout_add",
    "feed_forward",
    "first_derivatives",
    "in_reach",
    "in_reach_of_training",
    "is_plain",
    "is_recorder",
    "linear_maps",
    "without_autocast",
]
