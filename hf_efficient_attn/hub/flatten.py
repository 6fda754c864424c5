"""Some definitions of a package and all that they need, as the source of one module.

Nothing is rewritten but what has to be: imports from the package go, those from outside stand at the top, and a private
name that two modules have gets its module's name at the end. What the definitions do not reach is left out.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from .source import FlatteningError, Module, Outside, Package, Place, Statement


# What transformers takes for an import of another file of a folder, also in a comment or a docstring.
_LOOKS_RELATIVE = re.compile(r"^\s*(import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)

_WIDTH = 120


def flatten(folder: Path, roots: Iterable[Place]) -> str:
    """The source of one module with the definitions `roots` and everything of the package that they use.

    Args:
        folder: the package's folder.
        roots: definitions to carry, as (path of the module below the package, name).

    Returns:
        Imports from outside the package, then the definitions, module by module, each after what it needs at once.
        Equal sources give equal text.

    Raises:
        FlatteningError: source that does not fit into one module: two public definitions of one name, modules that need
            each other at import, statements at the top of a module that are neither imports nor definitions, ...
    """
    roots = list(roots)
    collected = _Collected(Package(folder), roots)
    collected.name_apart({name for _, name in roots})
    sections = [collected.section(path) for path in collected.in_order()]
    text = "\n\n\n".join([collected.imports(), *sections]) + "\n"
    _check(text)
    return text


class _Collected:
    """What the roots reach."""

    def __init__(self, package: Package, roots: list[Place]) -> None:
        self.package = package
        self.needed: dict[tuple[str, ...], dict[str, Statement]] = defaultdict(dict)
        self.outside: dict[str, Outside] = {}
        self.only_quoted: dict[str, Outside] = {}
        self.new_names: dict[Place, str] = {}
        todo, self.done = list(roots), set()
        while todo:
            place = todo.pop()
            if place not in self.done:
                self.done.add(place)
                todo.extend(self._add(place))

    def _add(self, place: Place) -> list[Place]:
        """Takes one definition and says what it uses."""
        found = self.package.resolve(*place)
        if found != place:
            raise FlatteningError(f"{'.'.join(place[0])} does not define {place[1]!r}.")
        module = self.package.module(place[0])
        statement = module.statements[place[1]]
        self.needed[place[0]][place[1]] = statement
        places = [(place[0], name) for name in statement.names]
        for name in sorted(statement.uses | statement.later):
            target = self.package.resolve(module.path, name)
            if isinstance(target, Outside):
                self._add_outside(self.outside, module, target)
            elif target is not None:
                if target[1] != name:
                    raise module.wrong(statement.node, f"{name!r} is defined as {target[1]!r}; give both one name.")
                places.append(target)
        for name in sorted(statement.quoted):
            target = self.package.resolve(module.path, name)
            if isinstance(target, Outside):
                self._add_outside(self.only_quoted, module, target)
        return places

    @staticmethod
    def _add_outside(known: dict[str, Outside], module: Module, found: Outside) -> None:
        other = known.setdefault(found.name, found)
        if other.target != found.target:
            raise FlatteningError(
                f"{module.shown} imports {found.target} as {found.name!r}, which stands for {other.target} in another "
                "module; give one of them another name."
            )

    def name_apart(self, kept: set[str]) -> None:
        """Gives private names that several modules bind their module's name; `kept` must not be such."""
        owners: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for path in sorted(self.needed):
            for name, statement in sorted(self.needed[path].items()):
                first = next(iter(owners[name]), None)
                # The same line twice, such as a logger, is one.
                if first is None or not self._same(self.needed[first][name], statement):
                    owners[name].append(path)
                else:
                    del self.needed[path][name]
        taken = {*owners, *self.outside, *self.only_quoted}
        for name, paths in sorted(owners.items()):
            if name in self.outside or name in self.only_quoted:
                raise FlatteningError(
                    f"{self.package.module(paths[0]).shown} defines {name!r}, which another module imports from "
                    "outside the package; rename it."
                )
            if len(paths) == 1:
                continue
            if name in kept or not name.startswith("_"):
                files = " and ".join(self.package.module(path).shown for path in paths)
                raise FlatteningError(f"{files} both define {name!r}; rename one, or make both private.")
            for path in paths:
                new = f"{name}_{path[-1]}"
                if new in taken:
                    raise FlatteningError(f"{name!r} of {'.'.join(path)} cannot become {new!r}, which exists already.")
                taken.add(new)
                self.new_names[path, name] = new

    @staticmethod
    def _same(one: Statement, other: Statement) -> bool:
        is_plain = isinstance(one.node, ast.Assign) and isinstance(other.node, ast.Assign)
        return is_plain and ast.dump(one.node) == ast.dump(other.node) and "__name__" in one.uses

    def in_order(self) -> list[tuple[str, ...]]:
        """The modules, each after those it needs when it is imported; raises `FlatteningError` for a circle."""
        order: list[tuple[str, ...]] = []
        open_: list[tuple[str, ...]] = []

        def visit(path: tuple[str, ...]) -> None:
            if path in open_:
                circle = " -> ".join(self.package.module(x).shown for x in (*open_[open_.index(path) :], path))
                raise FlatteningError(f"these modules need each other at import: {circle}.")
            if path in order:
                return
            open_.append(path)
            for statement in self._statements(path):
                for name in sorted(statement.uses):
                    target = self.package.resolve(path, name)
                    if isinstance(target, tuple) and target[0] != path:
                        visit(target[0])
            open_.pop()
            order.append(path)

        for path in sorted(self.needed):
            visit(path)
        return [path for path in order if self.needed[path]]

    def _statements(self, path: tuple[str, ...]) -> list[Statement]:
        """The needed statements of a module in their order, each once."""
        return sorted({id(x): x for x in self.needed[path].values()}.values(), key=lambda x: x.first)

    def imports(self) -> str:
        """The import statements of what is used from outside the package."""
        plain = _import_lines(self.outside.values())
        quoted = _import_lines(x for name, x in self.only_quoted.items() if name not in self.outside)
        if not quoted:
            return "\n".join(plain)
        if "TYPE_CHECKING" not in self.outside:
            plain = _import_lines([*self.outside.values(), Outside("TYPE_CHECKING", "typing", "TYPE_CHECKING")])
        return "\n".join(
            [*plain, "", "", "if TYPE_CHECKING:", *("    " + x for line in quoted for x in line.split("\n"))]
        )

    def section(self, path: tuple[str, ...]) -> str:
        """The needed part of a module, under a line that names it."""
        module = self.package.module(path)
        head = f"# {'-' * (_WIDTH - 3 - len(module.shown))} {module.shown}"
        notes = [f"# {line}".rstrip() for line in module.docstring.splitlines()]
        return "\n\n\n".join(["\n".join([head, *notes]), *(self._text(module, x) for x in self._statements(path))])

    def _text(self, module: Module, statement: Statement) -> str:
        """A statement's source with its imports of the package cut and its names replaced."""
        lines = {n: module.lines[n - 1].encode() for n in range(statement.first, statement.last + 1)}
        edits: list[tuple[int, int, int, str]] = []  # line, columns in bytes, new text
        names = statement.uses | statement.later | set(statement.names)
        targets = {name: self.package.resolve(module.path, name) for name in sorted(names)}
        renamed = {x: self.new_names[target] for x, target in targets.items() if target in self.new_names}
        self._check_renaming(module, statement, renamed)
        for node in statement.nodes if renamed else ():
            if isinstance(node, ast.Name) and node.id in renamed:
                edits.append((node.lineno, node.col_offset, node.end_col_offset, renamed[node.id]))
        if isinstance(statement.node, ast.FunctionDef | ast.ClassDef) and statement.node.name in renamed:
            keyword = "def " if isinstance(statement.node, ast.FunctionDef) else "class "
            start = statement.node.col_offset + len(keyword)
            edits.append((statement.node.lineno, start, start + len(statement.node.name), renamed[statement.node.name]))
        for line, start, end, new in sorted(edits, reverse=True):
            lines[line] = lines[line][:start] + new.encode() + lines[line][end:]
        cut = {line for node in statement.lazy_imports for line in range(node.lineno, node.end_lineno + 1)}
        return "\n".join(text.decode() for line, text in lines.items() if line not in cut)

    def _check_renaming(self, module: Module, statement: Statement, renamed: dict[str, str]) -> None:
        """Raises `FlatteningError` where a name cannot be replaced by looking at the source alone."""
        for name in sorted(renamed):
            if name in statement.quoted:
                raise module.wrong(
                    statement.node, f"{name!r} stands in a quoted annotation; other modules have one too."
                )
            for table in statement.tables[1:]:
                symbol = table.lookup(name) if name in table.get_identifiers() else None
                # A method of that name is out of sight of what stands in other functions.
                is_method = symbol is not None and table.get_type() == "class" and not symbol.is_referenced()
                if symbol is not None and symbol.is_local() and not is_method and name not in statement.later:
                    raise module.wrong(statement.node, f"a local {name!r} hides the module's; rename the local one.")
            for node in statement.nodes:
                in_global = isinstance(node, ast.Global) and name in node.names
                parts = ast.walk(node) if isinstance(node, ast.JoinedStr) else ()
                # Before Python 3.12 the places of names in them are wrong.
                if in_global or any(isinstance(x, ast.Name) and x.id == name for x in parts):
                    raise module.wrong(
                        node, f"{name!r} is a name of several modules and stands in an f-string or `global`; rename it."
                    )


