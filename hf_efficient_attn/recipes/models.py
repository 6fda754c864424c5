"""The model of a training script: that of `--model`, or a new small one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_efficient_attn import FAMILIES
from hf_efficient_attn.demo import small_config


def make_model(
    auto_class: Any,
    args: argparse.Namespace,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """A text model: what `--model` names, with a new head where it has none or other labels, or a new one.

    `args.max_length`, and with it the tokenizer's `model_max_length`, becomes what was asked for, or else what the
    model takes. Draws from torch's generator: call `set_seed` before.

    Args:
        auto_class: such as `AutoModelForMaskedLM`.
        args: from a `RecipeParser`; a new model is one of `args.family`.
        arguments: they are told whether several processes can rely on a gradient for every parameter, as they can with
            the models of this package.
        tokenizer: what the model is to read with.
        labels: their names, in the order of their ids; none for a task without.
        options: fields of a new model's config, in place of those of `small_config`.

    Raises:
        ValueError: `--max-length` beyond what the model takes, or with no room for a text.
    """
    if args.model is None:
        args.max_length = args.max_length or args.new_length
        config = small_config(tokenizer, labels, args.max_length, args.family, **options)
        model = auto_class.from_config(config)
    else:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
        config = AutoConfig.from_pretrained(args.model, **(names if labels else {}))
        args.max_length = _input_length(args, config, tokenizer)
        model = auto_class.from_pretrained(args.model, config=config, ignore_mismatched_sizes=bool(labels))
    special = tokenizer.num_special_tokens_to_add()
    if args.max_length <= special:
        raise ValueError(
            f"--max-length is {args.max_length}, but {special} special tokens stand around every text: pass more."
        )
    tokenizer.model_max_length = args.max_length
    if model.config.model_type in FAMILIES:
        arguments.ddp_find_unused_parameters = False
    return model


def _input_length(args: argparse.Namespace, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    # Models of this package say how long an input may be; elsewhere the tokenizer knows.
    known = getattr(config, "max_input_length", getattr(config, "max_position_embeddings", None))
    longest = min(tokenizer.model_max_length, known or tokenizer.model_max_length)
    if args.max_length is not None and args.max_length > longest:
        raise ValueError(f"--max-length is {args.max_length}, but {args.model} takes {longest} tokens at most.")
    # Some tell no limit at all.
    return args.max_length or (longest if longest < 2**20 else args.new_length)
