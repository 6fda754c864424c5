"""The code of its family for a folder that is there already."""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig

from ..auto import FAMILIES
from .card import Card, make_card
from .card_file import CARD_FILE, read_card, renamed_text, renewed_text
from .code_file import Code, class_names, code_of, write_code
from .facts import Folder, Known, listed
from .files import write_whole
from .inheriting import merged, said_by
from .publishing import write_card_file
from .pushing import Remote, make_repo, push


# Of a training run, not what a model is loaded from: Trainer's, Accelerate's, FSDP's and DeepSpeed's names.
_HIDDEN = (".*", "_*")
_STATE_FOLDERS = (
    "checkpoint-*",
    "global_step*",
    "optimizer_*",
    "pytorch_model_[0-9]*",
    "pytorch_model_fsdp_*",
    "runs",
)
_STATE_FILES = (
    "optimizer*.pt",
    "optimizer*.bin",
    "scheduler*.pt",
    "scheduler*.bin",
    "scaler.pt",
    "sampler*.bin",
    "dl_state_dict*.bin",
    "rng_state*.pth",
    "random_states_*.pkl",
    "custom_checkpoint_*.pkl",
    "trainer_state.json",
    "latest",
    "zero_to_fp32.py",
    "events.out.tfevents.*",
)


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
    if not isinstance(data, dict):
        raise ValueError(f"{os.fspath(file)} holds no JSON object; give a folder that save_pretrained wrote.")
    model_type = data.get("model_type") or ""
    code = code_of(model_type)
    for name in listed(data.get("architectures")):
        if name not in class_names(FAMILIES[model_type]):
            raise ValueError(
                f"{os.fspath(file)} names the class {name}, which is not of the package; its code is unknown."
            )
    card = _card(path, code, said_by(read_card(path / CARD_FILE)), path.resolve().name)  # a config that is none fails
    # The code before what names it: at no time does a config name a file that is not there.
    write_code(path, model_type)
    data["auto_map"] = {**(data.get("auto_map") or {}), **code.auto_map}
    write_whole(file, json.dumps(data, indent=2, sort_keys=True) + "\n")
    write_card_file(path, card, ("code",))
    return code


def push_folder(folder: str | os.PathLike, repo_id: str) -> CommitInfo:
    """Upload a folder that `export_folder` has been through, without what a training run left there.

    Raises:
        OSError: the Hub, or the network, refuses.
    """
    path = Path(folder)
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    names = [file.as_posix() for file in files if not _is_left_at_home(file)]
    try:
        repo_id = make_repo(repo_id, None, None)
        remote = Remote(repo_id)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        local, name = read_card(path / CARD_FILE), repo_id.rpartition("/")[2]
        # What the folder's card says is about the weights that lie there.
        said = merged(remote.earlier().true_of(path), said_by(local))
        card = _card(path, code_of(config["model_type"]), said, name, repo_id)
        text = renamed_text(renewed_text(local, card), path.resolve().name, name)
        return push(path, names, repo_id, remote.text_for(text, card), commit_message="Upload model with its code")
    except HTTPError as error:  # of the client's HTTP library, where no answer came
        raise OSError(f"the push to {repo_id!r} failed: {' '.join(str(error).split())}") from error


def _is_left_at_home(file: PurePath) -> bool:
    folders = any(fnmatchcase(part, pattern) for part in file.parts[:-1] for pattern in (*_HIDDEN, *_STATE_FOLDERS))
    return folders or any(fnmatchcase(file.name, pattern) for pattern in (*_HIDDEN, *_STATE_FILES))


def _card(path: Path, code: Code, said: Mapping[str, Any], name: str, repo_id: str | None = None) -> Card:
    folder = Folder.of(path, AutoConfig.from_pretrained(path))
    return make_card(folder, Known.of(said), name=name, repo_id=repo_id, code=code)
