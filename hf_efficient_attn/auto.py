"""Registration with transformers' Auto classes. `FAMILIES` has one row a family; adding a family is adding a row.

Configs are registered as soon as transformers' own table of configs is loaded, models and tokenizers just before the
first config of ours exists. So importing the package costs nothing until something of it, or a checkpoint, is used.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`.

    Args:
        name: class prefix; `Eff<name>Config` and `Eff<name>Model` stand in `models/<folder>`.
        folder: folder in `models/`, also the model type.
        heads: Auto class -> suffix of the model class.
        tokenizer: text: name of transformers' tokenizer class to use where a folder names none.
        detector: text: suffix of the class that detects replaced tokens (ELECTRA), for which there is no Auto class.
        image_processor: vision: name of transformers' image processor to use where a folder names none.
    """

    name: str
    folder: str
    heads: dict[str, str]
    tokenizer: str | None = None
    detector: str | None = "ForReplacedTokenDetection"
    image_processor: str | None = None

    @property
    def config_name(self) -> str:
        """Name of the config class."""
        return f"Eff{self.name}Config"

    @property
    def model_names(self) -> dict[str, str]:
        """Auto class -> name of the model class."""
        return {auto: f"Eff{self.name}{suffix}" for auto, suffix in self.heads.items()}

    @property
    def detector_name(self) -> str | None:
        """Name of the class that detects replaced tokens, in text families."""
        return None if self.detector is None else f"Eff{self.name}{self.detector}"

    def module(self, kind: str) -> ModuleType:
        """The `configuration` or `modeling` module."""
        return importlib.import_module(f".models.{self.folder}.{kind}_{self.folder}", __package__)


ENCODER_HEADS = {
    "AutoModel": "Model",
    "AutoModelForPreTraining": "ForMaskedLM",
    "AutoModelForMaskedLM": "ForMaskedLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
    "AutoModelForMultipleChoice": "ForMultipleChoice",
    "AutoModelForTextEncoding": "Model",
}

CAUSAL_HEADS = {"AutoModelForCausalLM": "ForCausalLM"}

VISION_HEADS = {
    "AutoModel": "Model",
    "AutoModelForPreTraining": "ForMaskedImageModeling",
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoModelForMaskedImageModeling": "ForMaskedImageModeling",
    "AutoBackbone": "Backbone",
}

FAMILIES: dict[str, Family] = {
    "eff_big_bird": Family(
        "BigBird", "eff_big_bird", ENCODER_HEADS | {"AutoModelForPreTraining": "ForPreTraining"}, "BigBirdTokenizer"
    ),
    "eff_electra": Family(
        "Electra",
        "eff_electra",
        ENCODER_HEADS | {"AutoModelForPreTraining": "ForPreTraining"},
        "BertTokenizer",
        detector="ForPreTraining",
    ),
    "eff_longformer": Family("Longformer", "eff_longformer", ENCODER_HEADS | CAUSAL_HEADS, "RobertaTokenizer"),
    "eff_nystromformer": Family("Nystromformer", "eff_nystromformer", ENCODER_HEADS, "TokenizersBackend"),
    "eff_performer": Family("Performer", "eff_performer", ENCODER_HEADS | CAUSAL_HEADS, "BertTokenizer"),
    "eff_reformer": Family("Reformer", "eff_reformer", ENCODER_HEADS | CAUSAL_HEADS, "ReformerTokenizer"),
    "eff_vit": Family("ViT", "eff_vit", VISION_HEADS, detector=None, image_processor="ViTImageProcessor"),
}

TEXT_FAMILIES = {name: family for name, family in FAMILIES.items() if family.image_processor is None}
VISION_FAMILIES = {name: family for name, family in FAMILIES.items() if family.image_processor is not None}


@dataclass(frozen=True)
class Composite:
    """One row of `COMPOSITES`: a model that is made of models of other families.

    Args:
        folder: the model type; its modules stand in `pretraining/`.
        config_name: name of the config class.
        model_names: Auto class -> name of the model class.
    """

    folder: str
    config_name: str
    model_names: dict[str, str]
    tokenizer: None = None
    image_processor: None = None

    def module(self, kind: str) -> ModuleType:
        """The `configuration` or `modeling` module."""
        return importlib.import_module(f".pretraining.{kind}_{self.folder}", __package__)


