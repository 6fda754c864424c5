"""Config of EffLongformer."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...attention.longformer import LongformerOptions
from ...encoder.configuration import EffEncoderConfig
from ...encoder.global_tokens import GLOBAL_ATTENTION_RULES


@strict
class EffLongformerConfig(LongformerOptions, EffEncoderConfig):
    r"""
    Config of the EffLongformer classes; `EffEncoderConfig` documents the shared fields, `LongformerOptions` the window.

    Args:
        global_attention: which tokens are global where `global_attention_mask` is not given: `"cls"` (the first token),
            `"question"` (what stands before the first separator), `"second_text"` (what stands after it), `"none"`, or
            a list of token ids. None is the default of the task: `"cls"` for sequence classification, `"question"`
            for question answering, `"second_text"` for multiple choice, `"none"` elsewhere. The causal form has global
            tokens only with `causal_global="prefix"`, and then `"cls"` and `"none"`.
        max_global_tokens: under `torch.compile` and `torch.export`, where the number of global tokens is not known in
            advance, room for so many an example; more trip an assertion. Without them any number works.

    Example:

    ```python
    >>> from hf_efficient_attn import EffLongformerConfig, EffLongformerModel
    >>> model = EffLongformerModel(EffLongformerConfig(num_hidden_layers=2, attention_window=[64, 128]))
    ```
    """

    model_type = "eff_longformer"
    has_causal_form: ClassVar[bool] = True
    original_model_types: ClassVar[tuple[str, ...]] = ("longformer",)
    original_fields_without_meaning: ClassVar[tuple[str, ...]] = (
        "onnx_export",
        "attention_mode",
        "ignore_attention_mask",
    )

    max_position_embeddings: int = 4098
    position_offset: int | None = None
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 2
    global_attention: str | list[int] | None = None
    max_global_tokens: int = 64

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_options(self.num_hidden_layers, self.num_attention_heads)
        rule = self.global_attention
        if isinstance(rule, str) and rule not in GLOBAL_ATTENTION_RULES:
            raise ValueError(
                f"global_attention = {rule!r} is no rule; choose one of {', '.join(GLOBAL_ATTENTION_RULES)}, "
                "or a list of token ids."
            )
        if isinstance(rule, list) and not all(0 <= token < self.vocab_size for token in rule):
            raise ValueError(
                f"global_attention = {rule}: token ids must lie within the vocabulary of {self.vocab_size}."
            )
        if rule in ("question", "second_text") and self.sep_token_id is None:
            raise ValueError(f"global_attention = {rule!r} needs sep_token_id; set it to the tokenizer's separator.")
        allowed = (None, "none") if self.causal_global is None else (None, "none", "cls")
        if self.is_decoder and rule not in allowed:
            raise ValueError(
                f"global_attention = {rule!r} with is_decoder = True and causal_global = {self.causal_global!r}: "
                "a causal model must not see later tokens. With causal_global='prefix' the first tokens may be "
                "global: choose 'cls', or 'none' and pass global_attention_mask."
            )
        if self.max_global_tokens < 1:
            raise ValueError(f"max_global_tokens = {self.max_global_tokens}: it must be 1 or more.")


__all__ = ["EffLongformerConfig"]
