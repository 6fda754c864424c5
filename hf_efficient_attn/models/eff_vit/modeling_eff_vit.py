"""EffViT classes: the vision frame around an attention of choice, with the published parameter names."""

import copy
import math
import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.named import attention_class_of, named_attention
from ...encoder.vision_configuration import pair
from ...encoder.vision_layer import pack_tokens
from ...encoder.vision_model import EffVisionModel, EffVisionPreTrainedModel
from ...encoder.vision_tasks import Backbone, ForImageClassification, ForMaskedImageModeling
from ...functional import select_tokens
from .configuration_eff_vit import EffViTConfig


# Names that transformers' ViT has in memory (and with save_original_format=False on disk) -> the published ones, which
# it writes by default. Applied one after the other.
_PUBLISHED_NAMES = {
    r"\blayers\.(?=\d+\.)": "encoder.layer.",
    r"\battention\.q_proj\.": "attention.attention.query.",
    r"\battention\.k_proj\.": "attention.attention.key.",
    r"\battention\.v_proj\.": "attention.attention.value.",
    r"\battention\.o_proj\.": "attention.output.dense.",
    r"\bmlp\.fc1\.": "intermediate.dense.",
    r"\bmlp\.fc2\.": "output.dense.",
}

# Arguments that say where a folder is.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def published_name(name: str) -> str:
    """The published name of a parameter of transformers' ViT; other names as they are."""
    for pattern, replacement in _PUBLISHED_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that say where a folder is."""
    return {name: kwargs[name] for name in _WHERE if name in kwargs}


def _rename_in_place(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: published names, whichever of both spellings came."""
    for name in list(state_dict):
        if name.startswith(prefix) and published_name(name) != name:
            state_dict[published_name(name)] = state_dict.pop(name)


class EffViTPreTrainedModel(EffVisionPreTrainedModel):
    """What all EffViT classes share."""

    config_class = EffViTConfig
    base_model_prefix = "vit"

    def __init__(self, config: EffViTConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_rename_in_place)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; weights of its ViT load under both of their spellings.

        Where `image_size` (of `config`, or as an argument) is not that of the folder, the position table is resized to
        it after loading.
        """
        config, kwargs, wanted = cls._stored_config(pretrained_model_name_or_path, config, kwargs)
        loaded = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config,
            key_mapping={**_PUBLISHED_NAMES, **(key_mapping or {})},
            **kwargs,
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Otherwise saving would go back to the names that were read.
        model._weight_conversions = []
        if wanted is not None:
            model.resize_positions(wanted)
        return loaded

    @classmethod
    def _stored_config(
        cls, source: Any, config: Any, kwargs: dict[str, Any]
    ) -> tuple[EffViTConfig | None, dict[str, Any], Any]:
        """A config with the `image_size` of the stored table, the other arguments, and the `image_size` that is wanted.

        The last is None where both are the same.
        """
        if config is None:
            kwargs = dict(kwargs)
            return None, kwargs, kwargs.pop("image_size", None)
        if isinstance(config, str | os.PathLike):
            config, rest = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **kwargs)
            kwargs = {**_where(kwargs), **rest}
        if not isinstance(config, EffViTConfig):
            raise ValueError(
                f"config is a {type(config).__name__}; give an EffViTConfig, or the folder of one: "
                "EffViTConfig.from_pretrained reads those of transformers' ViT."
            )
        stored = cls._stored_image_size(source, config, kwargs)
        if stored is None or pair(stored) == config.image_shape:
            return config, kwargs, None
        config, wanted = copy.deepcopy(config), config.image_size
        config.image_size = stored
        return config, kwargs, wanted

    @classmethod
    def _stored_image_size(cls, source: Any, config: EffViTConfig, kwargs: dict[str, Any]) -> Any:
        """What the position table of a folder, or of a `state_dict` without one, is for; None if that is not known."""
        if source is not None:
            return cls.config_class.get_config_dict(source, **_where(kwargs))[0].get("image_size")
        tables = [x for name, x in (kwargs.get("state_dict") or {}).items() if name.endswith("position_embeddings")]
        if not tables:
            return None
        patches = tables[0].shape[1] - int(config.use_cls_token)
        rows, columns = config.native_grid
        side = math.isqrt(max(0, patches))
        # Weights alone do not say how wide a table is; published ones are square.
        if patches == rows * columns or side * side != patches:
            return None
        return [side * step for step in config.patch_shape]


class EffViTModel(EffVisionModel, EffViTPreTrainedModel):
    """ViT's encoder (Dosovitskiy et al. 2020, arXiv 2010.11929): patches, positions, pre-norm layers.

    Equal to transformers' `ViTModel` for equal weights, whose folders it loads; there images of another size need an
    argument, here none. With `config.attention` any mechanism of the package takes the place of softmax attention.
    """

    attention_class = staticmethod(named_attention)

    def attention_context(
        self, grid: tuple[int, int], key_padding_mask: Tensor | None, batch: int, device: torch.device
    ) -> dict[str, Any]:
        """See `EffVisionModel.attention_context`: of grid, packing and global tokens what the mechanism wants."""
        prefix, context = self.config.num_prefix_tokens, {}
        wants = attention_class_of(self.config).wants
        if "grid" in wants:
            return {"grid": grid, "num_global": prefix}
        if key_padding_mask is not None:
            context["packing"] = pack_tokens(key_padding_mask)
        if "global_tokens" in wants and prefix > 0:
            place = torch.arange(prefix + grid[0] * grid[1], device=device)
            context["global_tokens"] = select_tokens((place < prefix)[None].expand(batch, -1), prefix)
        return context


class EffViTForImageClassification(ForImageClassification, EffViTPreTrainedModel):
    """EffViT that classifies images."""

    base_class = EffViTModel


class EffViTForMaskedImageModeling(ForMaskedImageModeling, EffViTPreTrainedModel):
    """EffViT that predicts the pixels of masked patches."""

    base_class = EffViTModel


class EffViTBackbone(Backbone, EffViTPreTrainedModel):
    """EffViT that gives feature maps."""

    base_class = EffViTModel


__all__ = [
    "EffViTBackbone",
    "EffViTForImageClassification",
    "EffViTForMaskedImageModeling",
    "EffViTModel",
    "EffViTPreTrainedModel",
]