COMPOSITES: dict[str, Composite] = {
    "eff_electra_joint": Composite(
        "eff_electra_joint",
        "EffElectraJointConfig",
        {"AutoModelForPreTraining": "EffElectraForJointPreTraining"},
    ),
}

_CONFIG_TABLE = "transformers.models.auto.configuration_auto"


def public_names() -> dict[str, tuple[Family | Composite, str]]:
    """Public class name -> (row, module kind) for every row of both tables."""
    names = {}
    for family in FAMILIES.values():
        names[family.config_name] = (family, "configuration")
        for name in (f"Eff{family.name}PreTrainedModel", family.detector_name, *family.model_names.values()):
            if name is not None:
                names[name] = (family, "modeling")
    for row in COMPOSITES.values():
        names[row.config_name] = (row, "configuration")
        names |= {name: (row, "modeling") for name in row.model_names.values()}
    return names


def _rows() -> tuple[Family | Composite, ...]:
    return (*FAMILIES.values(), *COMPOSITES.values())


def register() -> None:
    """Register every family with the Auto classes, now or as soon as transformers' table of configs is loaded.

    Idempotent. Raises `ValueError` where a model type is taken by another class.
    """
    after_import(_CONFIG_TABLE, "CONFIG_MAPPING", register_configs)


def after_import(module: str, attribute: str, function: Callable[[Any], None]) -> None:
    """Call `function` with `attribute` of `module` right after that is imported, or now if it is; once a module."""
    if hasattr(sys.modules.get(module), attribute):
        function(getattr(sys.modules[module], attribute))
    elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, attribute, function))


def register_configs(_: Any = None) -> None:
    """Register the config classes, and have the models registered before the first config exists."""
    from .encoder.configuration import EffConfig

    table = sys.modules[_CONFIG_TABLE]
    for family in _rows():
        config_class = getattr(family.module("configuration"), family.config_name)
        known = table.CONFIG_MAPPING._extra_content.get(family.folder)
        if known is None or known is config_class:
            table.AutoConfig.register(family.folder, config_class, exist_ok=known is not None)
        elif known.__name__ != config_class.__name__:
            raise ValueError(
                f"model type {family.folder!r} is already registered by {known.__module__}.{known.__name__}; "
                "remove that registration before importing hf_efficient_attn."
            )
    if not _registered and register_models not in EffConfig.before_first_use:
        EffConfig.before_first_use.append(register_models)


_registered: list[str] = []

after_models: list[Callable[[], None]] = []
"""Called once the models are registered: where the package adds to them what this room does not know."""


def register_models() -> None:
    """Register the model classes, default tokenizers and image processors. Idempotent."""
    import transformers

    for family in _rows():
        config_class = getattr(family.module("configuration"), family.config_name)
        modeling = family.module("modeling")
        for auto_name, model_name in family.model_names.items():
            getattr(transformers, auto_name).register(config_class, getattr(modeling, model_name), exist_ok=True)
        if family.tokenizer is not None:
            tokenizer_class = getattr(transformers, family.tokenizer)
            transformers.AutoTokenizer.register(config_class, fast_tokenizer_class=tokenizer_class, exist_ok=True)
        if family.image_processor is not None:
            _register_image_processor(config_class, family.image_processor)
    _registered[:] = list(FAMILIES)
    for add in after_models:
        add()


def _register_image_processor(config_class: type, name: str) -> None:
    """The PIL form of the processor `name`, and where torchvision is installed that one too."""
    import transformers
    from transformers.utils import is_torchvision_available, is_vision_available

    if not is_vision_available():
        return
    try:
        register_for = transformers.AutoImageProcessor.register
    except ImportError:  # older versions of transformers have no such class without torchvision
        return
    classes = {"pil": getattr(transformers, f"{name}Pil")}
    if is_torchvision_available():
        classes["torchvision"] = getattr(transformers, name)
    register_for(config_class, image_processor_classes=classes, exist_ok=True)


class _AfterImport(MetaPathFinder):
    """Calls a function right after one module has been imported, then goes away; see `after_import`."""

    def __init__(self, module: str, attribute: str, function: Callable[[Any], None]) -> None:
        self.module, self.attribute, self.function = module, attribute, function

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Only the one module is of interest; its own loader does the work."""
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenCall(spec.loader, self)
        return spec


class _LoaderThenCall(Loader):
    def __init__(self, loader: Loader, then: _AfterImport) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if nothing had been in between.
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then.function(getattr(module, self.then.attribute))
