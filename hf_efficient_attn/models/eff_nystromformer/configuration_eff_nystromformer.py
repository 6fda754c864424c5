"""Config of EffNystromformer."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.utils import logging

from ...attention.nystromformer import NystromformerOptions
from ...encoder.configuration import EffEncoderConfig


logger = logging.get_logger(__name__)

# In published tables two rows stand before the first position.
_RESERVED_ROWS = 2


@strict
class EffNystromformerConfig(NystromformerOptions, EffEncoderConfig):
    r"""
    Config of the EffNystromformer classes; `EffEncoderConfig` documents the shared fields, `NystromformerOptions` the
    attention. `segment_means_seq_len` of published configs has no meaning here: segments follow each example's tokens.

    Example:

    ```python
    >>> from hf_efficient_attn import EffNystromformerConfig, EffNystromformerModel
    >>> model = EffNystromformerModel(EffNystromformerConfig(num_hidden_layers=2, num_landmarks=32))
    ```
    """

    model_type = "eff_nystromformer"
    original_model_types: ClassVar[tuple[str, ...]] = ("nystromformer",)
    original_fields_without_meaning: ClassVar[tuple[str, ...]] = (
        "segment_means_seq_len",
        "inv_init_coeff_option",
        "onnx_export",
    )

    vocab_size: int = 30000
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 512
    position_offset: int | None = _RESERVED_ROWS
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    @classmethod
    def convert_original(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Published configs count positions without the reserved rows."""
        converted = {"inv_coeff_init_option": False, **config_dict}
        landmarks = config_dict.get("num_landmarks", 64)
        if config_dict.get("segment_means_seq_len", 64) == landmarks:
            logger.warning_once(
                f"segment_means_seq_len and num_landmarks are both {landmarks} here, which makes transformers "
                f"compute softmax attention at every length. EffNystromformer has landmarks where a text has more than "
                f"{landmarks} tokens, as in the paper; num_landmarks as large as the longest text gives the other."
            )
        if "max_position_embeddings" in config_dict:
            converted["max_position_embeddings"] = config_dict["max_position_embeddings"] + _RESERVED_ROWS
        return converted

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_options()


__all__ = ["EffNystromformerConfig"]
