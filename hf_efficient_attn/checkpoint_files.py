"""Single files of a checkpoint, read as far as is needed to know that they are whole.

Every function raises on a damaged file, whatever the library underneath raises, and runs nothing that a file contains.
"""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals


def said_by(error: Exception) -> str:
    """An error in a few words on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def read_text(path: Path) -> str:
    """A line of text."""
    return path.read_text(encoding="utf-8").strip()


def read_json_value(path: Path) -> Any:
    """Any JSON, such as the list in `modules.json` of sentence-transformers."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, and an object is expected")
    return content


def read_safetensors(path: Path) -> dict[str, list[int]]:
    """Name -> shape, from the header.

    safetensors itself refuses a header that it cannot read, tensors with gaps or overlaps between them or of another
    size than their shape has, and a file that is not as long as its header says.
    """
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    if not shapes:
        raise ValueError("it holds no tensors")
    return shapes


def read_zip(path: Path) -> None:
    """An archive that `torch.save` wrote: every checksum is compared, a block of it at a time."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} inside it is damaged")
        if _pickle_in(archive) is None:
            raise ValueError("it is an archive, but torch.save did not write it")


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, checksums compared; tensors are mapped from the file, not loaded.

    Only what Trainer itself allows is unpickled: tensors, plain Python, and numpy's arrays for its random state.
    """
    read_zip(path)
    with safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_arguments(path: Path) -> dict[str, Any]:
    """Plain values among the fields of a pickled `TrainingArguments`, checksums compared; also `num_processes`.

    That pickle may name any class or function. Here a stand-in takes the place of each, so that none is imported or
    called. What cannot be read so is left out.
    """
    read_zip(path)
    with zipfile.ZipFile(path) as archive, archive.open(_pickle_in(archive)) as file:
        try:
            fields = vars(_StandInUnpickler(file).load())
        except Exception:  # an object of a kind that stand-ins cannot play: nothing is known, and nothing is damaged
            return {}
    processes = getattr(fields.get("distributed_state"), "num_processes", None)
    plain = {name: value for name, value in fields.items() if isinstance(value, bool | int | float | str)}
    return plain | ({"num_processes": processes} if isinstance(processes, int) else {})


def _pickle_in(archive: zipfile.ZipFile) -> str | None:
    return next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)


class _StandIn:
    """An object of any class: takes everything that unpickling does to objects, and keeps attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "_StandIn":
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "_StandIn":
        return self

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                vars(self).update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """As a list has."""

    def extend(self, items: Any) -> None:
        """As a list has."""

    def add(self, item: Any) -> None:
        """As a set has."""


class _StandInUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        return _StandIn

    def persistent_load(self, pid: Any) -> _StandIn:
        return _StandIn()
