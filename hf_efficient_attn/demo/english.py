"""English prose that every Python ships with: the documentation's topics and the standard library's docstrings."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from .corpus import TEST_FOLDERS, SourceFile, library_folder, read_files, split_by_file, to_dataset


# What pip installed is not Python's; `lib2to3` and `encodings` are tables, and `pydoc_data` are the topics themselves.
SKIPPED = TEST_FOLDERS | {"site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}
TOPICS = "pydoc_data/topics.py"
KINDS = ("docstrings", "topics")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class EnglishCorpus:
    """Documents on two sides that share no paragraph.

    Args:
        train: columns `text`, `label` (a `ClassLabel`: `"docstrings"` or `"topics"`) and `file` (`"json/decoder.py"`,
            `"topics/assert"`), one row a module or topic.
        eval: the held-out side, from other modules and topics.
    """

    train: Dataset
    eval: Dataset

    @property
    def statistics(self) -> dict[str, dict[str, int]]:
        """`{"train": {"documents": ..., "characters": ...}, "eval": ...}`."""
        return {
            name: {"documents": len(side), "characters": sum(map(len, side["text"]))}
            for name, side in (("train", self.train), ("eval", self.eval))
        }


def english_corpus(
    *, eval_fraction: float = 0.1, min_characters: int = 100, seed: int = 0, stdlib: str | Path | None = None
) -> EnglishCorpus:
    """The English in Python's standard library, to pretrain on; read in seconds, without a download.

    A document is one topic of `pydoc_data.topics` (chapters of the language reference), or the long docstrings of one
    module. Source files are parsed, never imported. A paragraph that comes several times (topics contain each other,
    docstrings are copied) stays in the longest of its documents only, and examples of Python sessions are left out.

    Args:
        eval_fraction: the held-out share of the text, of docstrings as of topics.
        min_characters: shorter docstrings and documents are left out.
        seed: of the split.
        stdlib: the folder to read; by default this Python's own standard library.

    Raises:
        ValueError: `eval_fraction` is not between 0 and 1, or the folder holds no such text.
    """
    root = library_folder(stdlib)
    with _no_garbage_collection():
        documents = _without_repeats([*_read_docstrings(root, min_characters), *_read_topics(root)], min_characters)
    if not documents:
        raise ValueError(
            f"{root} holds no docstring and no topic of {min_characters} characters or more: use a Python whose "
            "standard library lies there as .py files (not inside a zip), or pass a smaller min_characters."
        )
    kinds = {kind: [document for document in documents if document.package == kind] for kind in KINDS}
    sides = split_by_file({kind: files for kind, files in kinds.items() if files}, eval_fraction, seed)
    train, held_out = (
        to_dataset([{"text": file.text, "label": file.package, "file": file.path} for file in side], KINDS)
        for side in sides
    )
    return EnglishCorpus(train, held_out)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of objects without cycles: looking for garbage among them takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_topics(root: Path) -> list[SourceFile]:
    path = root / TOPICS
    if not path.is_file():  # some distributions leave the documentation out
        return []
    tables = [node.value for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.Assign)]
    topics = {name: text for table in tables for name, text in ast.literal_eval(table).items()}
    return [SourceFile("topics", f"topics/{name}", topics[name]) for name in sorted(topics)]


def _read_docstrings(root: Path, min_characters: int) -> Iterator[SourceFile]:
    """One document a module: its docstrings of `min_characters` or more, in their order."""
    for file in read_files(root, skipped=SKIPPED):
        try:
            tree = ast.parse(file.text)
        except SyntaxError:  # the library of a newer Python, or a template
            continue
        docstrings = [ast.get_docstring(node) or "" for node in _definitions(tree)]
        if long := [docstring for docstring in docstrings if len(docstring) >= min_characters]:
            yield SourceFile("docstrings", file.path, "\n\n".join(long))


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The node and what is defined in it, in order; statements only, as `ast.walk` spends its time on expressions."""
    if isinstance(node, DOCUMENTED):
        yield node
    for branch in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, branch, ()):
            yield from _definitions(child)


def _without_repeats(documents: Iterable[SourceFile], min_characters: int) -> list[SourceFile]:
    """Documents of paragraphs that none of the longer documents has, the longest document first."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda document: (-len(document.text), document.path)):
        paragraphs = []
        for paragraph in re.split(r"\n(?:[ \t]*\n)+", document.text.strip("\n")):
            key = " ".join(paragraph.lower().split())
            if key not in seen and ">>>" not in paragraph:
                paragraphs.append(paragraph.rstrip())
            seen.add(key)
        text = "\n\n".join(paragraphs)
        if len(text) >= min_characters:
            kept.append(SourceFile(document.package, document.path, text))
    return kept
