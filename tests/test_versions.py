"""The versions that are tested are both ends of what pyproject.toml allows."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).resolve().parents[1]


def pinned(constraints: str) -> Version:
    lines = (ROOT / constraints).read_text(encoding="utf-8").splitlines()
    (version,) = (line.partition("==")[2] for line in lines if line.startswith("transformers=="))
    return Version(version)


def test_both_ends_of_transformers_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (allowed,) = (r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "transformers")
    (lowest,) = (Version(each.version) for each in allowed if each.operator == ">=")
    assert pinned("constraints-floor.txt") == lowest
    assert pinned("constraints.txt") in allowed
