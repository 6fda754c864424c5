"""ViT and DeiT."""

from typing import Any

import torch
from torch import Tensor

from ..encoder.vision_configuration import pair
from ..models.eff_vit.modeling_eff_vit import published_name
from .configs import config_class_of, own_config


def image_config(source: Any, options: dict[str, Any]) -> Any:
    """The config of an EffViT that computes what the source does."""
    if source.model_type == "vit":
        return own_config(source, options)
    cls = config_class_of("eff_vit")
    stored = {name: value for name, value in source.to_dict().items() if hasattr(cls, name)}
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        stored.pop(name, None)
    return cls.from_dict({**cls.convert_original(stored), "num_register_tokens": 1, **options})


def image_state(source: Any, prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source's weights under our names, without a prefix for the base model."""
    found = {published_name(name.removeprefix(prefix)): value for name, value in state.items()}
    if source.model_type == "deit":
        # There the second token has a position; a register has none, so it takes both.
        table = found["embeddings.position_embeddings"]
        found["embeddings.register_tokens"] = found.pop("embeddings.distillation_token") + table[:, 1:2]
        found["embeddings.position_embeddings"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    return found


def sample_images(config: Any, device: torch.device) -> dict[str, Tensor]:
    """The arguments for two images of noise, of the native size."""
    height, width = pair(config.image_size)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, config.num_channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(device)}
