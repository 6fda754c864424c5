"""Putting modules together into one: what is kept, what is renamed, and what is refused with the way out."""

import ast
import builtins
import re
import symtable
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_efficient_attn import FAMILIES
from hf_efficient_attn.hub.code_file import class_names, code_of
from hf_efficient_attn.hub.flatten import flatten
from hf_efficient_attn.hub.source import FlatteningError


# Two formulas with private helpers of one name, a re-export, a lazy import, a type that only an annotation names.
ONE = '''"""The first formula."""

import math
from torch import Tensor, nn


_PARTS = 4


# Of one.
def _part(x):
    return math.sqrt(x) + _PARTS


def first(x, _parts=()):
    return [_part(y) for y in x]


def not_needed():
    return nn
'''

TWO = '''"""The second formula."""

from collections.abc import Callable

import torch


_PARTS: int = 5
"""What it is split into."""


def _part(x: "Callable[[int], int]") -> int:
    return x * _PARTS


class second:
    def part(self, x):
        return _part(x)

    def _part(self):
        return [_part(y) for y in (1, 2)]
'''

MODEL = """from typing import TYPE_CHECKING

from .functional import first, second


if TYPE_CHECKING:
    from torch.nn import Module

    from .late import Late


class Model:
    def run(self) -> "Module":
        return first([4.0]), second().part(2), second()._part()

    def late(self) -> "Late":
        from .late import Late  # not before

        return Late()
"""

SMALL = {
    "functional/__init__.py": "from .one import first\nfrom .two import second\nfrom .unused import heavy\n",
    "functional/one.py": ONE,
    "functional/two.py": TWO,
    "functional/unused.py": "import scipy\n\n\ndef heavy():\n    return scipy\n",
    "late.py": "from .functional import first\n\n\nclass Late:\n    value = first([1.0])\n",
    "model.py": MODEL,
}


def small(folder: Path, **changes: str) -> Path:
    """A package; a change is named `functional__one` for `functional/one.py`."""
    for name, text in (SMALL | {f"{key.replace('__', '/')}.py": text for key, text in changes.items()}).items():
        path = folder / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "small"


def test_the_parts_that_are_needed_work_together(tmp_path: Path) -> None:
    text = flatten(small(tmp_path), [(("model",), "Model")])
    namespace = {"__name__": "flat"}
    exec(compile(text, "flat", "exec"), namespace)
    assert namespace["Model"]().run() == ([6.0], 10, [5, 10])
    assert namespace["Model"]().late().value == [5.0]
    # Both parts have their own helpers, and nothing else is there.
    assert {"_part_one", "_part_two", "_PARTS_one", "_PARTS_two"} < namespace.keys()
    assert not {"not_needed", "heavy", "scipy", "_part", "nn"} & namespace.keys()
    assert "# Of one.\ndef _part_one(x):" in text and '_PARTS_two: int = 5\n"""What it is split into."""' in text
    assert "# functional/one.py" not in text and re.search(
        r"^# -+ functional/one.py\n# The first formula.$", text, re.M
    )
    assert "from .late" not in text and "    from torch.nn import Module" in text
    assert flatten(small(tmp_path), [(("model",), "Model")]) == text


def first_with(before: str, value: str = "x") -> dict[str, str]:
    """Another `functional/one.py`: `before`, then `first` that gives `value`."""
    return {"functional__one": f"{before}\n\n\ndef first(x):\n    return {value}\n"}


LATE = "import math as nn\n\n\nclass Late:\n    value = nn\n"
CIRCLE_ONE = "from .two import _Base\n\n\nclass first(_Base): ...\n"
CIRCLE_TWO = "from .one import first\n\n\nclass _Base: ...\n\n\nclass second(first): ...\n"
IMPORT_IN_TEXT = '"""\n    from .two import x\n    """'

REFUSED = {
    "public names": (
        {"functional__two": "def first(x): ...\n\n\nclass second(int): part = first\n"},
        "both define 'first'",
    ),
    "outside names": ({"late": LATE, "functional__one": ONE.replace("math.sqrt(x)", "nn.Identity()")}, "stands for"),
    "as": (first_with("from .two import second as other", "other"), "without `as`"),
    "a module": (first_with("from . import two", "two"), "has 'two' as a module"),
    "star": (first_with("from .two import *"), "name what is imported"),
    "statement": (first_with("print('hello')"), "definitions and imports alone"),
    "twice": ({"functional__one": "first = 1\nfirst = 2\n"}, "bound twice"),
    "f-string": ({"functional__one": ONE.replace("[_part(y) for y in x]", 'f"{_part(x)}"')}, "f-string"),
    "hidden": (
        {"functional__one": ONE.replace("for y in x]", "for y in x], lambda _part: _part")},
        "hides the module's",
    ),
    "quoted": ({"functional__one": ONE.replace("def first(x", 'def first(x: "_part"')}, "quoted annotation"),
    "circle": ({"functional__one": CIRCLE_ONE, "functional__two": CIRCLE_TWO}, "need each other"),
    "looks": (first_with("", IMPORT_IN_TEXT), "in other words"),
    "future": (first_with("from __future__ import annotations"), "only plain imports"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    package = small(tmp_path, **changes)
    with pytest.raises(FlatteningError, match=re.escape(message)):
        flatten(package, [(("model",), "Model")])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_fits_into_one_file(family: str, tmp_path: Path) -> None:
    code = code_of(family)
    path = tmp_path / code.name
    path.write_text(code.text, encoding="utf-8")
    # What transformers looks for before it runs the file, and what people would have to install.
    assert not {*get_imports(path)} - {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub"}
    assert get_relative_imports(path) == []
    tree = ast.parse(code.text)
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {*class_names(FAMILIES[family])} <= defined
    assert {entry.split(".")[0] + ".py" for entry in code.auto_map.values()} == {code.name}
    assert {entry.split(".")[1] for entry in code.auto_map.values()} <= defined
    assert code.auto_map.keys() == {"AutoConfig", *FAMILIES[family].heads}
    # No other family and nothing of the rooms above the models.
    sections = re.findall(r"^# -+ (\S+\.py)$", code.text, re.M)
    assert len(sections) > 10 and len(set(sections)) == len(sections)
    assert {name.split("/")[0] for name in sections} == {"cpu", "functional", "attention", "encoder", "models"}
    assert {name.split("/")[1] for name in sections if name.startswith("models/")} == {family}
    named = "attention/named.py" in sections
    assert named == hasattr(FAMILIES[family].module("configuration"), "NamedAttentionOptions")
    if named:  # any mechanism may be asked for
        assert {f"attention/{name}.py" for name in ("longformer", "lsh", "neighborhood", "performer")} <= {*sections}


def test_every_name_of_a_file_is_known() -> None:
    for family in FAMILIES:
        text = code_of(family).text
        free = _unknown_names(text)
        assert not free, f"{family}: {sorted(free)}"


def _unknown_names(text: str) -> set[str]:
    """Names that are read somewhere and bound nowhere at the top."""
    top = symtable.symtable(text, "flat", "exec")
    bound = {x.get_name() for x in top.get_symbols() if x.is_assigned() or x.is_imported() or x.is_namespace()}
    tables, used = [top], {x.get_name() for x in top.get_symbols() if x.is_referenced()}
    for table in tables:
        tables.extend(table.get_children())
        used |= {x.get_name() for x in table.get_symbols() if x.is_global()}
    return used - bound - {*dir(builtins), "__name__"}
