"""Config of EffViT."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from ...attention.named import NamedAttentionOptions
from ...encoder.vision_configuration import EffVisionConfig


@strict
class EffViTConfig(NamedAttentionOptions, EffVisionConfig):
    r"""
    Config of the EffViT classes; `EffVisionConfig` documents the fields, `NamedAttentionOptions` the choice of
    attention. The defaults are ViT-B/16 at 224 pixels.

    Example:

    ```python
    >>> from hf_efficient_attn import EffViTConfig, EffViTForImageClassification
    >>> model = EffViTForImageClassification(EffViTConfig(num_labels=1000))
    >>> config = EffViTConfig(attention="neighborhood", attention_options={"radius": 7})
    ```
    """

    model_type = "eff_vit"
    original_model_types: ClassVar[tuple[str, ...]] = ("vit",)
    has_grid: ClassVar[bool] = True

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_attention()


__all__ = ["EffViTConfig"]
