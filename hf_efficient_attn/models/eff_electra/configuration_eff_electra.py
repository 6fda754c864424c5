"""Config of EffElectra."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...attention.named import NamedAttentionOptions
from ...encoder.configuration import EffEncoderConfig


@strict
class EffElectraConfig(NamedAttentionOptions, EffEncoderConfig):
    r"""
    Config of the EffElectra classes; `EffEncoderConfig` documents the shared fields, `NamedAttentionOptions` the choice
    of attention. The defaults are ELECTRA-Small.

    Args:
        summary_type: `"first"`: the first token stands for a text in multiple choice.
        summary_use_proj: a linear map follows it there.
        summary_activation: and this activation, or none (None).
        summary_last_dropout: dropout after that.

    Example:

    ```python
    >>> from hf_efficient_attn import EffElectraConfig, EffElectraForPreTraining
    >>> model = EffElectraForPreTraining(EffElectraConfig(num_hidden_layers=2))
    >>> config = EffElectraConfig(attention="nystromformer", attention_options={"num_landmarks": 32})
    ```
    """

    model_type = "eff_electra"
    original_model_types: ClassVar[tuple[str, ...]] = ("electra",)

    hidden_size: int = 256
    embedding_size: int | None = 128
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    summary_type: str = "first"
    summary_use_proj: bool = True
    summary_activation: str | None = "gelu"
    summary_last_dropout: float | int = 0.1

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_attention()
        if self.summary_type != "first":
            raise ValueError(
                f"summary_type = {self.summary_type!r}: in this package the first token stands for a text, as in all "
                "published ELECTRA models; choose 'first'."
            )
        if not 0.0 <= self.summary_last_dropout <= 1.0:
            raise ValueError(f"summary_last_dropout = {self.summary_last_dropout}: a probability lies between 0 and 1.")


__all__ = ["EffElectraConfig"]
