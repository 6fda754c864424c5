"""What the command `hf-efficient-attn pattern` does."""

import difflib
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..auto import FAMILIES
from ..loading import class_of, load_whole
from .drawing import check_picture, draw_pattern
from .pattern import AttentionPattern, attention_pattern, check_length


_HEADS, _HEAD_DIM = 4, 64


def draw_command(
    what: str, output: Path, length: int, *, options: dict[str, Any], dpi: int, **choices: Any
) -> AttentionPattern:
    """Draw a layer of a family or of the model in a folder to `output`, and return what was drawn.

    Args:
        what: a row of `FAMILIES`, or a folder that `save_pretrained` wrote.
        output: the picture.
        length: tokens, or patches.
        options: fields of the family's config; none with a folder.
        dpi: as in `draw_pattern`.
        choices: `layer`, `seed`, `weights` and `num_global` of `attention_pattern`.

    Raises:
        ValueError: what neither is, and what those functions raise, before anything is computed where that is known.
    """
    output = check_picture(output)
    check_length(length)
    if not 10 <= dpi <= 1000:
        raise ValueError(f"dpi = {dpi}: give 10 to 1000 points an inch.")
    model = small_config(what, length, options) if what in FAMILIES else load_model(what, options)
    pattern = attention_pattern(model, length, **choices)
    draw_pattern(pattern, output, dpi=dpi)
    return pattern


def small_config(family: str, length: int, options: dict[str, Any]) -> PreTrainedConfig:
    """The config of a family for inputs of `length`, with its own options but few and small heads; `options` win.

    Raises:
        ValueError: an option that there is not, or that breaks a rule.
    """
    row = FAMILIES[family]
    cls = getattr(row.module("configuration"), row.config_name)
    heads = options.get("num_attention_heads", _HEADS)
    small: dict[str, Any] = {"num_attention_heads": heads}
    if isinstance(heads, int) and heads > 0:
        width = heads * _HEAD_DIM
        # Weights as large as that keep the variance of what they map, so that some pairs weigh more than others.
        small |= {"hidden_size": width, "intermediate_size": width, "initializer_range": width**-0.5}
    if row.tokenizer is not None:
        # Some first rows of the table of positions may be reserved.
        small["max_position_embeddings"] = max(cls.max_position_embeddings, length + 8)
    return cls(**{**small, **options})


def load_model(folder: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model that a folder holds, with all its weights.

    Raises:
        ValueError: there is no such folder, it holds no model of a family or not all weights, or `options` are given.
    """
    if not Path(folder).is_dir():
        near = difflib.get_close_matches(folder, FAMILIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{folder!r} is neither a family ({', '.join(FAMILIES)}) nor a folder.{hint}")
    if options:
        raise ValueError(
            f"--option {next(iter(options))}: a folder's config has its own; options are for a family's name."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"{folder} holds a {config.model_type!r}, which is no family of this package ({', '.join(FAMILIES)}); "
                "hf-efficient-attn convert makes one of it."
            )
        return load_whole(class_of(config), folder)[0]
    except OSError as error:  # of transformers: nothing there, or nothing that can be read
        raise ValueError(f"{folder}: {error}") from error
