"""The code of a family as one file beside a checkpoint, and the entries of `auto_map` that name it."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..auto import COMPOSITES, FAMILIES, Family
from .facts import PACKAGE, package_version
from .files import write_whole
from .flatten import flatten


_FOLDER = Path(__file__).resolve().parents[1]

_FIRST_LINE = re.compile(rf"# \w+ in one file, from {PACKAGE} \S+")

_HEAD = """\
# {family} in one file, from {package} {version}: what this family's models need, put together from the package's
# modules and otherwise unchanged. Licence: Apache-2.0. It stands beside a checkpoint so that the Auto classes of
# transformers can load it with trust_remote_code=True where the package is not installed. Written by
# `hf-efficient-attn export` or `save_pretrained(..., self_contained=True)`; changes go into the package.
"""

_FOOT = """\
# {dashes} where the package is installed
# Its classes take the place of these, and a folder loads in them with or without this file.
# All or none: an older one may lack some.
try:
    import {package} as _installed

    _theirs = {{
        name: getattr(_installed, name)
        for name in (
{names}
        )
    }}
except (ImportError, AttributeError):
    pass
else:
    globals().update(_theirs)
"""


@dataclass(frozen=True)
class Code:
    """A family's code file.

    Args:
        name: its file name.
        text: its source.
        version: of the package that it was made from.
        auto_map: what a config says of it, Auto class -> class.
    """

    name: str
    text: str
    version: str
    auto_map: Mapping[str, str]

    @property
    def sha256(self) -> str:
        """As `sha256sum` prints it for the file."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def code_of(model_type: str) -> Code:
    """The code file of a family; raises `ValueError` for a model type that has none."""
    if model_type in COMPOSITES:
        raise ValueError(
            f"a {model_type!r} is made of two models of any families and has no self-contained form; save one of them: "
            "model.save_discriminator(folder, self_contained=True)."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type {model_type!r} is no family of {PACKAGE}, which has {', '.join(FAMILIES)}; its code cannot be "
            "carried. Folders of an original family are first loaded and saved in our class."
        )
    return _code_of(model_type)


@cache
def _code_of(model_type: str) -> Code:
    row = FAMILIES[model_type]
    names = class_names(row)
    version = package_version()
    modules = {kind: ("models", row.folder, f"{kind}_{row.folder}") for kind in ("configuration", "modeling")}
    roots = [(modules["configuration" if name == row.config_name else "modeling"], name) for name in names]
    label = "where the package is installed"
    foot = _FOOT.format(
        dashes="-" * (117 - len(label)),
        package=PACKAGE,
        names="\n".join(f'            "{name}",' for name in sorted(names)),
    )
    head = _HEAD.format(family=f"Eff{row.name}", package=PACKAGE, version=version)
    text = f"{head}\n{flatten(_FOLDER, roots)}\n\n{foot}"
    return Code(f"modeling_{row.folder}.py", text, version, auto_map_of(row))


def class_names(row: Family) -> list[str]:
    """The classes of a family: its config, the base of its models, and the models."""
    models = [f"Eff{row.name}PreTrainedModel", row.detector_name, *row.model_names.values()]
    return [row.config_name, *dict.fromkeys(name for name in models if name is not None)]


def auto_map_of(row: Family) -> dict[str, str]:
    """Auto class -> class in the family's code file, for all heads."""
    names = {"AutoConfig": row.config_name, **row.model_names}
    return {auto: f"modeling_{row.folder}.{name}" for auto, name in sorted(names.items())}


def names_our_code(config: Any) -> bool:
    """Whether a config says that the code of its family comes with it, in its folder or in a repository."""
    entry = (getattr(config, "auto_map", None) or {}).get("AutoConfig")
    row = FAMILIES.get(config.model_type)
    return row is not None and isinstance(entry, str) and entry.split("--")[-1] == auto_map_of(row)["AutoConfig"]


def write_code(folder: Path, model_type: str) -> Code:
    """Write the code file of a family into `folder`."""
    code = code_of(model_type)
    path = folder / code.name
    if path.is_file() and not _is_ours(path):
        raise ValueError(
            f"{path} was not written by {PACKAGE}, and the code of the model would go there; move it away."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, code.text)
    return code


def remove_code(folder: Path, model_type: str) -> None:
    """Remove the code file that was written into `folder`, if there is one."""
    path = folder / f"modeling_{model_type}.py"
    if path.is_file() and _is_ours(path):
        path.unlink()


def _is_ours(path: Path) -> bool:
    return _FIRST_LINE.match(path.read_text(encoding="utf-8")) is not None
