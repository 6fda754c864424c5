"""The vision heads' forward passes. A family mixes one with its `EffVisionPreTrainedModel` and names the base model.

```
class EffXForImageClassification(ForImageClassification, EffXPreTrainedModel):
    base_class = EffXModel
```
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput, MaskedImageModelingOutput
from transformers.utils.generic import can_return_tuple

from .losses import sequence_classification_loss
from .vision_configuration import EffVisionConfig


class VisionTaskModel:
    """A base model under its published name and, in subclasses, a head."""

    base_class: ClassVar[type]
    uses_mask_token: ClassVar[bool] = False
    accepts_loss_kwargs = False
    """Read by Trainer: whether the loss divides by `num_items_in_batch` itself."""

    def __init__(self, config: EffVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        base = self.base_class(config, add_pooling_layer=False, use_mask_token=self.uses_mask_token)
        setattr(self, self.base_model_prefix, base)
        self._add_head(config)
        self.post_init()

    def _add_head(self, config: EffVisionConfig) -> None:
        raise NotImplementedError(f"{type(self).__name__} adds no head.")


class ForImageClassification(VisionTaskModel):
    """Classifies or scores whole images: single label, multi-label or regression (`config.problem_type`)."""

    def _add_head(self, config: EffVisionConfig) -> None:
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        patch_mask: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Inputs as in the base model; `labels` as in `sequence_classification_loss`.

        Returns:
            `logits` `[batch, num_labels]`, and `loss` if there are labels.
        """
        outputs = self.base_model(pixel_values, patch_mask=patch_mask, **kwargs, return_dict=True)
        state = self.base_model.image_state(outputs.last_hidden_state, pixel_values, patch_mask)
        logits = self.classifier(state)
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ForMaskedImageModeling(VisionTaskModel):
    """Predicts the pixels of masked patches (Xie et al. 2021, arXiv 2111.09886, SimMIM)."""

    uses_mask_token = True

    def _add_head(self, config: EffVisionConfig) -> None:
        stride = config.encoder_stride
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, stride**2 * config.num_channels, kernel_size=1), nn.PixelShuffle(stride)
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        patch_mask: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> MaskedImageModelingOutput:
        """Inputs as in the base model.

        Returns:
            `reconstruction` `[batch, channels, height, width]` (of `encoder_stride` pixels a patch, without those that
            an uneven image was filled up with), and with `bool_masked_pos` the `loss`: the mean distance of the pixels
            of masked patches, fill included, 0 if there are none.

        Raises:
            ValueError: `bool_masked_pos` where `encoder_stride` is not the patch size; see the base model.
        """
        stride = self.config.encoder_stride
        if bool_masked_pos is not None and self.config.patch_shape != (stride, stride):
            raise ValueError(
                f"encoder_stride = {stride} with patch_size = {self.config.patch_size}: what is predicted for a patch "
                "has to be as large as the patch for a loss; make them equal, or leave bool_masked_pos out."
            )
        outputs = self.base_model(pixel_values, bool_masked_pos, patch_mask, **kwargs, return_dict=True)
        grid = self.base_model.grid_of(pixel_values)
        patches = outputs.last_hidden_state[:, self.config.num_prefix_tokens :]
        predicted = self.decoder(patches.transpose(1, 2).unflatten(2, grid))
        loss = None
        if bool_masked_pos is not None:
            counted = bool_masked_pos.flatten(1).unflatten(1, grid).bool()
            mask = self.base_model.bool_patch_mask(patch_mask, counted.shape[0], grid)
            counted = counted if mask is None else counted & mask
            # What an uneven image is filled up with counts as zeros: in a batch of several sizes it stands there, too.
            whole = _first_pixels(self.base_model.embeddings.whole_patches(pixel_values), predicted)
            loss = _masked_distance(predicted, whole, counted, stride)
        if self.config.patch_shape == (stride, stride):
            predicted = _first_pixels(predicted, pixel_values)
        return MaskedImageModelingOutput(
            loss=loss, reconstruction=predicted, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _first_pixels(whole: Tensor, pixel_values: Tensor) -> Tensor:
    """`whole` `[batch, channels, rows, columns]` up to the height and width of `pixel_values`."""
    height, width = pixel_values.shape[2:]
    if not torch.compiler.is_compiling():
        return whole[:, :, :height, :width]
    # By index, because a compiler does not know that there are as many.
    for dim, size in ((2, height), (3, width)):
        whole = whole.index_select(dim, torch.arange(size, device=whole.device))
    return whole


def _masked_distance(predicted: Tensor, pixel_values: Tensor, counted: Tensor, stride: int) -> Tensor:
    """Mean of `|predicted - pixel_values|` over the channels and the pixels of patches `counted` `[batch, *grid]`."""
    pixels = counted.repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)
    pixels = pixels[:, None]
    # Where nothing counts, not even inf or NaN may.
    target = torch.where(pixels, pixel_values.to(predicted.dtype), 0.0)
    distance = (predicted - target).abs().float()
    total = torch.where(pixels, distance, 0.0).sum()
    return total / (pixels.sum() * predicted.shape[1]).clamp(min=1)


