"""What a card says of a model: what its config knows, and what only its user does."""

import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.configuration_utils import PreTrainedConfig

from ..auto import COMPOSITES, FAMILIES, Composite, Family


PACKAGE = __name__.partition(".")[0]

# What `Trainer.evaluate()` returns besides metrics.
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "step")

# Auto class -> the Hub's name of the task.
TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedImageModeling": None,
    "AutoBackbone": None,
    "AutoModel": "feature-extraction",
    "AutoModelForPreTraining": None,
}


@dataclass(frozen=True)
class Known:
    """What the user knows.

    Args:
        base_model: where training started: a name on the Hub, or several.
        datasets: what it was trained on: names on the Hub, or words of your own.
        metrics: name -> figure, such as what `Trainer.evaluate()` returns.
        license: as the Hub names it, such as `apache-2.0`.
        language: codes such as `en`.
        tags: more tags.
        summary: a paragraph of your own.
    """

    base_model: str | list[str] | None = None
    datasets: str | list[str] | None = None
    metrics: Mapping[str, Any] | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: str | list[str] | None = None
    summary: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "Known":
        """From a dict; raises `ValueError` for a key that cards do not have, or a value that none can be."""
        names = [item.name for item in fields(cls)]
        for name in given or ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"card has {name!r}; a card knows {', '.join(names)}.{hint}")
        return cls(**{name: _checked(name, value) for name, value in (given or {}).items() if value is not None})

    def with_tags(self, tags: Iterable[str]) -> "Known":
        """The same with more tags."""
        return replace(self, tags=list(dict.fromkeys([*tags, *listed(self.tags)])))

    @property
    def figures(self) -> dict[str, float]:
        """The metrics proper, by names without `eval_`."""
        found = {name.removeprefix("eval_"): value for name, value in (self.metrics or {}).items()}
        return {name: value for name, value in found.items() if name not in _NO_METRICS}


@dataclass(frozen=True)
class Folder:
    """A saved model, as its config file shows it.

    Args:
        path: the folder.
        config: the model's config.
        model_type, architecture: of the file; they are transformers' own where a model was saved in its stock form.
        derived: the name of a class of the user's own, where `architecture` is the one of the package below it.
        source: the Hub's name that the weights were loaded from, or none.
    """

    path: Path
    config: PreTrainedConfig
    model_type: str
    architecture: str
    derived: str | None = None
    source: str = ""

    @classmethod
    def of(cls, path: Path, config: PreTrainedConfig, model: Any = None) -> "Folder | None":
        """The folder at `path`; None where there is no model, such as with adapter weights alone, or one of a family
        that is not the package's.

        Args:
            path: the folder.
            config: the model's config.
            model: the model that was saved there, where it is at hand.
        """
        file = path / "config.json"
        if not file.is_file() or config.model_type not in (*FAMILIES, *COMPOSITES):
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        architecture = next(iter(listed(found.get("architectures"))), type(config).__name__)
        model_type = found.get("model_type", config.model_type)
        source = hub_source(config if model is None else model)
        if model is None or model_type != config.model_type or is_of_package(type(model)):
            return cls(path, config, model_type, architecture, None, source)
        names = cls(path, config, model_type, architecture).row.model_names
        below = (x.__name__ for x in type(model).__mro__ if is_of_package(x))
        return cls(path, config, model_type, next(below, names.get("AutoModel")), architecture, source)

    @property
    def row(self) -> Family | Composite:
        """The row of the model's family."""
        return FAMILIES.get(self.config.model_type) or COMPOSITES[self.config.model_type]

    @property
    def is_stock(self) -> bool:
        """It loads in transformers' own classes."""
        return self.model_type != self.config.model_type

    @property
    def auto_class(self) -> str | None:
        """The Auto class that loads it; None for a class that has none."""
        if self.is_stock:
            return None
        autos = [auto for auto, name in self.row.model_names.items() if name == self.architecture]
        return next((auto for auto in TASKS if auto in autos), None)

    @property
    def task(self) -> str | None:
        """The Hub's name of its task."""
        task = TASKS.get(self.auto_class)
        return "image-feature-extraction" if task == "feature-extraction" and self.row.image_processor else task

    @property
    def mechanism(self) -> str:
        """The first sentence on the family."""
        names = self.row.model_names
        cls = getattr(self.row.module("modeling"), names.get("AutoModel") or next(iter(names.values())))
        return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())

    def options(self) -> list[tuple[str, Any, Any]]:
        """Options of the family that differ from its defaults: name, value, default."""
        theirs = {item.name for item in fields(PreTrainedConfig)}
        found = []
        for item in fields(self.config):
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            value = getattr(self.config, item.name, default)
            if isinstance(value, PreTrainedConfig):
                found.append((item.name, f"a {type(value).__name__}", default))
            elif item.name not in theirs and value != default:
                found.append((item.name, value, default))
        return found


def base_models(known: Known, source: str, repo_id: str | None) -> list[str]:
    """Where training started: what the user says, else the Hub's name that the weights were loaded from."""
    if known.base_model is not None:
        return listed(known.base_model)
    return [source] if source and source != repo_id else []


def hub_source(loaded: Any) -> str:
    """The Hub's name that a model, or a config, was loaded from; empty where it was a folder."""
    if getattr(loaded, "loaded_from_folder", None) is not None:
        return ""
    source = getattr(getattr(loaded, "config", loaded), "_name_or_path", "") or ""
    return source if not Path(source).exists() and is_hub_name(source) else ""


def is_of_package(cls: type) -> bool:
    """Whether a class is a model of the package that folders can be loaded in, and not one derived from it."""
    rows = [*FAMILIES.values(), *COMPOSITES.values()]
    names = {name for row in rows for name in (*row.model_names.values(), getattr(row, "detector_name", None))}
    # FSDP puts a class of its own on top.
    return cls.__name__.removeprefix("FSDP") in names and any(
        x.__module__.partition(".")[0] == PACKAGE and x.__name__ == cls.__name__.removeprefix("FSDP")
        for x in cls.__mro__
    )


def figure_of(value: Any) -> float | int | None:
    """A number, also of NumPy or in a tensor of one; None for what is none."""
    if callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # more than one
            return None
    if isinstance(value, int | float):
        return value
    return float(value) if isinstance(value, Real) else None


def _checked(name: str, value: Any) -> Any:
    """A value as cards have it."""
    if name == "metrics":
        if not isinstance(value, Mapping):
            raise ValueError(f"card has metrics = {value!r}; give a dict, such as {{'accuracy': 0.93}}.")
        figures = {str(metric): figure_of(figure) for metric, figure in value.items()}
        for metric, figure in figures.items():
            if figure is None:
                raise ValueError(f"card has metrics with {metric} = {value[metric]!r}; give a number.")
        return figures
    if isinstance(value, str):
        return value
    if name in ("license", "summary"):
        raise ValueError(f"card has {name} = {value!r}; give a string.")
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"card has {name} = {value!r}; give a string or a list of strings.")
    return list(value)


def is_hub_name(name: str) -> bool:
    """Whether `name` can be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def listed(value: str | Iterable[str] | None) -> list[str]:
    """One name, several or none as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def package_version() -> str:
    """The version of this package."""
    return sys.modules[PACKAGE].__version__


def versions() -> dict[str, str]:
    """Names and versions of what a model was saved with."""
    found = {PACKAGE: package_version()}
    for name in ("transformers", "torch", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
