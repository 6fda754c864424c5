"""A long-document corpus every Python ships with: the standard library's source files, labelled by their package."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from .tokenizer import train_tokenizer


# Packages (not single modules) that Python 3.11 to 3.14 all have. `encodings` is left out: its files are tables.
CANDIDATES = (
    "asyncio", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "idlelib", "importlib", "json",
    "logging", "multiprocessing", "re", "sqlite3", "tkinter", "turtledemo", "unittest", "urllib", "wsgiref", "xml",
    "xmlrpc", "zoneinfo",
)  # fmt: skip
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__"})
MIN_FILES = 4


@dataclass(frozen=True)
class SourceFile:
    """One source file: the package that is its label, its path below the library's folder, its text."""

    package: str
    path: str
    text: str


def read_packages(num_packages: int = 10, stdlib: str | Path | None = None) -> dict[str, list[SourceFile]]:
    """Read the `num_packages` standard-library packages with the most text, tests left out.

    Args:
        num_packages: how many packages (labels) to take, the largest first.
        stdlib: the folder to look in; by default this Python's own standard library.

    Returns:
        Package name -> its non-empty files in a fixed order; the names are sorted.

    Raises:
        ValueError: fewer than two packages with at least four files each are there.
    """
    if num_packages < 2:
        raise ValueError(f"num_packages is {num_packages}, but a classifier needs two labels: pass 2 or more.")
    root = library_folder(stdlib)
    found = {name: files for name in CANDIDATES if len(files := read_files(root, name)) >= MIN_FILES}
    if len(found) < 2:
        raise ValueError(
            f"{root} holds {len(found)} of the standard library's packages with {MIN_FILES} source files or more, but "
            "the corpus needs two: use a Python whose standard library lies there as .py files (not inside a zip)."
        )
    largest = sorted(found, key=lambda name: (-sum(len(file.text) for file in found[name]), name))[:num_packages]
    return {name: found[name] for name in sorted(largest)}


def library_folder(stdlib: str | Path | None = None) -> Path:
    """The folder `stdlib`, or by default this Python's own standard library."""
    return Path(stdlib if stdlib is not None else sysconfig.get_path("stdlib"))


def read_files(root: Path, package: str = "", skipped: frozenset[str] = TEST_FOLDERS) -> list[SourceFile]:
    """The non-empty `.py` files of one package below `root` (of all of it for `""`), in the order of their paths.

    Folders whose name is in `skipped` are not entered, at any depth.
    """
    paths = []
    for folder, subfolders, names in os.walk(root / package):
        # Here, not afterwards: what pip installed may lie below, tens of thousands of files.
        subfolders[:] = [name for name in subfolders if name not in skipped]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8", errors="ignore") for path in sorted(paths)}
    return [SourceFile(package, path, text) for path, text in texts.items() if text.strip()]


