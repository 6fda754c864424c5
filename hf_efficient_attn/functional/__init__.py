"""Attention formulas: pure functions on `[batch, heads, length, head_dim]` tensors, torch only.

Every formula takes `query, key, value, key_padding_mask=None, *, scale=None, dropout_p=0.0` and its own keyword-only
parameters, and returns `[batch, heads, length, head_dim]` in `query.dtype`. `key_padding_mask` is `[batch, length]`
bool, True = attend. Rows of padding positions, and rows that may attend nothing, are 0.
"""

from .big_bird import (
    BigBirdPlan,
    big_bird_attention,
    blocks_in_reach,
    dense_big_bird_attention,
    plan_big_bird,
)
from .block_layout import count_text_blocks
from .chunk_attention import chunk_attention, dense_chunk_attention
from .chunk_plan import valid_counts
from .chunk_step import chunk_step
from .dense import dense_attention, dense_softmax_attention, softmax_attention
from .dense_execution import dense_execution
from .exact_rows import all_are_short, check_exact_below
from .favor import check_exact_kernel, dense_performer_attention, performer_attention, performer_step
from .favor_causal import PerformerState
from .favor_features import KERNELS, orthogonal_features
from .fused import FusedTable, fused, fused_kernels
from .grid_window import grid_window_allowed, grid_window_attention
from .hashed_attention import hashed_attention
from .inputs import count_blocks, zero_padding
from .lsh_hash import hash_buckets, hash_rotations, powers_of_two, table_sizes
from .nearby import add_nearby
from .nearby_cpu import cpu_add_nearby
from .nystrom import Landmarks, dense_nystrom_attention, nystrom_attention, segment_landmarks
from .projected import projected_attention
from .random_blocks import pick_random_blocks, random_draws
from .sliding_window import sliding_window_allowed, sliding_window_attention
from .tokens import TokenSlots, gather_tokens, replace_tokens, select_tokens
from .window_block_mask import window_block_mask
from .window_flex import flex_sliding_window_attention


__all__ = [
    "BigBirdPlan",
    "FusedTable",
    "KERNELS",
    "Landmarks",
    "PerformerState",
    "TokenSlots",
    "add_nearby",
    "all_are_short",
    "big_bird_attention",
    "blocks_in_reach",
    "check_exact_below",
    "check_exact_kernel",
    "chunk_attention",
    "chunk_step",
    "cpu_add_nearby",
    "count_blocks",
    "count_text_blocks",
    "dense_attention",
    "dense_big_bird_attention",
    "dense_chunk_attention",
    "dense_execution",
    "dense_nystrom_attention",
    "dense_performer_attention",
    "dense_softmax_attention",
    "flex_sliding_window_attention",
    "fused",
    "fused_kernels",
    "gather_tokens",
    "grid_window_allowed",
    "grid_window_attention",
    "hash_buckets",
    "hash_rotations",
    "hashed_attention",
    "nystrom_attention",
    "orthogonal_features",
    "performer_attention",
    "performer_step",
    "pick_random_blocks",
    "plan_big_bird",
    "powers_of_two",
    "projected_attention",
    "random_draws",
    "replace_tokens",
    "segment_landmarks",
    "select_tokens",
    "sliding_window_allowed",
    "sliding_window_attention",
    "softmax_attention",
    "table_sizes",
    "valid_counts",
    "window_block_mask",
    "zero_padding",
]
