"""Texts as tokens to train on; small models of any family; an EffLongformer classifier trained with `Trainer`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import hf_efficient_attn
from hf_efficient_attn import FAMILIES, EffLongformerForSequenceClassification

from .corpus import Corpus


MIN_BLOCK = 8


# What mechanisms need to be small, for the families that have such a field.
SMALL_OPTIONS = {
    "attention_window": 64,
    "block_size": 16,
    "num_random_blocks": 2,
    "num_landmarks": 32,
    "conv_kernel_size": 33,
    "num_features": 64,
    "local_attn_chunk_length": 64,
    "lsh_attn_chunk_length": 64,
    "axial_norm_std": 0.02,
}


def small_config(
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    family: str = "eff_longformer",
    **options: Any,
) -> PreTrainedConfig:
    """The config of a model small enough to train from scratch in minutes on a CPU.

    Args:
        tokenizer: gives the vocabulary's size and the special tokens' ids.
        labels: the labels' names, in the order of their ids; none for a model without.
        max_length: the longest input, in tokens.
        family: a name in `TEXT_FAMILIES`.
        options: any fields of its config, in place of the ones chosen here.
    """
    config_class = getattr(hf_efficient_attn, FAMILIES[family].config_name)
    hidden_size = options.get("hidden_size", 64)
    chosen = {
        **SMALL_OPTIONS,
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden_size,
        # RoBERTa-style position tables reserve the rows up to the pad id.
        "max_position_embeddings": max_length + tokenizer.pad_token_id + 1,
        "type_vocab_size": 0,
        # From scratch in a few hundred steps: norms before the layers, and weights that keep the signal's scale,
        # where BERT's post-norm and 0.02 need a long warm-up.
        "initializer_range": 0.08,
        # Dropout of the probabilities would double the time of attention.
        "attention_probs_dropout_prob": 0.0,
    }
    if family != "eff_reformer":  # whose reversible layers know one order only
        chosen["norm_position"] = "pre"
    known = {field.name for field in fields(config_class)}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
        chosen[name] = getattr(tokenizer, name)
    if labels:
        chosen |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    return config_class(**{**{name: value for name, value in chosen.items() if name in known}, **options})


def tokenize_texts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    text_column: str = "text",
    label_column: str = "label",
) -> Dataset:
    """Tokenize texts: `input_ids` and `attention_mask`, cut at `max_length` tokens, not padded, and `labels`."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoding = tokenizer(batch[text_column], truncation=True, max_length=max_length)
        return {**encoding, "labels": batch[label_column]}

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, desc="Tokenizing")


def pack_texts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, text_column: str = "text"
) -> Dataset:
    """Texts one after the other, cut into blocks of `max_length` tokens to pretrain on: `[CLS] ... [SEP]`.

    Texts are joined in the order of the dataset with one `[SEP]` between them; nothing is padded, and nothing is lost
    but a last block of fewer than 8 tokens. This is the "full sentences" input of RoBERTa
    (Liu et al. 2019, https://arxiv.org/abs/1907.11692), cut between tokens, not between sentences.

    Args:
        dataset: has the column `text_column`.
        tokenizer: one with a CLS and a SEP token, whatever they are called.
        max_length: tokens a block, CLS and SEP counted; 8 or more.

    Returns:
        The column `input_ids`; a block has `max_length` tokens, one less where a text ends there, and the last one 8 or
        more.

    Raises:
        ValueError: `max_length` below 8; a tokenizer without a CLS or SEP token.
    """
    if max_length < MIN_BLOCK:
        raise ValueError(f"max_length is {max_length}, but a block has {MIN_BLOCK} tokens at least: pass a larger one.")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if cls is None or sep is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has the CLS token {tokenizer.cls_token!r} and the SEP token "
            f"{tokenizer.sep_token!r}, but blocks begin and end with them: set tokenizer.cls_token and .sep_token."
        )
    stream: list[int] = []
    for batch in dataset.iter(batch_size=1000):
        # Whole documents are longer than the model's limit by design: `verbose=False` keeps the warning away.
        for ids in tokenizer(batch[text_column], add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, sep] if ids else []
    blocks = []
    start = 0
    while start < len(stream):
        piece = stream[start : start + max_length - 1]
        if piece[-1] != sep:  # the text goes on in the next block
            piece.pop()
        start += len(piece)
        blocks.append([cls, *piece] if piece[-1] == sep else [cls, *piece, sep])
    if blocks and len(blocks[-1]) < MIN_BLOCK:
        blocks.pop()
    return Dataset.from_dict({"input_ids": blocks})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of examples whose largest logit stands at their label; `compute_metrics` of `Trainer`."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == prediction.label_ids))}


class TimeLimit(TrainerCallback):
    """Ends training after the step in which `seconds` have passed; `reached` tells whether that happened.

    The learning rate falls to zero by then: on a busy machine training is shorter, but it is finished.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.reached = False
        self._start = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Stop when the time is over; lower the learning rate where the time runs out before the steps do."""
        left = 1.0 - (time.monotonic() - self._start) / self.seconds if self.seconds > 0 else 0.0
        for group in optimizer.param_groups:
            group["lr"] = min(group["lr"], max(left, 0.0) * args.learning_rate)
        if left <= 0.0 and state.global_step < state.max_steps:
            self.reached = control.should_training_stop = True


def finetune(
    corpus: Corpus,
    output_dir: str | Path,
    *,
    epochs: float = 6,
    batch_size: int = 4,
    learning_rate: float = 2e-3,
    max_seconds: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Trainer:
    """Train a new EffLongformer classifier on a corpus, on the CPU, and save it with its tokenizer.

    Args:
        corpus: what to learn; documents are as long as its tokenizer's `model_max_length`.
        output_dir: the folder for the model (safetensors), the config and the tokenizer.
        epochs: passes over the training side.
        batch_size: documents a step.
        learning_rate: its peak; it rises over the first tenth and falls to zero linearly.
        max_seconds: end earlier, after the step in which so much time has passed.
        seed: of the weights, the order of the documents and the dropout.
        options: fields of `EffLongformerConfig`, in place of `small_config`'s.

    Returns:
        The `Trainer`, trained; its `eval_dataset` is the tokenized held-out side.
    """
    max_length = corpus.tokenizer.model_max_length
    config = small_config(corpus.tokenizer, corpus.labels, max_length, **options)
    train_dataset = tokenize_texts(corpus.train, corpus.tokenizer, max_length)
    trainer = Trainer(
        # A function, not a model: Trainer seeds before it builds the weights.
        model_init=lambda: EffLongformerForSequenceClassification(config),
        args=TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=8,
            # Batches of documents of like length: less padding.
            train_sampling_strategy="group_by_length",
            learning_rate=learning_rate,
            adam_beta2=0.98,
            warmup_steps=0.1,
            logging_steps=0.1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=train_dataset,
        eval_dataset=tokenize_texts(corpus.eval, corpus.tokenizer, max_length),
        processing_class=corpus.tokenizer,
        data_collator=DataCollatorWithPadding(corpus.tokenizer),
        compute_metrics=accuracy,
        callbacks=None if max_seconds is None else [TimeLimit(max_seconds)],
    )
    trainer.train()
    trainer.save_model()
    # Grouping by length would reorder what `predict` returns as well.
    trainer.args.train_sampling_strategy = "random"
    return trainer
