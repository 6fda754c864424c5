"""The rooms of the package and what each may touch: read from the source, nothing of the package is imported.

The tables are the plan of the house (CONTRIBUTING.md). A new room is a new row; a row that grows is a design question.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).resolve().parents[1] / "hf_efficient_attn"

# Room (the first folder or module below the package; "__init__" is the package's own) -> rooms it may import from.
# Every room may import from itself.
FRAME_AND_MECHANISMS = {"functional", "attention", "encoder"}
LIBRARY = FRAME_AND_MECHANISMS | {"models", "auto"}
PUBLIC = LIBRARY | {
    "__init__",
    "callbacks",
    "checkpoint_files",
    "checkpoints",
    "data",
    "answer_spans",
    "optimization",
    "question_answering",
    "tokenization",
    "pretraining",
    "conversion",
    "hub",
    "loading",
    "extras",
    "modes",
    "onnx",
    "patterns",
    "running",
    "integrations",
}
ROOMS: dict[str, set[str]] = {
    "cpu": set(),
    "cuda": {"cpu"},
    "functional": {"cpu"},
    "attention": {"cpu", "functional"},
    "encoder": {"cpu"},
    "models": FRAME_AND_MECHANISMS,
    "auto": LIBRARY - {"auto"},
    "callbacks": LIBRARY,
    "checkpoint_files": set(),
    "checkpoints": {"checkpoint_files"},
    "data": LIBRARY,
    "answer_spans": set(),
    "optimization": set(),
    "question_answering": {"answer_spans", "modes"},
    "tokenization": set(),
    "pretraining": LIBRARY | {"data"},
    "extras": set(),
    "modes": set(),
    "loading": {"auto"},
    "conversion": LIBRARY | {"loading"},
    "onnx": {"auto", "extras", "loading", "modes"},
    "patterns": {"attention", "auto", "extras", "loading", "modes"},
    "hub": LIBRARY,
    "integrations": LIBRARY | {"modes"},
    "running": set(),
    "__init__": PUBLIC - {"__init__"} | {"cuda"},
    "bench": PUBLIC,
    "demo": PUBLIC | {"bench"},
    "recipes": PUBLIC | {"demo"},
    "cli": PUBLIC | {"bench", "demo"},
    "__main__": {"cli"},
}

# Room -> what it may import from outside besides the standard library; a room without a row may import anything.
OUTSIDE = {"cpu": {"torch"}, "cuda": {"torch", "triton"}, "functional": {"torch"}}

# Room -> modules of the room that its other modules may share. Its other modules and folders (one mechanism, one
# family each) do not know each other.
SHARED_WITHIN: dict[str, set[str]] = {
    "attention": {"base", "cache", "chunks", "lsh_cache", "lsh_index", "prefix", "recurrent_cache"},
    "models": set(),
}

# Modules of those rooms that know all the others: the room's own __init__, and the table of mechanisms.
KNOW_ALL = {"__init__", "named"}

# Programs: they may use `import hf_efficient_attn...` and `from . import name`.
PROGRAMS = {"bench", "demo", "recipes", "cli", "__main__"}
PROGRAM_MODULES = {"__main__", "worker"}

# Rooms that import by statement only, so that everything they import can be seen here.
NO_IMPORT_BY_NAME = FRAME_AND_MECHANISMS | {"models"}
IMPORT_BY_NAME = {"importlib.import_module", "__import__"}

# Seeding a global generator changes the caller's random numbers; a `torch.Generator` of one's own does not.
SEEDING = {
    "torch.manual_seed",
    "torch.seed",
    "torch.random.manual_seed",
    "torch.random.seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "random.seed",
    "numpy.random.seed",
    "transformers.set_seed",
    "transformers.trainer_utils.set_seed",
    "accelerate.utils.set_seed",
}

MAX_LINES = 400  # a module stays under it


def test_package_keeps_the_rules() -> None:
    modules = sorted(PACKAGE.rglob("*.py"))
    assert modules, f"no modules in {PACKAGE}"
    found = [offence for module in modules for offence in offences(PACKAGE, module)]
    assert not found, "\n".join([f"{len(found)} against the rules at the top of {Path(__file__).name}:", *found])


def test_rooms_point_one_way() -> None:
    settled: set[str] = set()
    while ready := {room for room, known in ROOMS.items() if room not in settled and known <= settled}:
        settled |= ready
    assert settled == set(ROOMS), f"rooms that import in a circle, or from no room: {sorted(set(ROOMS) - settled)}"


def offences(package: Path, module: Path) -> Iterator[str]:
    """Yields `file:line: rule` for every rule that `module`, a file in the folder `package`, breaks."""
    where = module.relative_to(package.parent).as_posix()
    text = module.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=where)
    own = module.relative_to(package).with_suffix("").parts
    room = own[0]

    lines = len(text.splitlines())
    if lines >= MAX_LINES:
        yield f"{where}:{lines}: {lines} lines; a module stays under {MAX_LINES}"
    if room not in ROOMS:
        yield f"{where}:1: room {room!r} has no row in ROOMS"
        return

    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for rule in broken_by_import(package, own, node):
                yield f"{where}:{node.lineno}: {rule}"

    names = names_bound_by_imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            used = dotted_name(node, names)
            if used in SEEDING:
                yield f"{where}:{node.lineno}: {used} seeds a global generator; use a torch.Generator"
            if used in IMPORT_BY_NAME and room in NO_IMPORT_BY_NAME:
                yield f"{where}:{node.lineno}: {room} may not import by name ({used}); use an import statement"


def broken_by_import(package: Path, own: tuple[str, ...], node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yields the rules that one import statement in the module `own` (its path below the package) breaks."""
    room = own[0]
    is_program = room in PROGRAMS or own[-1] in PROGRAM_MODULES
    written = f"`{ast.unparse(node)}`"
    names = [alias.name for alias in node.names]
    if names == ["*"]:
        yield f"{written}: name what is imported"
    level = node.level if isinstance(node, ast.ImportFrom) else 0
    if level > len(own):
        yield f"{written}: reaches outside the package"
        return

    if level:
        base = (*own[: len(own) - level], *split(node.module))
        if node.module is None and not is_program:
            yield f"{written}: write `from .module import name`"
        targets = [imported_module(package, base, name) for name in names]
    else:
        modules = names if isinstance(node, ast.Import) else [node.module or ""]
        outside = {split(name)[0] for name in modules} - {package.name}
        allowed = OUTSIDE.get(room)
        for name in sorted(outside - sys.stdlib_module_names - allowed if allowed is not None else ()):
            yield f"{written}: {room} may import {', '.join(sorted(allowed))} and the standard library, not {name}"
        inside = [split(name)[1:] for name in modules if split(name)[0] == package.name]
        if inside and not is_program:
            yield f"{written}: write `from .module import name`, relative to the package"
        targets = inside
        if inside and isinstance(node, ast.ImportFrom):
            targets = [imported_module(package, inside[0], name) for name in names]

    for target in dict.fromkeys(targets):
        theirs = target[0] if target else "__init__"
        if theirs != room and theirs not in ROOMS[room]:
            may = ", ".join(sorted(ROOMS[room])) or "no other room"
            yield f"{written}: {room} may not import from {theirs}, it may from {may}"
        elif theirs == room and room in SHARED_WITHIN and own[1] not in KNOW_ALL:
            neighbour = target[1] if len(target) > 1 else "__init__"
            if neighbour != own[1] and neighbour not in SHARED_WITHIN[room]:
                yield f"{written}: {room}/{own[1]} may not import from {room}/{neighbour}"


