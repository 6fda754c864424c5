"""The package's modules as data: what each statement binds and uses, and where an imported name comes from."""

import ast
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


Place = tuple[tuple[str, ...], str]
"""A module below the package, and a name that it binds."""


class FlatteningError(ValueError):
    """Source that cannot be carried in one file; the message names the file, the line and the way out."""


@dataclass(frozen=True)
class Outside:
    """An import from outside the package: `import module [as name]`, or `from module import member [as name]`."""

    name: str
    module: str
    member: str | None = None
    for_types: bool = False
    """It stands under `if TYPE_CHECKING`."""

    @property
    def target(self) -> str:
        """What `name` stands for, as a dotted name."""
        if self.member is not None:
            return f"{self.module}.{self.member}"
        return self.module if self.name == self.module.rpartition(".")[2] else self.module.partition(".")[0]


@dataclass
class Statement:
    """A definition at the top level of a module: a function, a class or an assignment.

    Args:
        node: its syntax tree.
        source: its text.
        first, last: its lines, from 1, with decorators, the comment above it and the string below it.
    """

    node: ast.stmt
    source: str
    first: int
    last: int

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What it binds."""
        return tuple(_bound(self.node))

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of its syntax tree."""
        return list(ast.walk(self.node))

    @cached_property
    def tables(self) -> list[symtable.SymbolTable]:
        """The scopes in it, the outer one first."""
        found = [symtable.symtable(self.source, "<statement>", "exec")]
        for table in found:
            found.extend(table.get_children())
        return found

    @cached_property
    def uses(self) -> frozenset[str]:
        """Names of the module that it reads or writes."""
        outer, *inner = self.tables
        used = {symbol.get_name() for symbol in outer.get_symbols() if symbol.is_referenced()}
        return frozenset(used.union(*({x.get_name() for x in table.get_symbols() if x.is_global()} for table in inner)))

    @cached_property
    def quoted(self) -> frozenset[str]:
        """Names that stand in annotations written as strings."""
        return frozenset(name for text in _quoted_annotations(self.nodes) for name in _names_in(text))

    @cached_property
    def later(self) -> frozenset[str]:
        """Names that it imports from the package only when it is called."""
        return frozenset(alias.name for node in self.lazy_imports for alias in node.names)

    @cached_property
    def lazy_imports(self) -> list[ast.ImportFrom]:
        """Imports of the package inside its functions."""
        return [node for node in self.nodes if isinstance(node, ast.ImportFrom) and node.level]


@dataclass
class Module:
    """One module of the package.

    Args:
        path: its place below the package, such as `("functional", "window")`.
        file: its source file.
        is_package: it is an `__init__.py`.
    """

    path: tuple[str, ...]
    file: Path
    is_package: bool
    lines: list[str] = field(default_factory=list)
    docstring: str = ""
    statements: dict[str, Statement] = field(default_factory=dict)
    """Bound name -> statement."""
    imported: dict[str, Place] = field(default_factory=dict)
    outside: dict[str, Outside] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The file's name below the package."""
        return "/".join((*self.path, "__init__") if self.is_package else self.path) + ".py"

    def wrong(self, node: ast.AST, message: str) -> FlatteningError:
        """An error at `node`."""
        return FlatteningError(f"{self.shown}:{node.lineno}: `{ast.unparse(node).splitlines()[0]}`: {message}")

    def base(self, node: ast.ImportFrom) -> tuple[str, ...]:
        """The module that a relative import names."""
        up = node.level - 1 if self.is_package else node.level
        return (*self.path[: len(self.path) - up], *(node.module.split(".") if node.module else ()))


class Package:
    """Modules of a package, read on demand.

    Args:
        folder: the package's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._modules: dict[tuple[str, ...], Module] = {}

    def module(self, path: tuple[str, ...]) -> Module:
        """The module at `path` below the package; raises `FlatteningError` for one that holds what cannot be moved."""
        if path not in self._modules:
            self._modules[path] = self._read(path)
        return self._modules[path]

    def resolve(self, path: tuple[str, ...], name: str) -> Place | Outside | None:
        """Where `name` in the module at `path` is defined, through any number of imports; None if nowhere."""
        module = self.module(path)
        if name in module.statements:
            return path, name
        if name in module.outside:
            return module.outside[name]
        if name in module.imported:
            return self.resolve(*module.imported[name])
        if self.folder.joinpath(*path, name).with_suffix(".py").is_file():
            raise FlatteningError(
                f"{module.shown} has {name!r} as a module, which another one imports as a name; write "
                f"`from .{name} import ...`."
            )
        return None

    def _read(self, path: tuple[str, ...]) -> Module:
        file = self.folder.joinpath(*path).with_suffix(".py")
        is_package = not file.is_file()
        file = self.folder.joinpath(*path, "__init__.py") if is_package else file
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        module = Module(path, file, is_package, text.splitlines(), ast.get_docstring(tree) or "")
        end, last = 0, None
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._add_import(module, node)
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse:
                for inner in node.body:
                    self._add_import(module, inner, for_types=True)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                if last is not None:  # a string that documents the assignment above it
                    last.last = node.end_lineno
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign):
                first = _first_line(module.lines, node, end)
                source = "\n".join(module.lines[first - 1 : node.end_lineno])
                last = Statement(node, source, first, node.end_lineno)
                for name in last.names:
                    if name in module.statements:
                        raise module.wrong(node, f"{name!r} is bound twice at the top of the module; bind it once.")
                    module.statements[name] = last
                for inner in last.lazy_imports:
                    self._add_import(module, inner)
            else:
                raise module.wrong(
                    node, "a module that is carried with a checkpoint holds definitions and imports alone at its top."
                )
            if not isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
                last = None
            end = node.end_lineno
        module.statements.pop("__all__", None)
        return module

    def _add_import(self, module: Module, node: ast.stmt, for_types: bool = False) -> None:
        """Notes what an import statement binds."""
        inside = isinstance(node, ast.ImportFrom) and node.level > 0
        if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "module", None) == "__future__":
            raise module.wrong(node, "only plain imports can be carried with a checkpoint.")
        for alias in node.names:
            name = alias.asname or alias.name
            if alias.name == "*":
                raise module.wrong(node, "name what is imported.")
            if isinstance(node, ast.Import):
                bound = alias.asname or alias.name.partition(".")[0]
                module.outside[bound] = Outside(bound, alias.name, None, for_types)
            elif not inside:
                module.outside[name] = Outside(name, node.module, alias.name, for_types)
            else:
                base = module.base(node)
                if alias.asname is not None:
                    raise module.wrong(node, "write `from .module import name` without `as`.")
                if module.imported.setdefault(name, (base, alias.name)) != (base, alias.name):
                    raise module.wrong(node, f"{name!r} comes from two modules; give one another name.")


def _bound(node: ast.stmt) -> Iterator[str]:
    """Names that a definition binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
        return
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        yield from (inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name))


def _first_line(lines: list[str], node: ast.stmt, end: int) -> int:
    """The first line of a statement, with its decorators and the comment that touches it from above."""
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", ()))])
    while first - 1 > end and lines[first - 2].startswith("#"):
        first -= 1
    return first


def _quoted_annotations(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The strings in annotations."""
    for inner in nodes:
        for hint in (getattr(inner, "annotation", None), getattr(inner, "returns", None)):
            for part in ast.walk(hint) if isinstance(hint, ast.AST) else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def _names_in(annotation: str) -> Iterable[str]:
    """Names in an annotation; none in a string that is no expression."""
    try:
        tree = ast.parse(annotation, mode="eval")
    except SyntaxError:
        return ()
    return (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
