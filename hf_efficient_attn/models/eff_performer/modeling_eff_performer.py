"""EffPerformer classes: the encoder frame around Performer attention, with BERT's parameter names."""

from typing import Any

from transformers.generation import GenerationMixin

from ...attention.performer import PerformerSelfAttention, performer_layers
from ...encoder.causal_lm import ForCausalLM
from ...encoder.heads import BertLMHead, PooledClassificationHead
from ...encoder.model import EffEncoderModel, EffPreTrainedModel
from ...encoder.pretraining_tasks import ForMaskedLM, ForReplacedTokenDetection
from ...encoder.tasks import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .configuration_eff_performer import EffPerformerConfig


# RoBERTa's names -> BERT's, for what both have.
_ROBERTA_NAMES = {
    r"^roberta\.": "bert.",
    r"^lm_head\.dense\.": "cls.predictions.transform.dense.",
    r"^lm_head\.layer_norm\.": "cls.predictions.transform.LayerNorm.",
    r"^lm_head\.decoder\.": "cls.predictions.decoder.",
    r"^lm_head\.bias": "cls.predictions.bias",
}


class EffPerformerPreTrainedModel(EffPreTrainedModel):
    """What all EffPerformer classes share."""

    config_class = EffPerformerConfig
    base_model_prefix = "bert"
    _is_stateful = True  # no token can be taken back: transformers refuses assisted generation

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """As in transformers; weights of BERT and RoBERTa load by name, RoBERTa's under BERT's names.

        Their encoders and heads load, but for RoBERTa's head of sequence classification; projections are drawn, and
        transformers reports them as new. The outputs are an estimate of the original's: train before use.
        """
        loaded = super().from_pretrained(*args, key_mapping={**_ROBERTA_NAMES, **(key_mapping or {})}, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Otherwise saving would go back to the names that were read.
        model._weight_conversions = []
        return loaded

    def redraw_projections_(self, count: int) -> None:
        """Replace the random projections of all layers by those after `count` redraws; 0 gives the first ones.

        They are a pure function of `config.projection_seed`, the layer and `count`. A cache from before is of no use
        afterwards.
        """
        for layer in performer_layers(self):
            layer.redraw_(count)


class EffPerformerModel(EffEncoderModel, EffPerformerPreTrainedModel):
    """Performer encoder (Choromanski et al. 2020, arXiv 2009.14794): attention through random features."""

    attention_class = PerformerSelfAttention


class EffPerformerForMaskedLM(ForMaskedLM, EffPerformerPreTrainedModel):
    """EffPerformer that predicts masked tokens."""

    base_class, head_class = EffPerformerModel, BertLMHead


class EffPerformerForCausalLM(ForCausalLM, EffPerformerPreTrainedModel, GenerationMixin):
    """EffPerformer that continues texts, with a state of constant size in place of a cache that grows."""

    base_class, head_class = EffPerformerModel, BertLMHead


class EffPerformerForReplacedTokenDetection(ForReplacedTokenDetection, EffPerformerPreTrainedModel):
    """EffPerformer that tells which tokens are not the original ones, as ELECTRA's discriminator."""

    base_class = EffPerformerModel


class EffPerformerForSequenceClassification(ForSequenceClassification, EffPerformerPreTrainedModel):
    """EffPerformer that classifies texts."""

    base_class, head_class = EffPerformerModel, PooledClassificationHead


class EffPerformerForTokenClassification(ForTokenClassification, EffPerformerPreTrainedModel):
    """EffPerformer that classifies tokens."""

    base_class = EffPerformerModel


class EffPerformerForQuestionAnswering(ForQuestionAnswering, EffPerformerPreTrainedModel):
    """EffPerformer that marks an answer."""

    base_class = EffPerformerModel


class EffPerformerForMultipleChoice(ForMultipleChoice, EffPerformerPreTrainedModel):
    """EffPerformer that picks a continuation."""

    base_class = EffPerformerModel


__all__ = [
    "EffPerformerForCausalLM",
    "EffPerformerForMaskedLM",
    "EffPerformerForMultipleChoice",
    "EffPerformerForQuestionAnswering",
    "EffPerformerForReplacedTokenDetection",
    "EffPerformerForSequenceClassification",
    "EffPerformerForTokenClassification",
    "EffPerformerModel",
    "EffPerformerPreTrainedModel",
]