def _import_lines(found: Iterable[Outside]) -> list[str]:
    """Import statements in the usual order: standard library, others; each module once."""
    members: dict[str, list[str]] = defaultdict(list)
    modules: list[tuple[bool, str, str]] = []
    for item in found:
        if item.member is None:
            alias = "" if item.name in (item.module, item.module.partition(".")[0]) else f" as {item.name}"
            modules.append((_is_foreign(item.module), item.module, f"import {item.module}{alias}"))
        else:
            alias = "" if item.name == item.member else f" as {item.name}"
            members[item.module].append(item.member + alias)
    for module, names in members.items():
        modules.append((_is_foreign(module), module, _from_line(module, sorted(names, key=_as_isort))))
    # `import x` before `from x import y`, the standard library first.
    modules.sort(key=lambda row: (row[0], row[2].startswith("from"), row[1], row[2]))
    lines = [line for foreign, _, line in modules if not foreign]
    return [
        *lines,
        *([""] if lines and len(lines) < len(modules) else []),
        *(x for foreign, _, x in modules if foreign),
    ]


def _from_line(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    return (
        line if len(line) <= _WIDTH - 4 else "\n".join([f"from {module} import (", *(f"    {x}," for x in names), ")"])
    )


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] not in sys.stdlib_module_names


def _as_isort(name: str) -> tuple[int, str]:
    """Constants, classes, then the rest."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


def _check(text: str) -> None:
    """Raises `FlatteningError` for a result that cannot work."""
    compile(text, "<flat module>", "exec")
    if found := _LOOKS_RELATIVE.search(text):
        raise FlatteningError(f"transformers would take {found[0].strip()!r} for an import; say it in other words.")
