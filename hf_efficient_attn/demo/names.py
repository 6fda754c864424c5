"""Long documents to label token by token: Python's own source files, and what each name in them refers to."""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import tokenize
from collections.abc import Iterator
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Sequence, Value

from .corpus import SourceFile, read_packages, split_by_file


# What a name refers to; "other" is everything that is no name.
ROLES = (
    "other", "attribute", "builtin", "class", "function", "global", "imported", "keyword", "local", "parameter",
)  # fmt: skip
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONGEST_STRING = 40
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}


def names_corpus(
    *,
    num_packages: int = 10,
    max_tokens: int = 4000,
    max_per_package: int | None = None,
    eval_fraction: float = 0.25,
    seed: int = 0,
    stdlib: str | Path | None = None,
) -> tuple[Dataset, Dataset]:
    """Source files of the standard library as lists of tokens, each with its role, split by file.

    The roles are `ROLES`: whether a name is an attribute, a parameter of a function around it, a local variable, a
    global one, something imported, a function, a class, a builtin, or the name of a keyword argument. Python's own
    rules of scope decide, so often a line far above does. Comments are left out, and long strings cut to their quotes.

    Args:
        num_packages: the packages with the most text.
        max_tokens: longer files are cut there.
        max_per_package: at most so many files of each package and side; None keeps all.
        eval_fraction: the held-out share of each package's text.
        seed: of the split.
        stdlib: the folder to read; by default this Python's own standard library.

    Returns:
        Training and held-out side with the columns `tokens` (strings; a new line is one with the next line's
        indentation), `tags` (`ClassLabel` ids) and `file`.

    Raises:
        ValueError: an argument breaks a rule, or the standard library is not there as source files.
    """
    features = Features(
        {"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=list(ROLES))), "file": Value("string")}
    )
    sides = []
    for files in split_by_file(read_packages(num_packages, stdlib), eval_fraction, seed):
        rows = []
        taken: dict[str, int] = {}
        for file in files:
            if max_per_package is None or taken.get(file.package, 0) < max_per_package:
                taken[file.package] = taken.get(file.package, 0) + 1
                rows += _rows(file, max_tokens)
        columns = {name: [row[name] for row in rows] for name in features}
        sides.append(Dataset.from_dict(columns, features=features))
    return sides[0], sides[1]


def _rows(file: SourceFile, max_tokens: int) -> Iterator[dict]:
    try:
        pairs = list(label_names(file.text))[:max_tokens]
    except (SyntaxError, tokenize.TokenError):  # a template, or the library of a newer Python
        return
    if pairs:
        tokens, roles = zip(*pairs, strict=True)
        yield {"tokens": list(tokens), "tags": [ROLES.index(role) for role in roles], "file": file.path}


def label_names(source: str) -> Iterator[tuple[str, str]]:
    """The tokens of a Python source and their roles, see `names_corpus`.

    Raises:
        SyntaxError: the source is no Python.
    """
    roles = _Roles(source)
    before, in_import, new_line = "", False, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SKIPPED:
            continue
        if token.type == tokenize.NEWLINE:
            new_line, in_import, before = True, False, ""
            continue
        if new_line:
            yield "\n" + " " * token.start[1], "other"
            new_line = False
        text = token.string
        if token.type == tokenize.STRING and len(text) > LONGEST_STRING:
            text = text[0] + text[-1] if text[0] in "'\"" else text[:1] + text[-1] * 2
        if before in ("", ";", ":"):
            in_import = text in ("import", "from")
        role = "other"
        if token.type == tokenize.NAME and not keyword.iskeyword(text):
            if in_import:
                role = "imported"
            elif before == ".":
                role = "attribute"
            elif before in ("def", "class"):
                role = {"def": "function", "class": "class"}[before]
            else:
                role = roles.at.get(token.start) or roles.on_line.get((token.start[0], text), "other")
        yield text, role
        before = text


class _Roles(ast.NodeVisitor):
    """`at`: place of a name -> its role; `on_line`: for names whose place the tree does not tell, line and name."""

    def __init__(self, source: str) -> None:
        self.at: dict[tuple[int, int], str] = {}
        self.on_line: dict[tuple[int, str], str] = {}
        self._lines = source.splitlines()
        tree = ast.parse(source)
        # From the outermost scope to the innermost: the node, and its names' roles.
        self._scopes = [(tree, _bound(tree))]
        self.generic_visit(tree)

    def _put(self, node: ast.AST, role: str) -> None:
        line, column = node.lineno, node.col_offset
        text = self._lines[line - 1] if line <= len(self._lines) else ""
        if not text.isascii():  # the tree counts bytes
            column = len(text.encode()[:column].decode(errors="ignore"))
        self.at[line, column] = role

    def _role(self, name: str) -> str:
        innermost = self._scopes[-1][0]
        for node, bound in reversed(self._scopes):
            # The body of a class is no scope for the functions in it.
            if name in bound and (node is innermost or not isinstance(node, ast.ClassDef)):
                return bound[name]
        return "builtin" if hasattr(builtins, name) else "global"

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            self._put(node, self._role(node.id))
        elif isinstance(node, ast.arg):
            self._put(node, "parameter")
        elif isinstance(node, ast.keyword) and node.arg is not None:
            self._put(node, "keyword")
        elif isinstance(node, ast.ExceptHandler) and node.name is not None:
            last = node.type or node
            self.on_line[last.end_lineno, node.name] = self._role(node.name)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            self.on_line |= {(node.lineno, name): self._role(name) for name in node.names}
        if isinstance(node, (*SCOPES, *COMPREHENSIONS)):
            self._visit_scope(node)
        else:
            self.generic_visit(node)

    def _visit_scope(self, node: ast.AST) -> None:
        # Decorators, defaults, annotations and base classes belong to the scope around.
        outside = [*getattr(node, "decorator_list", ()), *getattr(node, "bases", ()), *getattr(node, "keywords", ())]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            outside += [node.args] + ([node.returns] if getattr(node, "returns", None) else [])
        for child in outside:
            self.visit(child)
        self._scopes.append((node, _bound(node)))
        for child in ast.iter_child_nodes(node):
            if child not in outside:
                self.visit(child)
        self._scopes.pop()


def _bound(scope: ast.AST) -> dict[str, str]:
    """The names that a scope binds, and what to."""
    variable = {ast.Module: "global", ast.ClassDef: "attribute"}.get(type(scope), "local")
    bound: dict[str, str] = {}
    elsewhere: set[str] = set()
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        arguments = scope.args
        some = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
        bound |= {argument.arg: "parameter" for argument in some if argument is not None}

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                bound.setdefault(child.name, "function")
            elif isinstance(child, ast.ClassDef):
                bound.setdefault(child.name, "class")
            elif isinstance(child, ast.Import | ast.ImportFrom):
                for alias in child.names:
                    bound.setdefault(alias.asname or alias.name.split(".")[0], "imported")
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store | ast.Del):
                bound.setdefault(child.id, variable)
            elif isinstance(child, ast.ExceptHandler) and child.name is not None:
                bound.setdefault(child.name, variable)
            elif isinstance(child, ast.Global | ast.Nonlocal):
                elsewhere.update(child.names)
            if not isinstance(child, (*SCOPES, *COMPREHENSIONS)):
                walk(child)

    walk(scope)
    return {name: role for name, role in bound.items() if name not in elsewhere}


__all__ = ["ROLES", "label_names", "names_corpus"]
