"""The model that is converted: an object, a folder or a name on the Hub."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from ..auto import public_names, register_models
from .names import base_prefix
from .table import FAMILY_NAMES, find_row


# Weights that a file may hold besides those of its class: transformers leaves them out as well.
_HARMLESS = re.compile(r"(^|\.)pooler\.|seq_relationship\.|(position|token_type)_ids$|mask_value_float(16|32)$")


@dataclass(frozen=True)
class Source:
    """A loaded source.

    Args:
        model: the model, in whichever class its config names.
        is_own: it was loaded here, nobody else holds it.
        place: folder or name on the Hub, None for an object.
        left_out: weights in its files that its own class does not read.
    """

    model: PreTrainedModel
    is_own: bool
    place: str | None
    left_out: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """Its config's."""
        return self.model.config.model_type

    @property
    def class_name(self) -> str:
        """The name of its class."""
        return type(self.model).__name__

    @property
    def suffix(self) -> str:
        """What its class name says of the head: `"Model"`, `"ForMaskedLM"` ..."""
        return self.class_name.removeprefix(type(self.model.base_model).__name__.removesuffix("Model"))

    @property
    def prefix(self) -> str:
        """What stands before the base model's weights in its state."""
        return base_prefix(self.model)

    def copy_in_float32(self) -> PreTrainedModel:
        """A model to measure with: its own state in float32, in evaluation; never the caller's object."""
        model = self.model if self.is_own else copy.deepcopy(self.model)
        return model.float().eval()


def open_source(source: Any, to: str, architecture: str | None, **where: Any) -> Source:
    """Load `source`, after its row in the table of conversions has been looked up.

    Args:
        source: a model, a folder, or a name on the Hub.
        to: what it is to become.
        architecture: name of its class, where its config names none or several.
        where: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` for names on the Hub.

    Raises:
        ValueError: a source without a row or with one that refuses; a class that is not known; weights that are
            missing, unknown or of another shape, by name.
    """
    if isinstance(source, PreTrainedModel):
        if architecture is not None:
            raise ValueError(f"architecture = {architecture!r}: a model object has its class already; leave it out.")
        find_row(source.config.model_type, to)
        return Source(source, False, None)
    if not isinstance(source, str | Path):
        raise ValueError(f"source is a {type(source).__name__}; give a model, a folder, or a name on the Hub.")
    register_models()
    place = str(source)
    config = AutoConfig.from_pretrained(place, **where)
    find_row(config.model_type, to)
    cls = _class_of(config, architecture)
    # Otherwise shapes that do not fit raise without their names.
    how = {"output_loading_info": True, "dtype": "auto", "ignore_mismatched_sizes": True}
    model, info = cls.from_pretrained(place, **how, **where)
    extra = sorted(info["unexpected_keys"])
    wrong = {
        "missing": sorted(info["missing_keys"]),
        "unknown": [name for name in extra if not _HARMLESS.search(name)],
        "of another shape": sorted(str(name) for name in info["mismatched_keys"]),
    }
    if any(wrong.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise ValueError(
            f"{place} does not hold the weights of a {cls.__name__}, which its config names. {listed}. Nothing was "
            "converted; give the right architecture, or a model object that is complete."
        )
    return Source(model, True, place, tuple(extra))


def _class_of(config: Any, architecture: str | None) -> type[PreTrainedModel]:
    """The class of transformers or of ours that a config names."""
    names = [architecture] if architecture is not None else list(config.architectures or [])
    if len(names) != 1:
        raise ValueError(
            f"the config names {'no architecture' if not names else ' and '.join(names)}; say which class the weights "
            "are of, such as architecture='BertForMaskedLM'."
        )
    ours = public_names()
    if config.model_type in FAMILY_NAMES and names[0] in ours:
        row, kind = ours[names[0]]
        return getattr(row.module(kind), names[0])
    cls = getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel) or cls.config_class is not type(config):
        raise ValueError(f"architecture {names[0]!r} is no class of transformers for a {config.model_type!r} config.")
    return cls