def imported_module(package: Path, base: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The module that `from base import name` reaches: the submodule `name` where there is one, else `base` itself."""
    below = package.joinpath(*base, name)
    return (*base, name) if below.is_dir() or below.with_suffix(".py").is_file() else base


def names_bound_by_imports(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> dotted name of what an import statement bound to it."""
    bound = {"__import__": "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {a.asname or split(a.name)[0]: a.name if a.asname else split(a.name)[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return bound


def dotted_name(node: ast.expr, bound: dict[str, str]) -> str | None:
    """`torch.manual_seed` for `t.manual_seed` after `import torch as t`; None for what is not an imported name."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value, bound)
        return f"{owner}.{node.attr}" if owner else None
    return None


def split(name: str | None) -> tuple[str, ...]:
    return tuple(name.split(".")) if name else ()


# Scripts beside the package use its public names only, and the folders named here are open to them.
OPEN_TO_SCRIPTS = {(), ("bench",), ("data",), ("demo",), ("functional",), ("recipes",)}


def test_scripts_use_public_names() -> None:
    scripts = [path for folder in ("benchmarks", "examples") for path in (PACKAGE.parent / folder).glob("*.py")]
    assert len(scripts) >= 3
    found = [f"{path.name}: {rule}" for path in scripts for rule in private_imports(PACKAGE, path.read_text("utf-8"))]
    assert not found, "\n".join(found)


def private_imports(package: Path, text: str) -> Iterator[str]:
    """Yields the import statements of a script that reach past the public names of `package`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules = [split(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = split(node.module)
            modules = [base]
            if base[:1] == (package.name,):
                names = [alias.name for alias in node.names]
                modules = [(package.name, *imported_module(package, base[1:], name)) for name in names]
                modules += [(package.name, name) for name in names if name.startswith("_")]
        else:
            continue
        if any(module[:1] == (package.name,) and module[1:] not in OPEN_TO_SCRIPTS for module in modules):
            yield f"`{ast.unparse(node)}`"


@pytest.mark.parametrize(
    ("text", "is_private"),
    [
        ("from hf_efficient_attn.bench import run_cases", False),
        ("import hf_efficient_attn", False),
        ("from hf_efficient_attn import EffLongformerConfig", False),
        ("from hf_efficient_attn.bench.step import build_step", True),
        ("from hf_efficient_attn.bench import step", True),
        ("from hf_efficient_attn.functional import _blocked", True),
        ("import hf_efficient_attn.encoder", True),
    ],
)
def test_a_private_import_is_found(text: str, is_private: bool) -> None:
    assert bool(list(private_imports(PACKAGE, text))) is is_private


# The rules themselves: a small package that keeps them, and one offence after another.

KEEPS_THE_RULES = {
    "__init__.py": "from .auto import register\nregister()\n",
    "auto.py": "import importlib\nfrom .models.a.modeling_a import A\nregister = importlib.import_module\n",
    "functional/__init__.py": "from .dense import dense\n",
    "functional/dense.py": "import math\nfrom torch.nn import functional as F\ndense = F, math\n",
    "attention/__init__.py": "from .base import Base\nfrom .a import A\nfrom .b import B\n",
    "attention/base.py": "class Base: ...\n",
    "attention/a.py": "from ..functional import dense\nfrom .base import Base\nclass A(Base): ...\n",
    "attention/b.py": "import torch\ng = torch.Generator().manual_seed(0)\nclass B: ...\n",
    "encoder/__init__.py": "import transformers\n",
    "encoder/layer.py": "class Layer: ...\n",
    "models/__init__.py": "",
    "models/a/__init__.py": "",
    "models/a/configuration_a.py": "from ...encoder import Layer\nclass Config: ...\n",
    "models/a/modeling_a.py": "from ...attention.a import A\nfrom .configuration_a import Config\n",
    "models/b/__init__.py": "",
    "demo/__init__.py": "",
    "demo/worker.py": "import hf_efficient_attn\nfrom hf_efficient_attn.bench import timing\n",
    "bench.py": "from . import auto\n",
    "cli.py": "from .demo.worker import run\n",
    "__main__.py": "from .cli import main\n",
}

OFFENCES = [
    ("functional/x.py", "from ..encoder.layer import Layer", "functional may not import from encoder"),
    ("functional/x.py", "import transformers", "not transformers"),
    ("functional/x.py", "from numpy import array", "not numpy"),
    ("functional/x.py", "from .. import register", "functional may not import from __init__"),
    ("attention/x.py", "from ..encoder import Layer", "attention may not import from encoder"),
    ("attention/x.py", "def f():\n    from ..models.a.modeling_a import A", "attention may not import from models"),
    ("attention/x.py", "from .a import A", "attention/x may not import from attention/a"),
    ("attention/x.py", "from . import A", "attention/x may not import from attention/__init__"),
    ("attention/x.py", "import importlib\nm = importlib.import_module('..encoder', __package__)", "by name"),
    ("encoder/x.py", "from ..functional.dense import dense", "encoder may not import from functional"),
    ("encoder/x.py", "from ..attention.base import Base", "encoder may not import from attention"),
    ("models/b/x.py", "from ..a.modeling_a import A", "models/b may not import from models/a"),
    ("models/b/x.py", "from .. import a", "models/b may not import from models/a"),
    ("models/b/x.py", "from ...auto import register", "models may not import from auto"),
    ("auto.py", "from .hub import export", "auto may not import from hub"),
    ("hub.py", "from .cli import main", "hub may not import from cli"),
    ("auto.py", "import hf_efficient_attn.models.a", "relative to the package"),
    ("auto.py", "from hf_efficient_attn.models.a import x", "relative to the package"),
    ("auto.py", "from . import models", "write `from .module import name`"),
    ("auto.py", "from .models.a import *", "name what is imported"),
    ("auto.py", "from ..other import x", "reaches outside the package"),
    ("bench.py", "from hf_efficient_attn import cli", "bench may not import from cli"),
    ("data.py", "import torch\ntorch.manual_seed(0)", "torch.manual_seed seeds"),
    ("data.py", "from torch import manual_seed as fix\nfix(0)", "torch.manual_seed seeds"),
    ("demo/x.py", "import random\nrandom.seed(0)", "random.seed seeds"),
    ("demo/x.py", "import numpy as np\nnp.random.seed(0)", "numpy.random.seed seeds"),
    ("cli.py", "\n" * 399, "400 lines"),
    ("cellar.py", "", "no row in ROOMS"),
]


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    package = tmp_path / PACKAGE.name
    for name, text in KEEPS_THE_RULES.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


def test_small_package_keeps_the_rules(small_package: Path) -> None:
    assert not [offence for module in small_package.rglob("*.py") for offence in offences(small_package, module)]


@pytest.mark.parametrize(("module", "text", "rule"), OFFENCES, ids=[rule for _, _, rule in OFFENCES])
def test_an_offence_is_found(small_package: Path, module: str, text: str, rule: str) -> None:
    (small_package / module).write_text(f"{text}\n", encoding="utf-8")
    found = list(offences(small_package, small_package / module))
    line = len(text.splitlines()) if text.strip() else 400 if text else 1
    assert any(f"{PACKAGE.name}/{module}:{line}: " in offence and rule in offence for offence in found), found
