"""EffLongformer classes: the encoder frame around Longformer attention, with the published parameter names."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

from ...attention.cache import WindowCacheLayer
from ...attention.longformer import LongformerSelfAttention
from ...encoder.causal_lm import ForCausalLM
from ...encoder.global_tokens import causal_prefix_mask, global_token_mask, refuse_global_tokens
from ...encoder.heads import DenseClassificationHead, RobertaLMHead
from ...encoder.model import EffEncoderModel, EffPreTrainedModel
from ...encoder.pretraining_tasks import ForMaskedLM, ForReplacedTokenDetection
from ...encoder.tasks import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from ...functional.tokens import TokenSlots, select_tokens
from ...functional.window_block_mask import window_block_mask
from .configuration_eff_longformer import EffLongformerConfig


GLOBAL_ATTENTION_OF_TASK = {
    "sequence-classification": "cls",
    "question-answering": "question",
    "multiple-choice": "second_text",
}


class EffLongformerPreTrainedModel(EffPreTrainedModel):
    """What all EffLongformer classes share."""

    config_class = EffLongformerConfig
    base_model_prefix = "longformer"
    _supports_flex_attn = True


class EffLongformerModel(EffEncoderModel, EffLongformerPreTrainedModel):
    """Longformer encoder (Beltagy, Peters & Cohan 2020, arXiv 2004.05150): sliding window and global tokens.

    Equal to transformers' `LongformerModel` for equal weights on valid tokens, whose folders it loads. It differs where
    that one depends on padding or length: any length works as it is, and positions follow the mask, not the ids.
    """

    attention_class = LongformerSelfAttention

    def attention_context(
        self,
        input_ids: Tensor | None,
        key_padding_mask: Tensor | None,
        global_attention_mask: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """The global tokens of the batch."""
        rule = self.config.global_attention
        if rule is None:
            rule = GLOBAL_ATTENTION_OF_TASK.get(self.task, "none")
        if self.config.is_decoder:
            return self._causal_context(rule, key_padding_mask, global_attention_mask, shape, device, past_key_values)
        mask, slots = global_token_mask(
            rule,
            input_ids,
            key_padding_mask,
            global_attention_mask,
            sep_token_id=self.config.sep_token_id,
            max_global_tokens=self.config.max_global_tokens,
            shape=shape,
            device=device,
        )
        global_tokens = None if mask is None else select_tokens(mask, slots)
        return {"global_tokens": global_tokens, **self._block_masks(key_padding_mask, global_tokens, shape, device)}

    def _block_masks(
        self,
        key_padding_mask: Tensor | None,
        global_tokens: TokenSlots | None,
        shape: tuple[int, int],
        device: torch.device,
    ) -> dict[str, Any]:
        """What the flex_attention backend needs, made once for the layers that have the same window."""
        if self.config._attn_implementation != "flex_attention":
            return {}
        batch, length = shape
        keys = torch.empty(batch, self.config.num_attention_heads, length, 0, device=device)
        windows = {repr(attention.window): attention.window for attention in self.encoder.attentions()}
        masks = {name: window_block_mask(keys, key_padding_mask, global_tokens, **x) for name, x in windows.items()}
        return {"block_masks": masks}

    def _causal_context(
        self,
        rule: str,
        key_padding_mask: Tensor | None,
        global_attention_mask: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """The cache, and the global tokens of the batch if there may be any."""
        context = {} if past_key_values is None else {"past_key_values": past_key_values}
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if self.config.causal_global is None:
            refuse_global_tokens(global_attention_mask)
            # After a cache keys outnumber queries, which is not for flex_attention.
            return (
                context if past_length > 0 else {**context, **self._block_masks(key_padding_mask, None, shape, device)}
            )
        past_global = 0
        if past_key_values is not None:
            first = past_key_values.layers[0] if past_key_values.layers else None
            past_global = first.prefix_count if isinstance(first, WindowCacheLayer) else 0
        mask, slots = causal_prefix_mask(
            rule,
            key_padding_mask,
            global_attention_mask,
            past_length=past_length,
            past_global=past_global,
            max_global_tokens=self.config.max_global_tokens,
            shape=shape,
            device=device,
        )
        return {**context, "global_tokens": None if mask is None else select_tokens(mask, slots)}


class EffLongformerForMaskedLM(ForMaskedLM, EffLongformerPreTrainedModel):
    """EffLongformer that predicts masked tokens."""

    base_class, head_class = EffLongformerModel, RobertaLMHead


class EffLongformerForCausalLM(ForCausalLM, EffLongformerPreTrainedModel, GenerationMixin):
    """EffLongformer that continues texts, with a window that looks back only (section 4 of the paper)."""

    base_class, head_class = EffLongformerModel, RobertaLMHead


class EffLongformerForReplacedTokenDetection(ForReplacedTokenDetection, EffLongformerPreTrainedModel):
    """EffLongformer that tells which tokens are not the original ones, as ELECTRA's discriminator."""

    base_class = EffLongformerModel


class EffLongformerForSequenceClassification(ForSequenceClassification, EffLongformerPreTrainedModel):
    """EffLongformer that classifies texts; the first token is global by default."""

    base_class, head_class = EffLongformerModel, DenseClassificationHead


class EffLongformerForTokenClassification(ForTokenClassification, EffLongformerPreTrainedModel):
    """EffLongformer that classifies tokens."""

    base_class = EffLongformerModel


class EffLongformerForQuestionAnswering(ForQuestionAnswering, EffLongformerPreTrainedModel):
    """EffLongformer that marks an answer; the question's tokens are global by default."""

    base_class = EffLongformerModel


class EffLongformerForMultipleChoice(ForMultipleChoice, EffLongformerPreTrainedModel):
    """EffLongformer that picks a continuation; the tokens of the second text are global by default."""

    base_class = EffLongformerModel


__all__ = [
    "EffLongformerForCausalLM",
    "EffLongformerForMaskedLM",
    "EffLongformerForMultipleChoice",
    "EffLongformerForQuestionAnswering",
    "EffLongformerForReplacedTokenDetection",
    "EffLongformerForSequenceClassification",
    "EffLongformerForTokenClassification",
    "EffLongformerModel",
    "EffLongformerPreTrainedModel",
]
