"""EffElectra classes: the encoder frame around an attention of choice, with the published parameter names."""

from collections.abc import Callable

from torch import Tensor, nn

from ...attention.named import named_attention
from ...encoder.activations import activation, head_activation
from ...encoder.configuration import EffEncoderConfig
from ...encoder.heads import DenseClassificationHead
from ...encoder.model import EffEncoderModel, EffPreTrainedModel
from ...encoder.pretraining_tasks import ForMaskedLM, ForReplacedTokenDetection
from ...encoder.tasks import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .configuration_eff_electra import EffElectraConfig


class EffElectraPreTrainedModel(EffPreTrainedModel):
    """What all EffElectra classes share."""

    config_class = EffElectraConfig
    base_model_prefix = "electra"


class EffElectraModel(EffEncoderModel, EffElectraPreTrainedModel):
    """ELECTRA's encoder (Clark et al. 2020, arXiv 2003.10555): BERT with narrow embeddings that are projected.

    Equal to transformers' `ElectraModel` for equal weights, whose folders it loads; there padding on the left moves
    positions, here it changes nothing. With `config.attention` any mechanism of the package takes the place of softmax
    attention. Published models have no pooler.
    """

    attention_class = staticmethod(named_attention)

    def __init__(self, config: EffElectraConfig, add_pooling_layer: bool = False, task: str | None = None) -> None:
        super().__init__(config, add_pooling_layer, task)


class ElectraTransform(nn.Module):
    """`generator_predictions`: dense, gelu, LayerNorm, back to the width of the embeddings."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.activate = head_activation(config.head_act, nn.functional.gelu)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, embedding_size]`."""
        return self.LayerNorm(self.activate(self.dense(hidden_states)))


class EffElectraForMaskedLM(ForMaskedLM, EffElectraPreTrainedModel):
    """EffElectra that predicts masked tokens: ELECTRA's generator. Its two layers stand beside each other."""

    base_class = EffElectraModel
    _tied_weights_keys = {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"}

    def _add_head(self, config: EffEncoderConfig) -> None:
        self.generator_predictions = ElectraTransform(config)
        self.generator_lm_head = nn.Linear(config.embedding_size or config.hidden_size, config.vocab_size)

    def token_logits(self, hidden_states: Tensor) -> Tensor:
        """See `LanguageModel.token_logits`."""
        return self.generator_lm_head(self.generator_predictions(hidden_states))

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.generator_lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the vocabulary projection."""
        self.generator_lm_head = new_embeddings


class EffElectraForPreTraining(ForReplacedTokenDetection, EffElectraPreTrainedModel):
    """EffElectra that tells which tokens are not the original ones: ELECTRA's discriminator."""

    base_class = EffElectraModel


class ElectraClassificationHead(DenseClassificationHead):
    """ELECTRA's `classifier`: as RoBERTa's, with gelu in place of tanh."""

    @staticmethod
    def published_activation(config: EffEncoderConfig) -> Callable:
        """See `DenseClassificationHead.published_activation`."""
        return nn.functional.gelu


class EffElectraForSequenceClassification(ForSequenceClassification, EffElectraPreTrainedModel):
    """EffElectra that classifies texts."""

    base_class, head_class = EffElectraModel, ElectraClassificationHead


class EffElectraForTokenClassification(ForTokenClassification, EffElectraPreTrainedModel):
    """EffElectra that classifies tokens."""

    base_class = EffElectraModel


class EffElectraForQuestionAnswering(ForQuestionAnswering, EffElectraPreTrainedModel):
    """EffElectra that marks an answer."""

    base_class = EffElectraModel


class ElectraSummary(nn.Module):
    """`sequence_summary`: dense, activation and dropout on the state of the first token."""

    def __init__(self, config: EffElectraConfig) -> None:
        super().__init__()
        self.summary = nn.Linear(config.hidden_size, config.hidden_size) if config.summary_use_proj else nn.Identity()
        self.activation = activation(config.summary_activation) if config.summary_activation else nn.Identity()
        self.dropout = nn.Dropout(float(config.summary_last_dropout))

    def forward(self, first_token: Tensor) -> Tensor:
        """`[batch, hidden]` -> `[batch, hidden]`."""
        return self.dropout(self.activation(self.summary(first_token)))


class EffElectraForMultipleChoice(ForMultipleChoice, EffElectraPreTrainedModel):
    """EffElectra that picks a continuation."""

    base_class, reads_pooler = EffElectraModel, False

    def _add_head(self, config: EffElectraConfig) -> None:
        self.sequence_summary = ElectraSummary(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def choice_scores(self, state: Tensor) -> Tensor:
        """See `ForMultipleChoice.choice_scores`."""
        return self.classifier(self.sequence_summary(state))


__all__ = [
    "EffElectraForMaskedLM",
    "EffElectraForMultipleChoice",
    "EffElectraForPreTraining",
    "EffElectraForQuestionAnswering",
    "EffElectraForSequenceClassification",
    "EffElectraForTokenClassification",
    "EffElectraModel",
    "EffElectraPreTrainedModel",
]
