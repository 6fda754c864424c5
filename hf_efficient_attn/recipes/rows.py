"""Texts as rows of tokens to train a language model on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_efficient_attn import DataCollatorWithPacking

from .sides import column_names


def cut_texts(
    side: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_length: int, column: str = "text"
) -> Dataset | IterableDataset:
    """Texts as rows of at most `max_length` tokens, a long text in several rows, each with its special tokens.

    Args:
        side: has the column `column`; of a stream the rows are made while it is read.
        tokenizer: a fast one.
        max_length: tokens of a row, special ones counted.
        column: the texts.

    Returns:
        The column `input_ids`. Nothing is padded, and nothing lost.
    """
    empty = tokenizer.num_special_tokens_to_add()

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoding = tokenizer(
            batch[column], truncation=True, max_length=max_length, return_overflowing_tokens=True, verbose=False
        )
        return {"input_ids": [ids for ids in encoding["input_ids"] if len(ids) > empty]}

    return side.map(encode, batched=True, remove_columns=column_names(side))


def continue_texts(
    side: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, max_length: int, column: str = "text"
) -> Dataset | IterableDataset:
    """Texts as rows of at most `max_length` tokens for a causal model, which predicts each token of a text just once.

    Around a text stand the tokens of beginning and end (the end's for both where there is no other). A long text has
    several rows, of which each begins with the last token of the one before, so that its first token is predicted too.

    Args:
        side, tokenizer, max_length, column: as in `cut_texts`.

    Returns:
        The columns `input_ids` and `labels`, which are equal: causal models shift the labels.

    Raises:
        ValueError: a tokenizer without an end token, a `max_length` below 2.
    """
    end = tokenizer.eos_token_id
    if end is None or max_length < 2:
        raise ValueError(
            f"eos_token = {tokenizer.eos_token!r} and max_length = {max_length}: rows need a token that ends a text, "
            "and 2 tokens or more."
        )
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = []
        for ids in tokenizer(batch[column], add_special_tokens=False, verbose=False)["input_ids"]:
            whole = [begin, *ids, end]
            rows += [whole[start : start + max_length] for start in range(0, len(whole) - 1, max_length - 1)]
        return {"input_ids": rows, "labels": rows}

    return side.map(encode, batched=True, remove_columns=column_names(side))


def padding_step(max_length: int) -> int | None:
    """`pad_to_multiple_of` for rows of at most `max_length` tokens: 8, which is quick on GPUs, or else None.

    A row that was cut to `max_length` must not be padded beyond it, as far as a model may not read.
    """
    return 8 if max_length % 8 == 0 else None


class CollatorOfSides:
    """One collator for the training side, another for the held-out one, whose rows have labels already.

    Trainer knows a single collator; but the held-out side is to be the same in every evaluation, and of rows that
    every process has as many of.

    Args:
        train: for rows without `labels`.
        held_out: for rows with them.
    """

    def __init__(self, train: Callable[[list[Any]], Any], held_out: Callable[[list[Any]], Any]) -> None:
        self.train, self.held_out = train, held_out

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate `features` into tensors."""
        return (self.held_out if "labels" in features[0] else self.train)(features)


def pack(
    collator: Callable[[list[Any]], Any], model: PreTrainedModel, max_length: int, causal: bool = False
) -> DataCollatorWithPacking:
    """Several documents in a row for `model`, without a look at each other; see `DataCollatorWithPacking`.

    Raises:
        ValueError: a model that takes no `document_ids`, and would let every document attend the others.
    """
    if "document_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"--pack: {type(model).__name__} cannot keep documents of a row apart: leave it out, or take a text family "
            "of this package."
        )
    return DataCollatorWithPacking(collator, max_length, causal=causal)
