"""The two sides of the data that a training script is given, checked, and the tokenizer to read it with."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_efficient_attn.demo import english_corpus, load_sides


STREAM_EVAL_ROWS = 500
Side = Dataset | IterableDataset


def read_sides(args: argparse.Namespace, *, eval_share: float = 0.2, txt_rows: str = "line") -> tuple[Side, Dataset]:
    """The training and the evaluation side of `args.dataset`, as the options say.

    Args:
        args: from a `RecipeParser`.
        eval_share: of the training side, where the data has no evaluation side.
        txt_rows: `"line"` or `"paragraph"`.

    Raises:
        ValueError: as in `load_sides`.
    """
    return load_sides(
        args.dataset,
        config=args.dataset_config,
        eval_source=args.eval_dataset,
        train_split=args.train_split,
        eval_split=args.eval_split,
        eval_share=eval_share,
        seed=args.seed,
        txt_rows=txt_rows,
        streaming=args.streaming,
        eval_rows=args.max_eval_examples or STREAM_EVAL_ROWS,
    )


def limit_sides(args: argparse.Namespace, train: Side, held_out: Dataset) -> tuple[Side, Dataset]:
    """The sides with no more rows than `--max-train-examples` and `--max-eval-examples`, drawn with the seed."""
    if args.max_train_examples is not None:
        if isinstance(train, IterableDataset):
            train = train.take(args.max_train_examples)
        else:
            train = _drawn(train, args.max_train_examples, args.seed)
    if args.max_eval_examples is not None:
        held_out = _drawn(held_out, args.max_eval_examples, args.seed)
    for name, side in (("training", train), ("evaluation", held_out)):
        if isinstance(side, Dataset) and len(side) == 0:
            raise ValueError(f"the {name} side has no rows: give more, or name other splits.")
    return train, held_out


def read_texts(
    args: argparse.Namespace, *, eval_share: float = 0.1, txt_rows: str = "paragraph"
) -> tuple[Side, Dataset]:
    """Texts to learn a language from: those of `args.dataset` in the column `args.text_column`, or Python's English.

    Raises:
        ValueError: as in `load_sides` and `check_columns`.
    """
    if args.dataset is None:
        corpus = english_corpus(seed=args.seed)
        sides: tuple[Side, Dataset] = (corpus.train, corpus.eval)
        args.text_column = "text"
    else:
        sides = read_sides(args, eval_share=eval_share, txt_rows=txt_rows)
        check_columns(sides, {"--text-column": args.text_column})
    return limit_sides(args, *sides)


def _drawn(side: Dataset, limit: int, seed: int) -> Dataset:
    return side if len(side) <= limit else side.shuffle(seed=seed).select(range(limit))


def column_names(side: Side) -> list[str]:
    """The names of the columns, also of a stream that does not tell them before its first row."""
    if side.column_names is not None:
        return list(side.column_names)
    return list(next(iter(side)))


def check_columns(
    sides: Iterable[Side], columns: dict[str, str], kind: type | None = str, *, gaps: bool = False
) -> None:
    """Check that each side has these columns, without gaps (in lists too) and with values of one type.

    Args:
        sides: training and evaluation side. Of a stream only the names are looked at.
        columns: option that names a column -> its name.
        kind: the values' type; None for any.
        gaps: whether a row may have nothing there.

    Raises:
        ValueError: a column that is missing or has such a row; the message names the option.
    """
    for name, side in zip(("training", "evaluation"), sides, strict=True):
        known = column_names(side)
        for option, column in columns.items():
            if column not in known:
                raise ValueError(
                    f"the {name} side has no column {column!r}, it has {', '.join(known)}: name the columns with "
                    f"{', '.join(columns)}."
                )
            if isinstance(side, IterableDataset):
                continue
            values = side[column]
            if not gaps and (empty := sum(value is None for value in values)):
                raise ValueError(f"column {column!r} is empty in {empty} rows of the {name} side: remove them.")
            if kind is not None and not all(isinstance(value, kind) for value in values):
                raise ValueError(
                    f"column {column!r} of the {name} side has rows that are no {kind.__name__}: remove them, or name "
                    f"another column with {option}."
                )
            if kind is list and (holed := sum(None in value for value in values)):
                raise ValueError(
                    f"column {column!r} has lists with gaps (null) in {holed} rows of the {name} side: remove them."
                )


def labels_like(given: Sequence[str], values: Iterable[Any], column: str) -> list[Any]:
    """The labels of `--labels` as the data has them: whole numbers where `values` are such.

    Raises:
        ValueError: values that are neither strings nor whole numbers, or labels that are no numbers where these are.
    """
    kinds = {type(value) for value in values}
    if kinds <= {str}:
        return list(given)
    if kinds != {int}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"column {column!r} has to hold strings or whole numbers, but it holds {found}.")
    try:
        return [int(label) for label in given]
    except ValueError:
        raise ValueError(
            f"--labels {' '.join(given)}: column {column!r} holds whole numbers: give those, all of them."
        ) from None


def load_tokenizer(source: str | Path | None, make: Callable[[], Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub name, or else the one that `make` trains.

    With several processes the first one trains it and the others get the same. Training must not be repeated in each,
    nor after an interruption: a vocabulary that differs in one place makes nonsense of the weights.

    Raises:
        ValueError: what `make` raises, on every process; a tokenizer that is not there, or slow (not of the tokenizers
            library).
    """
    if source is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:  # which do not always name it
            raise ValueError(f"the tokenizer of {source} cannot be loaded: {error}") from None
        if not tokenizer.is_fast:
            raise ValueError(
                f"{source} has a slow tokenizer, which does not tell where tokens stand: take another one."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    made: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            made = [make()]
        except ValueError as error:
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], ValueError):
        raise made[0]
    return made[0]
