"""EffNystromformer classes: the encoder frame around Nyström attention, with the published parameter names."""

from typing import Any

from torch import Tensor

from ...attention.nystromformer import NystromformerSelfAttention
from ...encoder.heads import ActivatedClassificationHead, BertLMHead
from ...encoder.model import EffEncoderModel, EffPreTrainedModel
from ...encoder.pretraining_tasks import ForMaskedLM, ForReplacedTokenDetection
from ...encoder.tasks import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .configuration_eff_nystromformer import EffNystromformerConfig


class EffNystromformerPreTrainedModel(EffPreTrainedModel):
    """What all EffNystromformer classes share."""

    config_class = EffNystromformerConfig
    base_model_prefix = "nystromformer"


class EffNystromformerModel(EffEncoderModel, EffNystromformerPreTrainedModel):
    """Nystromformer encoder (Xiong et al. 2021, arXiv 2102.03902): landmarks and a convolution of the values.

    Equal to transformers' `NystromformerModel` for equal weights where that one works: without padding, one example at
    a time, at the one length `segment_means_seq_len`. Here any length works, and segments are of each example's own
    tokens. Published models have no pooler.
    """

    attention_class = NystromformerSelfAttention

    def __init__(
        self, config: EffNystromformerConfig, add_pooling_layer: bool = False, task: str | None = None
    ) -> None:
        super().__init__(config, add_pooling_layer, task)

    def encode(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None,
        context: dict[str, Any],
        wants_weights: bool,
        overwrite: bool = False,
    ) -> Tensor:
        """With the segments of the landmarks, which are those of the tokens in every layer."""
        layers = self.encoder.attentions()
        if "documents" not in context and NystromformerSelfAttention.are_alike(layers):
            context = {**context, "segments": layers[0].segments(hidden_states, key_padding_mask)}
        return super().encode(hidden_states, key_padding_mask, context, wants_weights, overwrite)


class EffNystromformerForMaskedLM(ForMaskedLM, EffNystromformerPreTrainedModel):
    """EffNystromformer that predicts masked tokens."""

    base_class, head_class = EffNystromformerModel, BertLMHead


class EffNystromformerForReplacedTokenDetection(ForReplacedTokenDetection, EffNystromformerPreTrainedModel):
    """EffNystromformer that tells which tokens are not the original ones, as ELECTRA's discriminator."""

    base_class = EffNystromformerModel


class EffNystromformerForSequenceClassification(ForSequenceClassification, EffNystromformerPreTrainedModel):
    """EffNystromformer that classifies texts."""

    base_class, head_class = EffNystromformerModel, ActivatedClassificationHead


class EffNystromformerForTokenClassification(ForTokenClassification, EffNystromformerPreTrainedModel):
    """EffNystromformer that classifies tokens."""

    base_class = EffNystromformerModel


class EffNystromformerForQuestionAnswering(ForQuestionAnswering, EffNystromformerPreTrainedModel):
    """EffNystromformer that marks an answer."""

    base_class = EffNystromformerModel


class EffNystromformerForMultipleChoice(ForMultipleChoice, EffNystromformerPreTrainedModel):
    """EffNystromformer that picks a continuation."""

    base_class, reads_pooler = EffNystromformerModel, False


__all__ = [
    "EffNystromformerForMaskedLM",
    "EffNystromformerForMultipleChoice",
    "EffNystromformerForQuestionAnswering",
    "EffNystromformerForReplacedTokenDetection",
    "EffNystromformerForSequenceClassification",
    "EffNystromformerForTokenClassification",
    "EffNystromformerModel",
    "EffNystromformerPreTrainedModel",
]
