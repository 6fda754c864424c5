"""Up to which size a mechanism computes softmax attention itself."""

import math
from typing import Any

from ..attention.named import attention_options_of
from .sources import Source


ALWAYS = 2**31


def softmax_length(config: Any) -> int:
    """Tokens up to which a config's mechanism is softmax attention; `ALWAYS`, or 0 for never."""
    name, options = config.model_type.removeprefix("eff_"), config
    if hasattr(config, "attention"):
        name, options = config.attention, attention_options_of(config)
    if name == "softmax":
        return ALWAYS
    if hasattr(config, "image_size"):
        return 0
    if name == "longformer":
        layers = range(config.num_hidden_layers)
        steps = [options.dilation_of(layer) for layer in layers]
        if any(step not in (1, [1] * config.num_attention_heads) for step in steps):
            return 0
        return min(options.window_of(layer) for layer in layers) // 2 + 1
    if name == "nystromformer":
        return options.num_landmarks
    if name == "big_bird":
        return big_bird_length(options)
    if name == "local":
        # The last chunk is also the one before the first.
        before = options.local_num_chunks_before if options.chunk_rule == "released" else 0
        return (before + 1) * options.local_attn_chunk_length
    return 0


def big_bird_length(options: Any) -> int:
    """Tokens up to which a block attends every block: itself, both neighbours, global and random ones."""
    if options.attention_type == "original_full":
        return ALWAYS
    if options.num_global_tokens > 0:
        return 0
    reached = options.num_random_blocks + (4 if options.global_ends else 2)
    return max(reached, 3 if options.global_ends else 2) * options.block_size


def sample_lengths(source: Source, config: Any, wanted: int | None) -> dict[int, bool]:
    """Lengths to measure at, the shorter first -> whether outputs are equal there.

    Args:
        source: the source.
        config: of the model that it became, whichever of both is ours.
        wanted: the one length to measure at, or None.
    """
    old = source.model.config
    theirs, ours = (old, config) if config.model_type.startswith("eff_") else (config, old)
    longest = min(longest_input(old), longest_input(config))
    lengths = [wanted] if wanted is not None else sorted({min(128, longest), min(512, longest)})
    if lengths[-1] > longest or lengths[0] < 1:
        raise ValueError(f"sample_length = {wanted}: source and result both read 1 to {longest} tokens; give such one.")
    kind = theirs.model_type
    if kind == "longformer":
        return dict.fromkeys(lengths, True)
    if kind == "reformer":
        # There the chunk before the first one is the last of the padded text.
        chunks = math.lcm(ours.lsh_attn_chunk_length, ours.local_attn_chunk_length)
        local = "lsh" not in ours.attn_layers[: ours.num_hidden_layers]
        whole = dict.fromkeys(length - length % chunks or length for length in lengths)
        return {length: local and length % chunks == 0 for length in whole}
    if kind == "nystromformer" and theirs.segment_means_seq_len != theirs.num_landmarks:
        # At other lengths transformers' model raises.
        only = theirs.segment_means_seq_len
        return {only: True} if only <= longest else {}
    limit = softmax_length(ours)
    if kind == "big_bird" and theirs.attention_type != "original_full":
        # It turns dense where a text is no longer than this.
        limit = min(limit, (5 + 2 * theirs.num_random_blocks) * theirs.block_size)
    return {length: length <= limit for length in lengths}


def longest_input(config: Any) -> int:
    """Tokens that a model of ours or of transformers reads."""
    if hasattr(config, "max_input_length"):
        return config.max_input_length
    kind = config.model_type
    if kind in ("roberta", "xlm-roberta", "camembert", "longformer"):
        return config.max_position_embeddings - (config.pad_token_id or 0) - 1
    return config.max_position_embeddings
