"""Causal language modelling: the head, its cache, and what `generate()` asks of a model."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .configuration import EffEncoderConfig
from .losses import token_loss
from .packing import first_tokens
from .pretraining_tasks import LanguageModel


class ForCausalLM(LanguageModel):
    """Predicts each token from those before it. Whatever the config says, the model is causal.

    A family's class has `GenerationMixin` as its last base, which gives it `generate()`.
    """

    task = "causal-lm"
    is_causal = True

    def __init__(self, config: EffEncoderConfig) -> None:
        if not config.is_decoder:
            # The caller's config stays as it is; what is saved with this model says what it is.
            config = copy.deepcopy(config)
            config.is_decoder = True
        super().__init__(config)

    def make_cache(self) -> Cache:
        """An empty cache, bounded by the mechanism's reach; `forward` and `generate` make one by themselves."""
        return self.base_model.make_cache()

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
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Inputs as in the base model.

        Args:
            labels: `[batch, length]`, usually `input_ids`: token ids, -100 where nothing is to be predicted. They are
                shifted here, so that each token is predicted from those before it, in packed rows (`document_ids`) from
                those of its document: labels at first tokens count nowhere.
            logits_to_keep: logits of only so many last tokens (0 for all), or of these positions; not with `labels`.
            skip_logits: give the loss alone, in memory that does not grow with `length * vocab_size`; by default
                `config.skip_logits` in training with labels, else no.

        Returns:
            `logits` `[batch, length or logits_to_keep, vocab_size]` unless skipped, `loss` if there are labels,
            `past_key_values` with a cache.

        Raises:
            ValueError: as in the base model; `labels` together with `logits_to_keep` or a cache from before;
                `document_ids` with `use_cache=True`; `skip_logits=True` without labels.
        """
        skip_logits = self.skips_logits(labels, skip_logits)
        if document_ids is not None and use_cache:
            raise ValueError(
                f"{type(self).__name__} got document_ids and use_cache = True: a cache goes on with one text a row; "
                "leave out one of them."
            )
        if labels is not None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            if past_length > 0 or isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
                raise ValueError(
                    "labels need the logits of the whole text; leave out logits_to_keep and past_key_values."
                )
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep = {logits_to_keep}: give a number of last tokens, 0 for all.")
        outputs = self.base_model(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            global_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            document_ids=document_ids,
            **kwargs,
            return_dict=True,
        )
        states = outputs.last_hidden_state
        if labels is not None and document_ids is not None and labels.shape == document_ids.shape:
            labels = labels.masked_fill(first_tokens(document_ids).to(labels.device), -100)  # the loss refuses others
        if skip_logits:
            # Each token's state against the next one's label: the labels are shifted, not the states, which are larger.
            following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss, logits = self.loss_and_logits(states, following, kwargs.get("num_items_in_batch"), True)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.token_logits(states[:, kept])
            loss = None
            if labels is not None:
                loss = token_loss(logits[:, :-1], labels[:, 1:], kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; `global_attention_mask`, which is about the prompt, is cut to the tokens of this step."""
        mask = global_attention_mask
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        cache = inputs.get("past_key_values")
        start = 0 if cache is None else cache.get_seq_length()
        if mask is not None and start < mask.shape[1]:
            given = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            length = given.shape[1]
            generated = mask.new_zeros(mask.shape[0], max(0, start + length - mask.shape[1]))
            both = mask if generated.shape[1] == 0 else torch.cat([mask, generated], dim=1)
            inputs["global_attention_mask"] = both[:, start : start + length]
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """transformers counts from 0; the rows of this model's position table may begin later."""
        positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return positions + self.config.first_position

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """In place of transformers' own choice: a cache of one width a layer.

        Raises:
            ValueError: a text that would become longer than the model takes, before anything is generated; packed
                rows; another kind of cache.
        """
        if model_kwargs.get("document_ids") is not None:
            raise ValueError(
                "generate() got document_ids: it goes on with one text a row. Give each document a row of its own, "
                "padded on the left."
            )
        limit = self.config.max_input_length
        # The last token is only written, not read.
        if max_cache_length > limit:
            raise ValueError(
                f"the text may become {max_cache_length + 1} tokens long, prompt and padding included, more than the "
                f"{limit} that this model reads (max_position_embeddings = {self.config.max_position_embeddings}) and "
                f"one more; lower max_new_tokens or max_length by {max_cache_length - limit}."
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: {type(self).__name__} has a cache "
                "of its own, which is bounded already; leave it out."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.make_cache()
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
