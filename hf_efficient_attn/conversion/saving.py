"""Folders that are written whole or not at all."""

import json
import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


REPORT_FILE = "conversion.json"
CARD_FILE = "README.md"

# What `save_pretrained` of models, tokenizers and image processors writes, in shards or not, and this package besides.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_eff_*.py",
    REPORT_FILE,
    CARD_FILE,
)


def check_folder(folder: str | Path, force: bool, source: str | None) -> Path:
    """The folder to write to.

    Raises:
        ValueError: it is there and not empty (without `force`, or with it but no model's folder), a file, or the
            source's own. A model's folder has a config.json with a model_type and nothing that no saved model has.
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
        if not _names_a_model(path / "config.json"):
            raise ValueError(
                f"{path} is not empty and holds no config.json with a model_type, so no model to replace; give another "
                "one."
            )
        others = sorted(entry.name for entry in path.iterdir() if not _is_of_a_model(entry))
        if others:
            raise ValueError(
                f"{path} holds {', '.join(others)}, which no saved model has and which would be lost; move it away, or "
                "give another folder."
            )
    return path


def _names_a_model(path: Path) -> bool:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def _is_of_a_model(entry: Path) -> bool:
    return not entry.is_dir() and any(fnmatchcase(entry.name, pattern) for pattern in _MODEL_FILES)


def write_folder(path: Path, write: Callable[[Path], None], report: dict[str, Any]) -> None:
    """Have `write` fill a new folder beside `path`, then put it in its place; where that fails nothing has changed.

    A card that is there already is put into the new folder first, for `write` to renew what is the package's in it.
    """
    target = path.resolve()  # of a link, what it points to
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = work / "new" / target.name, work / "old"  # the card says what its folder is called
    try:
        new.mkdir(parents=True)
        if (target / CARD_FILE).is_file():
            shutil.copy2(target / CARD_FILE, new / CARD_FILE)
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
