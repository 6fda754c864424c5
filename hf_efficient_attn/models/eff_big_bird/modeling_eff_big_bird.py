"""EffBigBird classes: the encoder frame around BigBird attention, with the published parameter names."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...attention.big_bird import BigBirdSelfAttention
from ...encoder.activations import head_activation
from ...encoder.configuration import EffEncoderConfig
from ...encoder.heads import ActivatedClassificationHead, BertLMHead
from ...encoder.layer import Intermediate, Output
from ...encoder.model import EffEncoderModel, EffPreTrainedModel
from ...encoder.pretraining_tasks import ForMaskedLM, ForPreTraining, ForReplacedTokenDetection
from ...encoder.tasks import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from .configuration_eff_big_bird import EffBigBirdConfig


class EffBigBirdPreTrainedModel(EffPreTrainedModel):
    """What all EffBigBird classes share."""

    config_class = EffBigBirdConfig
    base_model_prefix = "bert"


class EffBigBirdModel(EffEncoderModel, EffBigBirdPreTrainedModel):
    """BigBird encoder (Zaheer et al. 2020, arXiv 2007.14062): window, global and random blocks.

    Equal to transformers' `BigBirdModel` for equal weights and equal random blocks on inputs without padding, whose
    folders it loads. It differs where that one depends on padding, on the length or on what it has seen before: blocks
    are counted in each example's own tokens, random blocks are the same in training and evaluation, and a short input
    never turns the model into one of full attention (`attention_type="original_full"` does).

    With `num_global_tokens` (extended form, ETC) as many learned tokens stand before the text in every layer; outputs
    have the caller's length all the same, only attention weights count them, as the first ones.
    """

    attention_class = BigBirdSelfAttention

    @staticmethod
    def pooler_class(config: EffBigBirdConfig) -> nn.Module:
        """The linear map itself stands under the name `pooler`, as published."""
        return nn.Linear(config.hidden_size, config.hidden_size)

    def pool(self, first_token: Tensor) -> Tensor:
        """See `EffEncoderModel.pool`."""
        return self.activate(self.pooler(first_token))

    def add_parts(self, config: EffBigBirdConfig) -> None:
        """The global tokens of the extended form, and the pooler's activation."""
        count = config.num_global_tokens
        self.activate = head_activation(config.head_act, torch.tanh)
        self.global_embeddings = nn.Embedding(count, config.hidden_size) if count > 0 else None

    def encode(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None,
        context: dict[str, Any],
        wants_weights: bool,
        overwrite: bool = False,
    ) -> Tensor:
        """With the global tokens in front, which are cut off again."""
        if self.global_embeddings is None:
            context = self._with_plans(context, key_padding_mask, hidden_states)
            return super().encode(hidden_states, key_padding_mask, context, wants_weights, overwrite)
        count = self.config.num_global_tokens
        front = self.global_embeddings(torch.arange(count, device=hidden_states.device))
        front = front.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        if "documents" in context:
            # Each document has its own.
            front = front.repeat(1, context["documents"].most, 1)
            context = {"documents": context["documents"].with_prefix(count)}
        if key_padding_mask is not None:
            key_padding_mask = nn.functional.pad(key_padding_mask, (count, 0), value=True)
        hidden_states = torch.cat([front, hidden_states], dim=1)
        context = self._with_plans(context, key_padding_mask, hidden_states)
        states = super().encode(hidden_states, key_padding_mask, context, wants_weights, overwrite)
        return states[:, front.shape[1] :]

    def _with_plans(
        self, context: dict[str, Any], key_padding_mask: Tensor | None, hidden_states: Tensor
    ) -> dict[str, Any]:
        """`context` with what all layers attend: to draw blocks for each on its own takes as long as short texts do."""
        layers = self.encoder.attentions()
        if "documents" in context or not BigBirdSelfAttention.are_alike(layers):
            return context
        plan = layers[0].plan(key_padding_mask, hidden_states.shape[1], hidden_states.device, len(layers))
        return {**context, "block_plans": plan.by_layer(len(layers))}

    @wraps(EffEncoderModel.forward)
    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        """See `EffEncoderModel.forward`."""
        outputs = super().forward(*args, return_dict=True, **kwargs)
        if outputs.hidden_states is not None:
            length = outputs.last_hidden_state.shape[1]
            outputs.hidden_states = tuple(x[:, x.shape[1] - length :] for x in outputs.hidden_states)
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


