"""Data sets from files, folders and the Hub, on two sides."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError


LOADERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
SHUFFLED = 1000  # rows of a stream that wait to be drawn from


def load_sides(
    source: str,
    *,
    config: str | None = None,
    eval_source: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_share: float = 0.2,
    seed: int = 0,
    txt_rows: str = "line",
    streaming: bool = False,
    eval_rows: int = 500,
) -> tuple[Dataset | IterableDataset, Dataset]:
    """The training and the evaluation side of `source`.

    Args:
        source: a csv, tsv, json, jsonl, parquet or txt file, a folder with one subfolder of .txt files for each label,
            any other folder that `datasets.load_dataset` reads, such as one of images, or a name on the Hub.
        config: configuration of a Hub data set that has several.
        eval_source: file with the evaluation side, where `source` is a file.
        train_split, eval_split: names of the sides; without `eval_split` it is "validation" or "test", else
            `eval_share` of the training side, drawn with `seed`.
        txt_rows: what a row of a txt file is: a `"line"`, or a `"paragraph"`, which ends at an empty line.
        streaming: read the training side row by row while it is used, shuffled with `seed` among 1,000 rows at a time.
        eval_rows: of a stream, so many rows are the evaluation side, read into memory: the first ones of its split, or
            where there is none of the training side, which then begins behind them.

    Raises:
        ValueError: a file or side that there is not, a kind of file that is not known, a source that cannot be read.
    """
    path = Path(source)
    if eval_source and path.suffix not in LOADERS:
        raise ValueError(f"--eval-dataset goes with a file, not with {path}: use --eval-split.")
    if path.suffix in LOADERS:
        files = {train_split: source}
        if eval_source:
            files[eval_split or "validation"] = eval_source
        for file in files.values():
            if not Path(file).is_file():
                raise ValueError(f"there is no file {file}: check the path.")
        options = {".tsv": {"delimiter": "\t"}, ".txt": {"sample_by": txt_rows}}.get(path.suffix, {})
        try:
            splits = load_dataset(LOADERS[path.suffix], data_files=files, streaming=streaming, **options)
        except DatasetGenerationError as error:
            raise ValueError(
                f"{path} cannot be read as {path.suffix}, or is empty: {error.__cause__ or error}"
            ) from None
    elif path.is_file():
        raise ValueError(f"{path} ends in {path.suffix!r}, which is not known: pass {', '.join(LOADERS)}.")
    elif texts := sorted(path.glob("*/*.txt")):
        columns = {"text": [text.read_text("utf-8") for text in texts], "label": [text.parent.name for text in texts]}
        whole = Dataset.from_dict(columns).class_encode_column("label")
        splits = DatasetDict({train_split: whole.shuffle(seed).to_iterable_dataset() if streaming else whole})
    else:
        try:
            splits = load_dataset(source, config, streaming=streaming)
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise ValueError(
                f"{source} is no file, and cannot be loaded as a data set: {error.__cause__ or error}"
            ) from None

    for name in filter(None, (train_split, eval_split)):
        if name not in splits:
            raise ValueError(f"{source} has no split {name!r}: it has {', '.join(splits)}.")
    eval_split = eval_split or next((name for name in ("validation", "test") if name in splits), None)
    if streaming:
        return _sides_of_streams(source, splits[train_split], splits.get(eval_split), eval_rows, seed)
    if eval_split is None:
        if len(splits[train_split]) < 2:
            raise ValueError(f"{source} has {len(splits[train_split])} rows, and both sides need one: give more.")
        splits = splits[train_split].train_test_split(test_size=eval_share, seed=seed)
        return splits["train"], splits["test"]
    return splits[train_split], splits[eval_split]


def _sides_of_streams(
    source: str, train: IterableDataset, held_out: IterableDataset | None, eval_rows: int, seed: int
) -> tuple[IterableDataset, Dataset]:
    """The stream to learn from, and the first rows of the other one, or else of this one."""
    if held_out is None:
        held_out, train = train, train.skip(eval_rows)
    try:
        rows = list(held_out.take(eval_rows))
        is_empty = not rows or not list(train.take(1))
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from None
    if is_empty:
        raise ValueError(
            f"{source} has no row to learn from besides {len(rows)} for evaluation: give more, or a smaller "
            "--max-eval-examples."
        )
    return train.shuffle(seed=seed, buffer_size=SHUFFLED), Dataset.from_list(rows, features=held_out.features)
