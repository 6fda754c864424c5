"""Models whose every weight comes from where they are loaded."""

import inspect
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .auto import FAMILIES, public_names


def load_whole(
    cls: type[PreTrainedModel],
    place: str,
    harmless: re.Pattern | None = None,
    *,
    body_only: bool = False,
    **where: Any,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """`cls.from_pretrained(place, **where)`, and the names of weights there that the class does not read.

    Args:
        cls: the class.
        place: a folder, or a name on the Hub.
        harmless: names of weights that may be there besides those of the class; by default any may.
        body_only: `cls` is a base model, and the weights may be those of a class with a head: weights of the head may
            be there, and a pooler may be missing, which the model then has not.
        where: what else `from_pretrained` takes.

    Raises:
        ValueError: weights that are missing, unknown or of another shape, by name; a file of a folder that is missing
            or broken.
    """
    try:
        # Otherwise shapes that do not fit raise without their names.
        model, info = cls.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **where)
    except FileNotFoundError as error:
        lost = error.filename or error
        raise ValueError(f"{place} does not hold all files of its weights: {lost} is not there.") from error
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{place}: {_broken_file(place)} is broken or cut off ({error}).") from error
    except OSError as error:
        if not Path(place).is_dir():
            raise  # of the Hub
        raise ValueError(f"{place}: its weights cannot be read ({error}).") from error
    extra, missing = sorted(info["unexpected_keys"]), sorted(info["missing_keys"])
    unknown = [] if harmless is None else [name for name in extra if not harmless.search(name)]
    if body_only:
        if missing and all(name.startswith("pooler.") for name in missing) and _may_lack_pooler(cls):
            return load_whole(cls, place, harmless, body_only=True, **where, add_pooling_layer=False)
        body = {cls.base_model_prefix, *(name for name, _ in model.named_children())}
        unknown = [name for name in unknown if name.partition(".")[0] in body]
    wrong = {
        "missing": missing,
        "unknown": unknown,
        "of another shape": sorted(str(name) for name in info["mismatched_keys"]),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(
            f"{place} does not hold the weights of a {cls.__name__}, which its config names. {listed}. Give the right "
            "architecture, or a model object that is complete; a model with random weights would be of no use."
        )
    return model, tuple(extra)


def _may_lack_pooler(cls: type[PreTrainedModel]) -> bool:
    return "add_pooling_layer" in inspect.signature(cls.__init__).parameters


def _broken_file(place: str) -> str:
    """The first file of weights in a folder that cannot be opened."""
    for path in sorted(Path(place).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return path.name
    return "a file of its weights"


def class_of(config: Any, architecture: str | None = None) -> type[PreTrainedModel]:
    """The class of transformers or of ours that a config names, or that `architecture` does.

    Raises:
        ValueError: it names none or several, or one that there is not.
    """
    names = [architecture] if architecture is not None else list(config.architectures or [])
    if len(names) != 1:
        raise ValueError(
            f"the config names {'no architecture' if not names else ' and '.join(names)}; say which class the weights "
            "are of, such as architecture='BertForMaskedLM'."
        )
    ours = public_names()
    if config.model_type in FAMILIES and names[0] in ours:
        row, kind = ours[names[0]]
        return getattr(row.module(kind), names[0])
    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel) or cls.config_class is not type(config):
        raise ValueError(f"architecture {names[0]!r} is no class of transformers for a {config.model_type!r} config.")
    return cls