def split_by_file(
    packages: dict[str, list[SourceFile]], eval_fraction: float = 0.25, seed: int = 0
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Hold out whole files, about `eval_fraction` of each package's text, so that no file is on both sides.

    Returns:
        `(train_files, eval_files)`, both with at least one file of each package.

    Raises:
        ValueError: `eval_fraction` is not between 0 and 1, or a package has fewer than two files.
    """
    if not 0.0 < eval_fraction < 1.0:
        raise ValueError(f"eval_fraction is {eval_fraction}, but it is a share of the text: pass one between 0 and 1.")
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    for name, files in packages.items():
        if len(files) < 2:
            raise ValueError(f"package {name!r} has {len(files)} file(s), but each side of the split needs one.")
        shuffled = list(files)
        random.Random(f"{seed}-{name}").shuffle(shuffled)
        wanted = eval_fraction * sum(len(file.text) for file in files)
        taken: list[SourceFile] = []
        size = 0
        for file in shuffled:
            # A file is taken when that brings the share nearer to the wanted one: one huge file must not fill a side.
            if len(taken) < len(files) - 1 and abs(size + len(file.text) - wanted) < abs(size - wanted):
                taken.append(file)
                size += len(file.text)
        if not taken:
            taken.append(min(shuffled, key=lambda file: len(file.text)))
        names = {file.path for file in taken}
        held_out += taken
        train += [file for file in files if file.path not in names]
    return train, held_out


def cut_documents(
    files: Iterable[SourceFile], tokenizer: PreTrainedTokenizerBase, max_length: int, min_length: int = 256
) -> list[dict[str, str]]:
    """Cut files into documents of at most `max_length` tokens, special tokens counted, each ending with a line.

    Args:
        files: the files to cut; nothing is added to their text.
        tokenizer: a fast tokenizer (the cuts need its character offsets).
        max_length: tokens a document, at most.
        min_length: shorter documents (small files, ends of files) are left out.

    Returns:
        One `{"text", "label", "file"}` a document; the label is the package's name.

    Raises:
        ValueError: `max_length` leaves no room for text.
    """
    room = max_length - tokenizer.num_special_tokens_to_add()
    if room < 1:
        raise ValueError(f"max_length is {max_length}, but the special tokens take all of it: pass a larger one.")
    documents = []
    for file in files:
        # A whole file is longer than the model's limit by design: `verbose=False` keeps the tokenizer from warning.
        encoding = tokenizer(file.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        start = 0
        while len(offsets) - start >= min_length:
            end = min(start + room, len(offsets))
            if end < len(offsets):
                end = _last_line_start(file.text, offsets, start, end)
            text = file.text[offsets[start][0] : offsets[end][0] if end < len(offsets) else len(file.text)]
            documents.append({"text": text, "label": file.package, "file": file.path})
            start = end
    return documents


def _last_line_start(text: str, offsets: Sequence[tuple[int, int]], start: int, end: int) -> int:
    # Cutting where a line ends keeps words whole, so that the piece alone is tokenized as it was inside the file.
    for position in range(end, max(start + (end - start) // 2, start + 1), -1):
        before = offsets[position][0]
        if "\n" in text[offsets[position - 1][0] : before]:
            return position
    return end


def to_dataset(documents: Sequence[dict[str, str]], labels: Sequence[str]) -> Dataset:
    """Documents as a `datasets.Dataset` with columns `text`, `label` (a `ClassLabel` over `labels`) and `file`."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(labels)), "file": Value("string")})
    columns = {name: [document[name] for document in documents] for name in features}
    return Dataset.from_dict(columns, features=features)


def cap_per_label(documents: Sequence[dict[str, str]], limit: int, seed: int = 0) -> list[dict[str, str]]:
    """At most `limit` documents of each label, drawn with `seed`, in their old order."""
    kept: list[int] = []
    for label in sorted({document["label"] for document in documents}):
        indices = [index for index, document in enumerate(documents) if document["label"] == label]
        kept += random.Random(f"{seed}-{label}").sample(indices, min(limit, len(indices)))
    return [documents[index] for index in sorted(kept)]


@dataclass(frozen=True)
class Corpus:
    """Documents on two sides, and the tokenizer that was trained on the texts of the training side.

    Args:
        train: columns `text`, `label`, `file`.
        eval: the held-out side, from other files.
        labels: the labels' names, in the order of their ids.
        tokenizer: its `model_max_length` is the documents' length in tokens.
    """

    train: Dataset
    eval: Dataset
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase


def stdlib_corpus(
    max_length: int = 2048,
    *,
    num_packages: int = 10,
    vocab_size: int = 8192,
    eval_fraction: float = 0.25,
    max_per_label: int | None = None,
    seed: int = 0,
    stdlib: str | Path | None = None,
) -> Corpus:
    """The standard library's source files as documents to classify by package, split by file.

    Args:
        max_length: tokens a document, at most, special tokens counted.
        num_packages: labels, the packages with the most text.
        vocab_size: of the byte-level BPE tokenizer trained on the training files.
        eval_fraction: the held-out share of each package's text.
        max_per_label: at most so many documents of each label and side; None keeps all.
        seed: of the split and of the choice under `max_per_label`.
        stdlib: the folder to read; by default this Python's own standard library.

    Raises:
        ValueError: an argument breaks a rule, or the standard library is not there as source files.
    """
    packages = read_packages(num_packages, stdlib)
    train_files, eval_files = split_by_file(packages, eval_fraction, seed)
    tokenizer = train_tokenizer((file.text for file in train_files), vocab_size, max_length)
    sides = []
    for files in (train_files, eval_files):
        documents = cut_documents(files, tokenizer, max_length)
        if max_per_label is not None:
            documents = cap_per_label(documents, max_per_label, seed)
        sides.append(to_dataset(documents, list(packages)))
    return Corpus(sides[0], sides[1], list(packages), tokenizer)
