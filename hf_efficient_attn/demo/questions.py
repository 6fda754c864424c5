"""Long contexts with questions that a part of them answers: Python's own source files, asked about what they define."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from .corpus import SourceFile, read_packages, split_by_file


LONGEST_ANSWER = 60  # characters


def questions_corpus(
    *,
    num_packages: int = 10,
    max_characters: int = 1200,
    per_context: int = 6,
    eval_fraction: float = 0.25,
    seed: int = 0,
    stdlib: str | Path | None = None,
) -> tuple[Dataset, Dataset]:
    """Pieces of the standard library's source files, and questions about the functions and classes in them.

    "What does NAME return?", "... raise?", "... do?" (the first line of its docstring), "What is NAME derived from?",
    "What is the default of PARAMETER in NAME?": the answer stands somewhere in the piece, once for each NAME.

    Args:
        num_packages: the packages with the most text.
        max_characters: of a context, at most; it ends between two definitions.
        per_context: questions about a context, at most, drawn with `seed`.
        eval_fraction: the held-out share of each package's text.
        seed: of the split and the questions.
        stdlib: the folder to read; by default this Python's own standard library.

    Returns:
        Training and held-out side, split by file, with the columns `question`, `context`, `answers` (`text` and
        `answer_start`, lists as in SQuAD) and `file`.

    Raises:
        ValueError: an argument breaks a rule, or the standard library is not there as source files.
    """
    sides = []
    for files in split_by_file(read_packages(num_packages, stdlib), eval_fraction, seed):
        sides.append(
            Dataset.from_list([row for file in files for row in _rows(file, max_characters, per_context, seed)])
        )
    return sides[0], sides[1]


def _rows(file: SourceFile, max_characters: int, per_context: int, seed: int) -> Iterator[dict]:
    try:
        tree = ast.parse(file.text)
    except SyntaxError:  # a template, or the library of a newer Python
        return
    lines = _Lines(file.text)
    asked = sorted(_asked(tree, lines))
    draw = random.Random(f"{seed}-{file.path}")
    for start, end in _pieces(tree, lines, max_characters):
        context = file.text[start:end]
        inside = [row for row in asked if start <= row[0] and row[1] <= end]
        # A question with two answers, as two classes may have a method of one name, is none.
        times = Counter(question for _, _, question, _, _ in inside)
        inside = [row for row in inside if times[row[2]] == 1]
        for _, _, question, first, last in draw.sample(inside, min(per_context, len(inside))):
            answers = {"text": [file.text[first:last]], "answer_start": [first - start]}
            yield {"question": question, "context": context, "answers": answers, "file": file.path}


class _Lines:
    """Places of a syntax tree (lines, and bytes in them) as places in the text."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def place(self, line: int, column: int) -> int:
        text = self.lines[line - 1]
        return self.starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode()))

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)


def _asked(tree: ast.AST, lines: _Lines) -> Iterator[tuple[int, int, str, int, int]]:
    """Where a definition begins and ends, a question about it, and where the answer begins and ends."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for question, answer in _questions(node):
            first, last = lines.span(answer)
            if isinstance(answer, ast.Constant) and question.endswith("do?"):
                first, last = _first_line(lines, first, last)
            if 0 < last - first <= LONGEST_ANSWER:
                yield (*lines.span(node), question, first, last)


def _questions(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    name = node.name
    if ast.get_docstring(node):
        yield f"What does {name} do?", node.body[0].value
    if isinstance(node, ast.ClassDef):
        if len(node.bases) == 1:
            yield f"What is {name} derived from?", node.bases[0]
        return
    own = list(_own_statements(node))
    returned = [child.value for child in own if isinstance(child, ast.Return) and child.value is not None]
    raised = [child.exc for child in own if isinstance(child, ast.Raise) and child.exc is not None]
    if len(returned) == 1:
        yield f"What does {name} return?", returned[0]
    if len(raised) == 1:
        yield f"What does {name} raise?", raised[0].func if isinstance(raised[0], ast.Call) else raised[0]
    arguments = [*node.args.posonlyargs, *node.args.args]
    for argument, default in zip(reversed(arguments), reversed(node.args.defaults), strict=False):
        yield f"What is the default of {argument.arg} in {name}?", default


def _own_statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield child
            yield from _own_statements(child)


def _first_line(lines: _Lines, first: int, last: int) -> tuple[int, int]:
    """The first line with text of a docstring, its quotes left out."""
    whole = "".join(lines.lines)[first:last]
    opening = re.match(r"""[rRuU]*("{3}|'{3}|"|')""", whole).end()
    text = whole[opening:].rstrip("\"'")
    blank = len(text) - len(text.lstrip())
    line = text[blank:].split("\n")[0].rstrip()
    return first + opening + blank, first + opening + blank + len(line)


def _pieces(tree: ast.Module, lines: _Lines, max_characters: int) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of pieces of the text that begin and end at definitions' borders, where those are small."""
    borders = sorted({lines.span(node)[0] for node in _blocks(tree)} | {lines.starts[-1]})
    start = last = borders[0]
    for border in borders[1:]:
        if border - start > max_characters and last > start:
            if last - start <= max_characters:
                yield start, last
            start = last
        last = border
    if start < last <= start + max_characters:
        yield start, last


def _blocks(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements of a module and, in their place, those of its classes."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.ClassDef):
            yield from _blocks(node)
