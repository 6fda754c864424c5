"""What kernels on a CPU share, in formulas and in the frame: scratch memory, and dropout that can be replayed."""

from .residual import dropout_add
from .scratch import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay


__all__ = ["CHUNK_BYTES", "DropoutReplay", "Scratch", "draw_replay", "dropout_add"]
