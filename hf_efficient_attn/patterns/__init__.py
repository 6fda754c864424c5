"""What attends what in a layer, as a tensor and as a picture."""

from .drawing import draw_pattern
from .pattern import MAX_TOKENS, AttentionPattern, attention_pattern


__all__ = ["MAX_TOKENS", "AttentionPattern", "attention_pattern", "draw_pattern"]
