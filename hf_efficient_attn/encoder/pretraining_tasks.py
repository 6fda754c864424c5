"""Forward passes of the heads that encoders are pretrained with: masked and replaced tokens, next sentences."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from .configuration import EffEncoderConfig
from .heads import ReplacedTokenHead
from .losses import next_sentence_loss, replaced_token_loss, token_loss
from .outputs import EffPreTrainingOutput, EffReplacedTokenOutput
from .task_model import TaskModel


class LanguageModel(TaskModel):
    """A head that predicts tokens, tied to the word embeddings where its shape allows."""

    accepts_loss_kwargs = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "head_class") and cls.head_class.ties_embeddings:
            decoder, words = f"{cls.head_class.projection}.decoder", "embeddings.word_embeddings.weight"
            cls._tied_weights_keys = {
                f"{decoder}.weight": f"{cls.base_model_prefix}.{words}",
                f"{decoder}.bias": f"{cls.head_class.projection}.bias",
            }

    def _add_head(self, config: EffEncoderConfig) -> None:
        setattr(self, self.head_class.attribute, self.head_class(config))

    @property
    def _head(self) -> nn.Module:
        return getattr(self, self.head_class.attribute)

    def token_logits(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, output_size]` -> `[batch, length, vocab_size]`."""
        return self._head(hidden_states)

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self._head.vocabulary.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the vocabulary projection and its bias."""
        self._head.vocabulary.set_decoder(new_embeddings)


class ForMaskedLM(LanguageModel):
    """Predicts masked tokens."""

    task = "masked-lm"

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
    ) -> MaskedLMOutput:
        """Inputs as in the base model; `labels` `[batch, length]` token ids, -100 where nothing is predicted.

        Returns:
            `logits` `[batch, length, vocab_size]`, and `loss` if there are labels.
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
        logits = self.token_logits(outputs.last_hidden_state)
        loss = None if labels is None else token_loss(logits, labels, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForPreTraining(ForMaskedLM):
    """Predicts masked tokens and whether the second text continues the first (BERT)."""

    task = "pretraining"
    accepts_loss_kwargs = False

    def _needs_pooler(self) -> bool:
        return True

    def _add_head(self, config: EffEncoderConfig) -> None:
        setattr(self, self.head_class.attribute, self.head_class(config, next_sentence=True))

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
        next_sentence_label: Tensor | None = None,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> EffPreTrainingOutput:
        """As `ForMaskedLM`, and `next_sentence_label` `[batch]` with 0 = continuation, 1 = random.

        With `document_ids`, documents take the place of the batch in what is about whole texts.

        Returns:
            `prediction_logits` `[batch, length, vocab_size]`, `seq_relationship_logits` `[batch, 2]`, and the sum of
            the losses whose labels were given.
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
        logits = self.token_logits(outputs.last_hidden_state)
        relationship = self._head.seq_relationship(outputs.pooler_output)
        losses = []
        if labels is not None:
            losses.append(token_loss(logits, labels))
        if next_sentence_label is not None:
            losses.append(next_sentence_loss(relationship, next_sentence_label))
        return EffPreTrainingOutput(
            loss=sum(losses) if losses else None,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ForReplacedTokenDetection(TaskModel):
    """Tells which tokens of a corrupted text are not the original ones: the discriminator of ELECTRA."""

    task = "replaced-token-detection"

    def _add_head(self, config: EffEncoderConfig) -> None:
        self.discriminator_predictions = ReplacedTokenHead(config.output_size, config.hidden_size, config.hidden_act)

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
    ) -> EffReplacedTokenOutput:
        """Inputs as in the base model; `labels` `[batch, length]`, 1 = replaced, 0 = original, -100 ignored.

        Returns:
            `logits` `[batch, length]`, and `loss` over all attended tokens if there are labels.
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
        logits = self.discriminator_predictions(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            if document_ids is None:
                keep = self.base_model.key_padding_mask(input_ids, attention_mask, logits.shape)
            else:
                keep = document_ids > 0
            loss = replaced_token_loss(logits, labels, keep)
        return EffReplacedTokenOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
