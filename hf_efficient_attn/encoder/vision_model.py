"""The base model of every vision family, and what all its classes share."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .inputs import as_bool_mask, check_forward_kwargs
from .layer import AttentionFactory
from .model import EffPreTrainedModel, RecordingModel
from .vision_configuration import EffVisionConfig
from .vision_embeddings import VisionEmbeddings, interpolate_positions
from .vision_layer import VisionAttentionBlock, VisionEncoder, VisionLayer, VisionPooler, mean_of_patches


class EffVisionPreTrainedModel(EffPreTrainedModel):
    """Flags, initialisation and loading of every vision class. A family adds `config_class` and its prefix."""

    config: EffVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embeddings"
    _no_split_modules = ["VisionLayer"]
    _can_record_outputs = {"hidden_states": VisionLayer, "attentions": VisionAttentionBlock}
    _keys_to_ignore_on_load_unexpected = [r"pooler\.", r"embeddings\.mask_token"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VisionEmbeddings):
            module.reset_(self.config.initializer_range)

    @torch.no_grad()
    def resize_positions(self, image_size: int | list[int] | tuple[int, int]) -> None:
        """Interpolate the position table to the patches of `image_size` (bicubic), for good; the config follows.

        Images of any size can be read without it: it sets the size at which nothing is interpolated.

        Raises:
            ValueError: a size that is no multiple of the patch.
        """
        embeddings = self.base_model.embeddings
        old_size, old_grid, self.config.image_size = self.config.image_size, embeddings.native_grid, image_size
        try:
            self.config.check()
        except ValueError:
            self.config.image_size = old_size
            raise
        first = 0 if embeddings.cls_token is None else 1
        of_class, table = embeddings.position_embeddings.split_with_sizes(
            [first, embeddings.position_embeddings.shape[1] - first], dim=1
        )
        resized = interpolate_positions(table[0].unflatten(0, old_grid), self.config.native_grid, None)
        wants_grad = embeddings.position_embeddings.requires_grad
        embeddings.native_grid = self.config.native_grid
        embeddings.position_embeddings = nn.Parameter(torch.cat([of_class, resized], dim=1), requires_grad=wants_grad)


class EffVisionModel(RecordingModel):
    """Embeddings, encoder, norm and pooler; mixed into a family's `Eff<Name>Model` before its `EffPreTrainedModel`.

    Args:
        config: the family's config.
        add_pooling_layer: have `pooler_output`.
        use_mask_token: have the token that stands for masked patches.
    """

    attention_class: ClassVar[AttentionFactory]
    """The family's mechanism, `(config, layer_idx) -> module`."""

    def __init__(self, config: EffVisionConfig, add_pooling_layer: bool = True, use_mask_token: bool = False) -> None:
        super().__init__(config)
        self.embeddings = VisionEmbeddings(config, use_mask_token)
        self.encoder = VisionEncoder(config, self.attention_class)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = VisionPooler(config) if add_pooling_layer else None
        self.finish_init()

    def grid_of(self, pixel_values: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of `[batch, channels, height, width]`, parts of a patch counted as one."""
        shape = self.embeddings.patch_shape
        # As convolutions count, so that a compiler knows both for the same.
        return tuple((size - 1) // step + 1 for size, step in zip(pixel_values.shape[2:], shape, strict=True))

    def bool_patch_mask(self, patch_mask: Tensor | None, batch: int, grid: tuple[int, int]) -> Tensor | None:
        """`patch_mask` `[batch, rows, columns]` or `[batch, patches]` as bool `[batch, rows, columns]`.

        None if every patch counts. Raises `ValueError` for another shape, or numbers besides 0 and 1.
        """
        if patch_mask is None:
            return None
        rows, columns = grid
        if patch_mask.dim() == 3 and tuple(patch_mask.shape[1:]) == (rows, columns):
            patch_mask = patch_mask.flatten(1)
        if patch_mask.dim() != 2 or tuple(patch_mask.shape) != (batch, rows * columns):
            raise ValueError(
                f"patch_mask must be [batch, rows, columns] = [{batch}, {rows}, {columns}] of patches, or [batch, "
                f"patches], with 1 at patches that count, got shape {list(patch_mask.shape)}."
            )
        mask = as_bool_mask("patch_mask", patch_mask, batch, rows * columns)
        # Without padding nothing has to be kept out of it. Only where looking costs no synchronisation.
        looks = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        return None if looks and bool(mask.all()) else mask.unflatten(1, (rows, columns))

    def attention_context(
        self, grid: tuple[int, int], key_padding_mask: Tensor | None, batch: int, device: torch.device
    ) -> dict[str, Any]:
        """What the family's mechanism wants prepared once for all layers; it gets them as keyword arguments."""
        return {}

    def image_state(self, states: Tensor, pixel_values: Tensor, patch_mask: Tensor | None) -> Tensor:
        """What stands for an image in `states` `[batch, prefix + patches, hidden]`, see `config.pooling`."""
        if self.config.pooling == "cls":
            return states[:, 0]
        mask = self.bool_patch_mask(patch_mask, states.shape[0], self.grid_of(pixel_values))
        return mean_of_patches(states[:, self.config.num_prefix_tokens :], None if mask is None else mask.flatten(1))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        patch_mask: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode a batch of images of any size.

        Args:
            pixel_values: `[batch, channels, height, width]`.
            bool_masked_pos: `[batch, patches]`, 1 at patches that the mask token replaces; in models with such a token.
            patch_mask: `[batch, rows, columns]` or `[batch, patches]`, 1 at an image's own patches and 0 at padding;
                ones if absent. Positions are spread over the rows and columns that an image has patches in, so that
                padding on any side changes nothing.
            interpolate_pos_encoding: without meaning here, for calls written for transformers' ViT: positions always
                fit the image.
            kwargs: `output_hidden_states`, `output_attentions` (eager backend), `return_dict`.

        Returns:
            `last_hidden_state` `[batch, prefix + patches, hidden]`, class token and registers in front of the patches
            row by row; `pooler_output` `[batch, pooler_output_size]` or None; if asked `hidden_states` (one more than
            layers, before the last norm) and `attentions` (`[batch, heads, tokens, tokens]` each).

        Raises:
            ValueError: input that is missing, misshapen, or would be ignored.
        """
        check_forward_kwargs(kwargs, type(self).__name__)
        self.check_wanted_weights(kwargs)
        if pixel_values is None:
            raise ValueError(f"{type(self).__name__} needs pixel_values [batch, channels, height, width].")
        if not isinstance(pixel_values, Tensor):
            raise ValueError(
                f"pixel_values is a {type(pixel_values).__name__}; give a tensor [batch, channels, height, width], "
                "such as that of an image processor called with return_tensors='pt'."
            )
        patches = self.embeddings.whole_patches(pixel_values)
        batch, grid = pixel_values.shape[0], self.grid_of(pixel_values)
        mask = self.bool_patch_mask(patch_mask, batch, grid)
        if bool_masked_pos is not None:
            bool_masked_pos = self._masked_patches(bool_masked_pos, batch, grid)
        hidden_states = self.embeddings(patches, grid, mask, bool_masked_pos)
        key_padding_mask = None
        if mask is not None:
            in_front = mask.new_ones(batch, self.config.num_prefix_tokens)
            key_padding_mask = torch.cat([in_front, mask.flatten(1)], dim=1)
        context = self.attention_context(grid, key_padding_mask, batch, pixel_values.device)
        hidden_states = self.layernorm(self.encoder(hidden_states, key_padding_mask, **context))
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(self.image_state(hidden_states, pixel_values, mask))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _masked_patches(self, bool_masked_pos: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
        if self.embeddings.mask_token is None:
            raise ValueError(
                f"{type(self).__name__} got bool_masked_pos, but it was built without a mask token; use "
                "...ForMaskedImageModeling, or use_mask_token=True."
            )
        rows, columns = grid
        if tuple(bool_masked_pos.shape) not in ((batch, rows * columns), (batch, rows, columns)):
            raise ValueError(
                f"bool_masked_pos must be [batch, patches] = [{batch}, {rows * columns}] or [batch, rows, columns] = "
                f"[{batch}, {rows}, {columns}], with 1 at masked patches, got shape {list(bool_masked_pos.shape)}."
            )
        return as_bool_mask("bool_masked_pos", bool_masked_pos.flatten(1), batch, rows * columns)
