"""The model that is converted: an object, a folder or a name on the Hub."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..auto import register_models
from ..loading import class_of, load_whole
from .names import base_prefix
from .table import find_row


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
    cls = class_of(config, architecture)
    # Asked for by name, a base model may come out of a folder with a head.
    body_only = architecture is not None and cls.__name__.endswith("Model")
    model, extra = load_whole(cls, place, _HARMLESS, body_only=body_only, dtype="auto", **where)
    return Source(model, True, place, extra)
