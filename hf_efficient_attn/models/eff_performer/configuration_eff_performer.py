"""Config of EffPerformer."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from ...attention.performer import PerformerOptions
from ...encoder.configuration import EffEncoderConfig


@strict
class EffPerformerConfig(PerformerOptions, EffEncoderConfig):
    r"""
    Config of the EffPerformer classes; `EffEncoderConfig` documents the shared fields, `PerformerOptions` the features.

    Args:
        attention_probs_dropout_prob: 0, because the paper has no dropout here and there are no probabilities to drop;
            more drops whole keys of a head.

    Folders of BERT and RoBERTa are read as well, RoBERTa's with the row of its first position.

    Example:

    ```python
    >>> from hf_efficient_attn import EffPerformerConfig, EffPerformerModel
    >>> model = EffPerformerModel(EffPerformerConfig(num_hidden_layers=2, num_features=128))
    ```
    """

    model_type = "eff_performer"
    has_causal_form: ClassVar[bool] = True
    original_model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta")

    max_position_embeddings: int = 4096
    attention_probs_dropout_prob: float | int = 0.0

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As in transformers; RoBERTa's positions begin behind its pad id, which its config does not say."""
        is_roberta = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **kwargs)[0]
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if is_roberta.get("model_type") == "roberta":
            config_dict = {"position_offset": None, **config_dict}
        return config_dict, kwargs

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_options(self.is_decoder)


__all__ = ["EffPerformerConfig"]