class EffBigBirdForPreTraining(ForPreTraining, EffBigBirdPreTrainedModel):
    """EffBigBird that predicts masked tokens and whether the second text continues the first."""

    base_class, head_class = EffBigBirdModel, BertLMHead


class EffBigBirdForMaskedLM(ForMaskedLM, EffBigBirdPreTrainedModel):
    """EffBigBird that predicts masked tokens."""

    base_class, head_class = EffBigBirdModel, BertLMHead


class EffBigBirdForReplacedTokenDetection(ForReplacedTokenDetection, EffBigBirdPreTrainedModel):
    """EffBigBird that tells which tokens are not the original ones, as ELECTRA's discriminator."""

    base_class = EffBigBirdModel


class EffBigBirdForSequenceClassification(ForSequenceClassification, EffBigBirdPreTrainedModel):
    """EffBigBird that classifies texts."""

    base_class, head_class = EffBigBirdModel, ActivatedClassificationHead


class EffBigBirdForTokenClassification(ForTokenClassification, EffBigBirdPreTrainedModel):
    """EffBigBird that classifies tokens."""

    base_class = EffBigBirdModel


class BigBirdSpanHead(nn.Module):
    """A feed-forward layer of its own before the two outputs."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, 2]`."""
        inner = self.intermediate(self.dropout(hidden_states))
        return self.qa_outputs(self.output(inner, hidden_states))


class EffBigBirdForQuestionAnswering(ForQuestionAnswering, EffBigBirdPreTrainedModel):
    """EffBigBird that marks an answer.

    As published: where `input_ids` are given, the question is what stands up to the first separator; its tokens but the
    first are no answer, and without `token_type_ids` it has type 0 and what follows type 1. Not so with
    `config.plain_span_head`.
    """

    base_class = EffBigBirdModel

    def add_span_head(self, config: EffEncoderConfig) -> None:
        """The published layers, or one."""
        if config.plain_span_head:
            super().add_span_head(config)
        else:
            self.qa_classifier = BigBirdSpanHead(config)

    def _question(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which tokens are the question, its separator included, and which is the first: bool `[batch, length]`."""
        keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        rank = keep.long().cumsum(dim=1)
        is_separator = (input_ids == self.config.sep_token_id) & keep
        first = (rank == 1) & keep
        before = is_separator.long().cumsum(dim=1) - is_separator.long() == 0
        has_one = is_separator.any(dim=1, keepdim=True)
        # Without a separator the question is the first token alone. No choice by `where`, which ONNX Runtime has not
        # for bool.
        return (has_one & before & keep) | (~has_one & first), first

    def token_types(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> Tensor | None:
        """0 for the question and 1 for the rest, where none are given."""
        given = token_type_ids is not None or input_ids is None
        if given or self.config.type_vocab_size < 2 or self.config.plain_span_head:
            return token_type_ids
        return (~self._question(input_ids, attention_mask)[0]).long()

    def span_logits(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """`[batch, length, 2]`, far below all others in the question."""
        if self.config.plain_span_head:
            return super().span_logits(hidden_states, input_ids, attention_mask)
        logits = self.qa_classifier(hidden_states)
        if input_ids is None:
            return logits
        question, first = self._question(input_ids, attention_mask)
        far = min(1e6, torch.finfo(logits.dtype).max / 4)
        return torch.where((question & ~first)[:, :, None], logits - far, logits)


class EffBigBirdForMultipleChoice(ForMultipleChoice, EffBigBirdPreTrainedModel):
    """EffBigBird that picks a continuation."""

    base_class = EffBigBirdModel


__all__ = [
    "EffBigBirdForMaskedLM",
    "EffBigBirdForMultipleChoice",
    "EffBigBirdForPreTraining",
    "EffBigBirdForQuestionAnswering",
    "EffBigBirdForReplacedTokenDetection",
    "EffBigBirdForSequenceClassification",
    "EffBigBirdForTokenClassification",
    "EffBigBirdModel",
    "EffBigBirdPreTrainedModel",
]
