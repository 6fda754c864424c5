"""What cards that are there say of a model, and what of it is still true of the one that takes its place."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..auto import COMPOSITES, FAMILIES
from .card import NOT_RECORDED
from .card_file import parsed, parts_of
from .facts import PACKAGE, Known, figure_of, listed


_METADATA = ("base_model", "datasets", "license", "language", "tags")
_LINE = re.compile(r"^- (Base model|Data): (.+)$", re.MULTILINE)
_ROW = re.compile(r"^\| (.+) \| (\S+) \|$", re.MULTILINE)
_LINK = re.compile(r"^\[(.+)\]\(.*\)$")


@dataclass(frozen=True)
class Earlier:
    """An earlier card.

    Args:
        known: what it says.
        weights: file -> SHA-256 of the weights that it is about, where they are known.
    """

    known: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    def true_of(self, folder: Path) -> dict[str, Any]:
        """What holds for the model in `folder` as well: figures only for the same weights."""
        same = "metrics" not in self.known or (bool(self.weights) and self.weights == weights_of(folder))
        return {name: value for name, value in self.known.items() if same or name != "metrics"}


def said_by(text: str | None) -> dict[str, Any]:
    """What a card says that only a user knows, by the names of `Known`; what cannot be read is left out."""
    card = parsed(text) if text else None
    if card is None:
        return {}
    parts = parts_of(text)
    found = {name: card.data.get(name) for name in _METADATA}
    ours = (PACKAGE, *FAMILIES, *COMPOSITES)
    found["tags"] = [tag for tag in _list(found["tags"]) if tag not in ours]
    # The metadata have only what is a name on the Hub.
    for line, value in _LINE.findall(parts.get("training", "")):
        if value != NOT_RECORDED:
            found["datasets" if line == "Data" else "base_model"] = [_LINK.sub(r"\1", x) for x in value.split(", ")]
    found["summary"] = "\n\n".join(parts.get("model", "").split("\n\n")[2:]).strip()
    found["metrics"] = _figures(parts.get("training", ""), card.data.eval_results or ())
    return {name: value for name, value in found.items() if value and _is_known(name, value)}


def merged(*said: Mapping[str, Any]) -> dict[str, Any]:
    """What several say, the last one first; of tags all."""
    tags = [tag for one in said for tag in listed(one.get("tags"))]
    found = {name: value for one in said for name, value in one.items() if value is not None}
    return {**found, **({"tags": list(dict.fromkeys(tags))} if tags else {})}


def weights_of(folder: Path) -> dict[str, str]:
    """File -> SHA-256 of the weights in a folder."""
    files = ((path.resolve(), path.name, path.stat()) for path in sorted(folder.glob("*.safetensors")))
    return {name: _digest(path, found.st_mtime_ns, found.st_size) for path, name, found in files}


@lru_cache(maxsize=256)
def _digest(path: Path, time: int, size: int) -> str:
    """SHA-256 of a file. Kept, because a run asks for that of the model it started from at every checkpoint."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _figures(training: str, results: Any) -> dict[str, Any]:
    """Metrics: those of the table, which has them rounded, and of the metadata."""
    shown = {name: number for name, number in _ROW.findall(training) if _number(number) is not None}
    found: dict[str, Any] = {name: _number(number) for name, number in shown.items()}
    for result in results:
        value = figure_of(result.metric_value)
        if value is not None and shown.get(result.metric_type, f"{value:.6g}") == f"{value:.6g}":
            found[result.metric_type] = value
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else listed(value if isinstance(value, str) else None)


def _is_known(name: str, value: Any) -> bool:
    """Whether a card of ours can say it; somebody may have written anything."""
    try:
        Known.of({name: value})
    except ValueError:
        return False
    return True
