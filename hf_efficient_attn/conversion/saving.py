"""Folders that are written whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


REPORT_FILE = "conversion.json"


def check_folder(folder: str | Path, force: bool, source: str | None) -> Path:
    """The folder to write to.

    Raises:
        ValueError: it is there and not empty (without `force`, or with it but no model's folder), a file, or the
            source's own.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder.")
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"{path} is the current folder or above it; give a folder of the model's own.")
    if source is not None and path.exists() and Path(source).exists():
        ours, theirs = path.resolve(), Path(source).resolve()
        if ours == theirs or ours in theirs.parents:
            raise ValueError(f"{path} holds the source; give another folder.")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise ValueError(f"{path} is not empty; give another folder, or force=True (--force) to replace it.")
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not empty and holds no config.json, so no model to replace; give another one.")
    return path


def write_folder(path: Path, write: Callable[[Path], None], report: dict[str, Any]) -> None:
    """Have `write` fill a new folder beside `path`, then put it in its place; where that fails nothing has changed."""
    target = path.resolve()  # of a link, what it points to
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = work / "new" / target.name, work / "old"  # the card says what its folder is called
    try:
        new.mkdir(parents=True)
        write(new)
        (new / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        new.rename(target)
    finally:
        # Also after Ctrl-C. Where what was there cannot be put back, it stays in `work`.
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(work, ignore_errors=True)
