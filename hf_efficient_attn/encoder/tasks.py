"""The task heads' forward passes. A family mixes one with its `EffPreTrainedModel` and names base model and head shape.

```
class EffXForSequenceClassification(ForSequenceClassification, EffXPreTrainedModel):
    base_class, head_class = EffXModel, PooledClassificationHead
```
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .activations import head_activation
from .configuration import EffEncoderConfig
from .losses import choice_loss, sequence_classification_loss, span_loss, token_loss
from .packing import refuse_documents
from .task_model import TaskModel


class ForSequenceClassification(TaskModel):
    """Classifies or scores whole texts: single label, multi-label or regression (`config.problem_type`)."""

    task = "sequence-classification"

    def _needs_pooler(self) -> bool:
        return self.head_class.reads_pooler

    def _add_head(self, config: EffEncoderConfig) -> None:
        self.classifier = self.head_class(config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Inputs as in the base model; `labels` as in `sequence_classification_loss`.

        Returns:
            `logits` `[batch, num_labels]`, and `loss` if there are labels.
        """
        refuse_documents(kwargs, type(self).__name__, "it gives one result a row")
        outputs = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            global_attention_mask,
            **kwargs,
            return_dict=True,
        )
        logits = self.classifier(self._text_state(outputs, input_ids, attention_mask, self.head_class.reads_pooler))
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForTokenClassification(TaskModel):
    """Classifies each token."""

    task = "token-classification"
    accepts_loss_kwargs = True

    def _add_head(self, config: EffEncoderConfig) -> None:
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.output_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Inputs as in the base model; `labels` `[batch, length]` classes, -100 where there is none.

        Returns:
            `logits` `[batch, length, num_labels]`, and `loss` if there are labels.
        """
        outputs = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            global_attention_mask,
            document_ids=document_ids,
            **kwargs,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else token_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForQuestionAnswering(TaskModel):
    """Marks the start and end of an answer in the input."""

    task = "question-answering"

    def _add_head(self, config: EffEncoderConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels = {config.num_labels}: question answering has two outputs, start and end; "
                "use num_labels=2."
            )
        self.add_span_head(config)

    def add_span_head(self, config: EffEncoderConfig) -> None:
        """The layers that score starts and ends."""
        self.qa_outputs = nn.Linear(config.output_size, 2)

    def token_types(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> Tensor | None:
        """The token types to use; a family may have some where none are given."""
        return token_type_ids

    def span_logits(self, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Scores of starts and ends, `[batch, length, 2]`."""
        return self.qa_outputs(hidden_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Inputs as in the base model; `start_positions` and `end_positions` `[batch]`, ignored past the input.

        Returns:
            `start_logits` and `end_logits` `[batch, length]`, the most negative number at padding, and `loss` if there
            are positions.
        """
        refuse_documents(kwargs, type(self).__name__, "it marks one answer a row")
        types = self.token_types(input_ids, attention_mask, token_type_ids)
        outputs = self.base_model(
            input_ids,
            attention_mask,
            types,
            position_ids,
            inputs_embeds,
            global_attention_mask,
            **kwargs,
            return_dict=True,
        )
        logits = self.span_logits(outputs.last_hidden_state, input_ids, attention_mask)
        keep = self.base_model.key_padding_mask(input_ids, attention_mask, logits.shape[:2])
        if keep is not None:
            # An answer never stands in padding, and the loss must not depend on how much of it there is.
            logits = logits.masked_fill(~keep[:, :, None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(dim=-1)
        if (start_positions is None) != (end_positions is None):
            raise ValueError("start_positions and end_positions belong together, got only one of them.")
        loss = None
        if start_positions is not None:
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, keep)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForMultipleChoice(TaskModel):
    """Picks one of several continuations."""

    task = "multiple-choice"
    reads_pooler: ClassVar[bool] = True
    """Whether the first token goes through the pooler; else through `pre_classifier` and ReLU, as in Nystromformer."""

    def _needs_pooler(self) -> bool:
        return self.reads_pooler

    def _add_head(self, config: EffEncoderConfig) -> None:
        if not self.reads_pooler:
            self.pre_classifier = nn.Linear(config.output_size, config.hidden_size)
            self.activate = head_activation(config.head_act, torch.relu)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def choice_scores(self, state: Tensor) -> Tensor:
        """The score of each text, `[texts, 1]`, from its `state` `[texts, hidden]`."""
        if not self.reads_pooler:
            state = self.activate(self.pre_classifier(state))
        return self.classifier(self.dropout(state))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput:
        """Inputs as in the base model with a dimension more, `[batch, choices, length]`; `labels` `[batch]`.

        Returns:
            `logits` `[batch, choices]`, and `loss` if there are labels.
        """
        refuse_documents(kwargs, type(self).__name__, "each choice is one text in a row of its own")
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or given.dim() != (3 if input_ids is not None else 4):
            shape = None if given is None else list(given.shape)
            raise ValueError(f"multiple choice takes input_ids [batch, choices, length], got shape {shape}.")
        choices, shape = given.shape[1], tuple(given.shape[:3])
        masks = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "global_attention_mask": global_attention_mask,
        }
        for name, mask in masks.items():
            if mask is not None and tuple(mask.shape) != shape:
                raise ValueError(
                    f"{name} must be [batch, choices, length] = {list(shape)}, got shape {list(mask.shape)}."
                )
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, global_attention_mask)
        flat = [None if x is None else x.flatten(0, 1) for x in inputs]
        outputs = self.base_model(*flat, **kwargs, return_dict=True)
        state = self._text_state(outputs, *flat[:2], self.reads_pooler)
        logits = self.choice_scores(state).view(-1, choices)
        loss = None if labels is None else choice_loss(logits, labels)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
