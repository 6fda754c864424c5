"""What a card says of a model: what its config knows, and what only its user does."""

import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
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
        """From a dict; raises `ValueError` for a key that cards do not have, or metrics that are no dict."""
        names = [item.name for item in fields(cls)]
        for name in given or ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"card has {name!r}; a card knows {', '.join(names)}.{hint}")
        known = cls(**(given or {}))
        if known.metrics is not None and not isinstance(known.metrics, Mapping):
            raise ValueError(f"card has metrics = {known.metrics!r}; give a dict, such as {{'accuracy': 0.93}}.")
        return known

    def with_tags(self, tags: Iterable[str]) -> "Known":
        """The same with more tags."""
        return replace(self, tags=list(dict.fromkeys([*tags, *listed(self.tags)])))

    @property
    def figures(self) -> dict[str, float]:
        """The metrics proper, by names without `eval_`."""
        found = {name.removeprefix("eval_"): value for name, value in (self.metrics or {}).items()}
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        return {name: value for name, value in numbers.items() if name not in _NO_METRICS}


@dataclass(frozen=True)
class Folder:
    """A saved model, as its config file shows it.

    Args:
        path: the folder.
        config: the model's config.
        model_type, architecture: of the file; they are transformers' own where a model was saved in its stock form.
        auto_map: the code that comes with it.
    """

    path: Path
    config: PreTrainedConfig
    model_type: str
    architecture: str
    auto_map: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, config: PreTrainedConfig) -> "Folder | None":
        """The folder at `path`; None where there is no model, such as with adapter weights alone."""
        file = path / "config.json"
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        architecture = next(iter(found.get("architectures") or []), type(config).__name__)
        return cls(path, config, found.get("model_type", config.model_type), architecture, found.get("auto_map") or {})

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


def base_models(known: Known, config: PreTrainedConfig, repo_id: str | None) -> list[str]:
    """Where training started: what the user says, else the Hub's name that the weights were loaded from."""
    if known.base_model is not None:
        return [known.base_model] if isinstance(known.base_model, str) else list(known.base_model)
    source = getattr(config, "_name_or_path", "") or ""
    is_other = source != repo_id and not Path(source).exists()
    return [source] if is_other and is_hub_name(source) else []


def is_hub_name(name: str) -> bool:
    """Whether `name` can be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def listed(value: str | list[str] | None) -> list[str]:
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