class Backbone(BackboneMixin, VisionTaskModel):
    """Feature maps of chosen stages (`config.out_features` or `out_indices`) for dense tasks.

    Holds the base model under its published name and nothing else, so that folders of every head load into it.
    """

    def __init__(self, config: EffVisionConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    def _add_head(self, config: EffVisionConfig) -> None:
        """There is none."""

    def post_init(self) -> None:
        """As in other classes: the base model records its layers already, and would do so twice."""
        super(BackboneMixin, self).post_init()

    @property
    def out_indices(self) -> list[int]:
        """Numbers of the stages in `feature_maps`."""
        return self.config.feature_stages()

    @out_indices.setter
    def out_indices(self, value: list[int] | tuple[int, ...]) -> None:
        self._choose(None, list(value))

    @property
    def out_features(self) -> list[str]:
        """Names of the stages in `feature_maps`."""
        return [self.config.stage_names[index] for index in self.config.feature_stages()]

    @out_features.setter
    def out_features(self, value: list[str]) -> None:
        self._choose(list(value), None)

    def _choose(self, names: list[str] | None, indices: list[int] | None) -> None:
        config = self.config
        before = config.out_features, config.out_indices
        config.out_features, config.out_indices = names, indices
        try:
            config.feature_stages()
        except ValueError:
            config.out_features, config.out_indices = before
            raise

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Inputs as in the base model.

        Returns:
            `feature_maps`, one a stage: `[batch, hidden, rows, columns]` (`config.reshape_hidden_states`), normed
            (`config.apply_layernorm`), 0 at padding; `hidden_states` and `attentions` if asked.
        """
        outputs = self.base_model(
            pixel_values, patch_mask=patch_mask, output_hidden_states=True, **kwargs, return_dict=True
        )
        grid = self.base_model.grid_of(pixel_values)
        mask = self.base_model.bool_patch_mask(patch_mask, pixel_values.shape[0], grid)
        states = [outputs.hidden_states[index] for index in self.out_indices]
        maps = tuple(self._feature_map(state, grid, mask) for state in states)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(
            feature_maps=maps,
            hidden_states=outputs.hidden_states if wanted else None,
            attentions=outputs.attentions,
        )

    def _feature_map(self, states: Tensor, grid: tuple[int, int], patch_mask: Tensor | None) -> Tensor:
        if self.config.apply_layernorm:
            states = self.base_model.layernorm(states)
        if not self.config.reshape_hidden_states:
            return states
        patches = states[:, self.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        return patches.contiguous() if patch_mask is None else patches.masked_fill(~patch_mask[:, None], 0.0)
