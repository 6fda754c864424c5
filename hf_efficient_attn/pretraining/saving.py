"""From folders of a generator and a discriminator to a joint model, and back."""

import copy
import os
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, ElectraConfig
from transformers.modeling_utils import PreTrainedModel

from ..encoder.publishing import PublishedModel
from .configuration_eff_electra_joint import DETECTING, EffElectraJointConfig
from .parts import BackboneDetector, make_detector


# What transformers' ELECTRA cannot hold, with the value it has there.
_STOCK_ELECTRA = {
    "attention": "softmax",
    "norm_position": "post",
    "position_offset": 0,
    "rescale_embeddings": False,
}


class PairFolders:
    """Loading and saving of the two models of a joint one."""

    @classmethod
    def from_pretrained_pair(
        cls,
        generator: str | os.PathLike | PreTrainedModel,
        discriminator: str | os.PathLike | PreTrainedModel,
        **options: Any,
    ) -> Any:
        """A joint model that goes on from two published or saved models.

        Args:
            generator: folder, Hub name or model with a masked-LM head.
            discriminator: folder, Hub name or model; where it has no head for replaced tokens, that is new.
            options: fields of `EffElectraJointConfig`, such as `sharing` and `objective`.

        Raises:
            ValueError: models that do not fit each other, or weights that `sharing` ties and that differ.

        Example:

        ```python
        >>> pair = "google/electra-base-generator", "google/electra-base-discriminator"
        >>> model = EffElectraForJointPreTraining.from_pretrained_pair(*pair)
        ```
        """
        first, second = generator, discriminator
        if not isinstance(first, PreTrainedModel):
            first = AutoModelForMaskedLM.from_pretrained(first)
        if not isinstance(second, PreTrainedModel | BackboneDetector):
            detects = options.get("objective", DETECTING[0]) in DETECTING
            if detects:
                second = make_detector(AutoConfig.from_pretrained(second), second)
            else:
                second = AutoModelForMaskedLM.from_pretrained(second)
        # Copies: what becomes of the joint model must not change the models that were given.
        configs = {"generator": copy.deepcopy(first.config), "discriminator": copy.deepcopy(second.config)}
        joint = cls(EffElectraJointConfig(**configs, **options))
        if len(dtypes := {x.dtype for x in (*first.parameters(), *second.parameters())}) == 1:
            joint.to(dtypes.pop())
        found = {**_named("generator", first), **_named("discriminator", second)}
        new = ("baseline.", "copy_head.")
        wanted = {name for name in joint.state_dict() if not name.startswith(new)}
        for name in sorted(wanted - found.keys()):
            raise ValueError(
                f"there is no {name!r} in what was given; give models of these classes: {_classes(joint)}."
            )
        for name in sorted(found.keys() - wanted):
            if "pooler." not in name:
                raise ValueError(f"{name!r} has no place here; give models of these classes: {_classes(joint)}.")
        for ours, theirs in joint._tied_weights_keys.items():
            if not found[ours].equal(found[theirs]):
                raise ValueError(
                    f"sharing = {joint.config.sharing!r}, but {ours} and {theirs} differ; these two were not trained "
                    "together: set sharing = 'none', or start from one of them."
                )
        joint.load_state_dict(found, strict=False)
        return joint

    def save_generator(self, path: str | os.PathLike, stock: bool = False, **options: Any) -> None:
        """Write the generator as a folder of its own class, for `AutoModelForMaskedLM`; the rest as below."""
        _save(self.generator, path, stock, options)

    def save_discriminator(self, path: str | os.PathLike, stock: bool = False, **options: Any) -> None:
        """Write the discriminator as a folder of its own class, to be fine-tuned like any other.

        EffElectra's folders load in transformers' ELECTRA classes as well, by their names. With `stock` they also say
        that they are ELECTRA, so that the Auto classes load transformers' own and nothing of this package is needed. An
        encoder of transformers without a class for replaced tokens is written without that head. `options` are those of
        `save_pretrained`, such as `self_contained`.

        Raises:
            ValueError: `stock` for a model that transformers' ELECTRA cannot hold; the message names the field.
        """
        _save(self.discriminator, path, stock, options)


def _classes(joint: Any) -> str:
    return f"{type(joint.generator).__name__} and {type(joint.discriminator).__name__}"


def _named(front: str, model: nn.Module) -> dict[str, Any]:
    return {f"{front}.{name}": weight for name, weight in model.state_dict().items()}


def _save(model: nn.Module, path: str | os.PathLike, stock: bool, options: dict[str, Any]) -> None:
    saved = model.base_model if isinstance(model, BackboneDetector) else model
    config = _stock_config(saved) if stock else None
    if stock and options.get("self_contained"):
        raise ValueError(
            "stock = True with self_contained = True: the stock form needs no code; leave one of them out."
        )
    saved.save_pretrained(path, **options)
    if config is not None:
        config.save_pretrained(path)
        if isinstance(saved, PublishedModel):
            saved.write_card(path)


def _stock_config(model: PreTrainedModel) -> ElectraConfig:
    """The config of transformers' ELECTRA for this model; raises `ValueError` where it cannot hold it."""
    config = model.config
    if config.model_type not in ("electra", "eff_electra"):
        raise ValueError(f"stock = True for a {type(config).__name__}: only ELECTRA has a stock form; leave it out.")
    for name, value in _STOCK_ELECTRA.items():
        if getattr(config, name, value) != value:
            raise ValueError(
                f"stock = True with {name} = {getattr(config, name)!r}: transformers' ELECTRA has {value!r} there; "
                "leave stock out."
            )
    fields = {name: getattr(config, name) for name in ElectraConfig.__dataclass_fields__ if hasattr(config, name)}
    fields["embedding_size"] = config.embedding_size or config.hidden_size
    fields["architectures"] = [type(model).__name__.removeprefix("Eff")]
    return ElectraConfig(**fields)
