"""The code of its family for a folder that is there already."""

import json
import os
from pathlib import Path

from huggingface_hub import CommitInfo
from transformers import AutoConfig

from ..auto import FAMILIES
from .card import Card, make_card
from .code_file import Code, class_names, code_of, write_code
from .facts import Folder, Known
from .files import write_whole
from .publishing import inherited, write_card_file
from .pushing import make_repo, push


# Of a training run: not what a model is loaded from.
_LEFT_AT_HOME = ("checkpoint-", ".", "_", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state", "runs")


def export_folder(folder: str | os.PathLike) -> Code:
    """Make a saved model self-contained: write the code of its family, name it in `config.json` and in the card.

    Weights, tokenizer and everything else stay as they are; each file is replaced whole or not at all. Exporting again
    changes nothing.

    Args:
        folder: a folder that `save_pretrained` wrote.

    Returns:
        The code.

    Raises:
        ValueError: no model there, or one of another family, or of a class that is not of the package.
    """
    path = Path(folder)
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"there is no config.json in {os.fspath(folder)!r}; give a folder that save_pretrained wrote.")
    data = json.loads(file.read_text(encoding="utf-8"))
    model_type = data.get("model_type", "")
    code = code_of(model_type)
    for name in data.get("architectures") or []:
        if name not in class_names(FAMILIES[model_type]):
            raise ValueError(
                f"{os.fspath(file)} names the class {name}, which is not of the package; its code is unknown."
            )
    # The code before what names it: at no time does a config name a file that is not there.
    write_code(path, model_type)
    data["auto_map"] = {**(data.get("auto_map") or {}), **code.auto_map}
    write_whole(file, json.dumps(data, indent=2, sort_keys=True) + "\n")
    write_card_file(path, _card(path, code, None), ("code",))
    return code


def push_folder(folder: str | os.PathLike, repo_id: str) -> CommitInfo:
    """Upload a folder that `export_folder` has been through, without what a training run left there."""
    path = Path(folder)
    names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    names = [name for name in names if not any(part.startswith(_LEFT_AT_HOME) for part in name.split("/"))]
    repo_id = make_repo(repo_id, None, None)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    card = _card(path, code_of(config["model_type"]), repo_id)
    return push(path, names, repo_id, card, commit_message="Upload model with its code")


def _card(path: Path, code: Code, repo_id: str | None) -> Card:
    config = AutoConfig.from_pretrained(path)
    name = path.resolve().name if repo_id is None else repo_id.rpartition("/")[2]
    return make_card(Folder.of(path, config), Known.of(inherited(config)), name=name, repo_id=repo_id, code=code)
