"""EffReformer classes: reversible layers around LSH and local attention, with the published parameter names."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...attention.base import SelfAttention
from ...attention.local import LocalSelfAttention
from ...attention.lsh import LSHSelfAttention, lsh_layers
from ...encoder.axial import AxialEmbeddings, AxialPositionEmbeddings
from ...encoder.causal_lm import ForCausalLM
from ...encoder.heads import DenseClassificationHead, PlainLMHead
from ...encoder.model import EffEncoderModel, EffPreTrainedModel
from ...encoder.pretraining_tasks import ForMaskedLM, ForReplacedTokenDetection
from ...encoder.reversible_layer import ReversibleEncoder
from ...encoder.tasks import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .configuration_eff_reformer import EffReformerConfig


class EffReformerPreTrainedModel(EffPreTrainedModel):
    """What all EffReformer classes share."""

    config_class = EffReformerConfig
    base_model_prefix = "reformer"
    _no_split_modules = ["ReversibleLayer"]
    _can_record_outputs = ReversibleEncoder.recorded
    # Tokens that are tried and taken back would sort the others differently: transformers refuses assisted generation.
    _is_stateful = True
    # Masks that transformers' Reformer kept as buffers, and the bias under the name that it had once.
    _keys_to_ignore_on_load_unexpected = [r"mask_value_float(16|32)$", r"lm_head\.(decoder\.)?bias$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AxialPositionEmbeddings):
            for weight in module.weights:
                init.normal_(weight, std=self.config.axial_norm_std)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # transformers goes by the class name; the cache is made by `ForCausalLM` anyway.
        return True

    def redraw_rotations_(self, count: int) -> None:
        """Use the hash directions after `count` redraws in all LSH layers; 0 gives the first ones.

        They are a pure function of `config.hash_seed`, the layer, the round and `count`. A cache from before is of no
        use afterwards.
        """
        for layer in lsh_layers(self):
            layer.redraw_(count)


class EffReformerModel(EffEncoderModel, EffReformerPreTrainedModel):
    """Reformer (Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451): LSH and local attention in reversible layers.

    Equal to transformers' `ReformerModel` for equal weights and hash directions where that one goes by the text alone:
    there the bucket count, the chunk before the first, and the length that training takes depend on the padded length.
    `last_hidden_state` is `[batch, length, 2 * hidden_size]`, both streams; `hidden_states` are of the second stream,
    `[batch, length, hidden_size]`. There is no pooler.
    """

    embeddings_class = AxialEmbeddings
    encoder_class = ReversibleEncoder
    # The last states are no layer's output, of which `hidden_states` are.
    forward = merge_with_config_defaults(
        capture_outputs(inspect.unwrap(EffEncoderModel.forward), tie_last_hidden_states=False)
    )

    def __init__(self, config: EffReformerConfig, add_pooling_layer: bool = False, task: str | None = None) -> None:
        super().__init__(config, add_pooling_layer, task)

    @staticmethod
    def attention_class(config: EffReformerConfig, layer_idx: int) -> SelfAttention:
        """The layer's kind of attention."""
        kinds = {"local": LocalSelfAttention, "lsh": LSHSelfAttention}
        return kinds[config.layer_kind(layer_idx)](config, layer_idx)

    def encode(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None,
        context: dict[str, Any],
        wants_weights: bool,
        overwrite: bool = False,
    ) -> Tensor:
        """See `EffEncoderModel.encode`; weights that are recorded have to be kept."""
        return self.encoder(hidden_states, key_padding_mask, reverse=not wants_weights, **context)


class EffReformerForMaskedLM(ForMaskedLM, EffReformerPreTrainedModel):
    """EffReformer that predicts masked tokens."""

    base_class, head_class = EffReformerModel, PlainLMHead


class EffReformerForCausalLM(ForCausalLM, EffReformerPreTrainedModel, GenerationMixin):
    """EffReformer that continues texts."""

    base_class, head_class = EffReformerModel, PlainLMHead


class EffReformerForReplacedTokenDetection(ForReplacedTokenDetection, EffReformerPreTrainedModel):
    """EffReformer that tells which tokens are not the original ones, as ELECTRA's discriminator."""

    base_class = EffReformerModel


class EffReformerForSequenceClassification(ForSequenceClassification, EffReformerPreTrainedModel):
    """EffReformer that classifies texts."""

    base_class, head_class = EffReformerModel, DenseClassificationHead


class EffReformerForTokenClassification(ForTokenClassification, EffReformerPreTrainedModel):
    """EffReformer that classifies tokens."""

    base_class = EffReformerModel


class EffReformerForQuestionAnswering(ForQuestionAnswering, EffReformerPreTrainedModel):
    """EffReformer that marks an answer."""

    base_class = EffReformerModel


class EffReformerForMultipleChoice(ForMultipleChoice, EffReformerPreTrainedModel):
    """EffReformer that picks a continuation."""

    base_class, reads_pooler = EffReformerModel, False


__all__ = [
    "EffReformerForCausalLM",
    "EffReformerForMaskedLM",
    "EffReformerForMultipleChoice",
    "EffReformerForQuestionAnswering",
    "EffReformerForReplacedTokenDetection",
    "EffReformerForSequenceClassification",
    "EffReformerForTokenClassification",
    "EffReformerModel",
    "EffReformerPreTrainedModel",
]
