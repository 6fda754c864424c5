"""Config of EffBigBird."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...attention.big_bird import BigBirdOptions
from ...encoder.configuration import EffEncoderConfig


@strict
class EffBigBirdConfig(BigBirdOptions, EffEncoderConfig):
    r"""
    Config of the EffBigBird classes; `EffEncoderConfig` documents the shared fields, `BigBirdOptions` the blocks.

    Args:
        use_bias: query, key and value have biases.
        plain_span_head: question answering with one linear map, as in BERT, in place of the published head with a
            feed-forward layer and a rule of its own for the question.

    Example:

    ```python
    >>> from hf_efficient_attn import EffBigBirdConfig, EffBigBirdModel
    >>> model = EffBigBirdModel(EffBigBirdConfig(num_hidden_layers=2, block_size=32))
    ```
    """

    model_type = "eff_big_bird"
    original_model_types: ClassVar[tuple[str, ...]] = ("big_bird",)
    attribute_map: ClassVar[dict[str, str]] = {"qkv_bias": "use_bias"}

    vocab_size: int = 50358
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 66
    use_bias: bool = True
    plain_span_head: bool = False

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_options()


__all__ = ["EffBigBirdConfig"]
