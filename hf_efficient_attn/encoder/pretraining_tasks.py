"""Forward passes of the heads that encoders are pretrained with: masked and replaced tokens, next sentences."""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from .configuration import EffEncoderConfig
from .heads import ReplacedTokenHead
from .losses import next_sentence_loss, replaced_token_loss, token_loss, token_loss_in_chunks
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

    def skips_logits(self, labels: Tensor | None, skip_logits: bool | None) -> bool:
        """Whether a call with these arguments gives the loss alone; raises `ValueError` where there is none."""
        if skip_logits is None:
            return labels is not None and self.training and self.config.skip_logits
        if skip_logits and labels is None:
            raise ValueError(
                f"{type(self).__name__} got skip_logits = True without labels: there would be neither loss nor logits. "
                "Give labels, or leave it out."
            )
        return skip_logits

    def loss_and_logits(
        self, hidden_states: Tensor, labels: Tensor | None, num_items: Tensor | int | None, skip_logits: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, if there are `labels` `[batch, length]`, and the logits, unless skipped, of last states."""
        if skip_logits:
            classes = self.config.vocab_size
            return token_loss_in_chunks(self.token_logits, hidden_states, labels, classes, num_items), None
        logits = self.token_logits(hidden_states)
        return None if labels is None else token_loss(logits, labels, num_items), logits

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
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Inputs as in the base model.

        Args:
            labels: `[batch, length]` token ids, -100 where nothing is predicted.
            skip_logits: give the loss alone, in memory that does not grow with `length * vocab_size`; by default
                `config.skip_logits` in training with labels, else no.

        Returns:
            `logits` `[batch, length, vocab_size]` unless skipped, and `loss` if there are labels.

        Raises:
            ValueError: as in the base model; `skip_logits=True` without labels.
        """
        skip_logits = self.skips_logits(labels, skip_logits)
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
        num_items = kwargs.get("num_items_in_batch")
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, labels, num_items, skip_logits)
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
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> EffPreTrainingOutput:
        """As `ForMaskedLM`, and `next_sentence_label` `[batch]` with 0 = continuation, 1 = random.

        With `document_ids`, documents take the place of the batch in what is about whole texts.

        Returns:
            `prediction_logits` `[batch, length, vocab_size]` unless skipped, `seq_relationship_logits` `[batch, 2]`,
            and the sum of the losses whose labels were given.
        """
        skip_logits = self.skips_logits(labels, skip_logits)
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
        loss, logits = self.loss_and_logits(outputs.last_hidden_state, labels, None, skip_logits)
        relationship = self._head.seq_relationship(outputs.pooler_output)
        losses = [] if loss is None else [loss]
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
