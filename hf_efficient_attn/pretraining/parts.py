"""The two encoders of joint pretraining, of whatever family."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, ElectraConfig, ElectraForPreTraining
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..auto import TEXT_FAMILIES
from ..encoder.heads import ReplacedTokenHead
from ..encoder.inputs import as_bool_mask


_INPUTS = ("token_type_ids", "position_ids", "global_attention_mask", "document_ids")


class BackboneDetector(ReplacedTokenHead):
    """ELECTRA's head on an encoder of transformers for which there is no class with such a head."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        config = backbone.config
        act = getattr(config, "hidden_act", None) or getattr(config, "activation", "gelu")
        super().__init__(config.hidden_size, config.hidden_size, act)
        self.backbone = backbone

    @property
    def base_model(self) -> PreTrainedModel:
        """The encoder."""
        return self.backbone

    @property
    def config(self) -> PreTrainedConfig:
        """The encoder's."""
        return self.backbone.config

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """The encoder's inputs -> logits `[batch, length]`."""
        return (super().forward(self.backbone(**inputs)[0]),)


def detector_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class with a replaced-token head for this config; None where transformers' encoder has none."""
    family = TEXT_FAMILIES.get(config.model_type)
    if family is not None:
        return getattr(family.module("modeling"), family.detector_name)
    return ElectraForPreTraining if isinstance(config, ElectraConfig) else None


def check_encoder(name: str, config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a config of something else than an encoder with a masked-LM head."""
    if type(config) not in AutoModelForMaskedLM._model_mapping or config.is_encoder_decoder:
        raise ValueError(
            f"the {name} is a {type(config).__name__}, which is no encoder with a class for masked language modelling; "
            "joint pretraining takes encoders that have one, such as BERT, RoBERTa, ELECTRA and those of this package."
        )


def make_masked_lm(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """A new encoder with a masked-LM head; `name` says for which part, in errors."""
    check_encoder(name, config)
    return AutoModelForMaskedLM.from_config(config)


def make_detector(config: PreTrainedConfig, source: str | os.PathLike | None = None) -> nn.Module:
    """An encoder with a replaced-token head: a new one, or that of the folder or Hub name `source`."""
    check_encoder("discriminator", config)
    own = detector_class(config)
    if own is not None:
        return own._from_config(config) if source is None else own.from_pretrained(source)
    # A pooler would never get a gradient.
    known = inspect.signature(AutoModel._model_mapping[type(config)].__init__).parameters
    options = {"add_pooling_layer": False} if "add_pooling_layer" in known else {}
    if source is None:
        return BackboneDetector(AutoModel.from_config(config, **options))
    return BackboneDetector(AutoModel.from_pretrained(source, **options))


def inputs_for(model: nn.Module, given: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Those of the optional inputs that are given and that `model` takes.

    Token types are left out where an encoder has none; raises `ValueError` for anything else that would be ignored.
    """
    target = model.backbone if isinstance(model, BackboneDetector) else model
    known = inspect.signature(target.forward).parameters
    taken = {}
    for name in _INPUTS:
        if given.get(name) is None:
            continue
        if name in known:
            taken[name] = given[name]
        elif name != "token_type_ids":
            raise ValueError(f"{type(target).__name__} takes no {name}; leave it out, or choose another encoder.")
    return taken


@contextmanager
def only_at(base: nn.Module, mask: Tensor) -> Iterator[list[Tensor]]:
    """Within, the encoder `base` gives its last states at `mask` `[batch, length]` alone, `[1, tokens, hidden]`.

    So the head around it computes logits of these tokens only. The list that comes with it receives these states.
    """
    picked: list[Tensor] = []

    def pick(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0][mask][None]
        picked.append(states)
        if isinstance(output, tuple):
            return (states, *output[1:])
        output["last_hidden_state"] = states
        return output

    handle = base.register_forward_hook(pick)
    try:
        yield picked
    finally:
        handle.remove()


def logits_at(model: PreTrainedModel, mask: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[tokens, vocab_size]` and last states `[tokens, hidden]` of a masked-LM `model` at `mask` alone."""
    with only_at(model.base_model, mask) as states:
        logits = model(**inputs, return_dict=True).logits
    return logits[0], states[0][0]


def padding_mask(ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Bool `[batch, length]`, True at tokens; without a mask padding is where the pad id stands."""
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool) if pad_token_id is None else ids != pad_token_id
    return as_bool_mask("attention_mask", attention_mask, *ids.shape)
