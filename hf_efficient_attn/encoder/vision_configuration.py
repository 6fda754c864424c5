"""Config fields of vision families: images, patches, tokens in front of them, and feature maps."""

from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration import EffConfig


POOLINGS = ("cls", "mean")
UNEVEN_SIZES = ("pad", "refuse")


@strict
class EffVisionConfig(EffConfig):
    r"""
    Fields shared by every vision family of this package, besides those of `EffConfig`. A family adds its mechanism's
    options.

    Args:
        image_size: height and width in pixels that the position table is for, or one number for both; a multiple of the
            patch. Images of every other size get the table interpolated.
        patch_size: height and width of a patch, or one number for both.
        num_channels: channels of an image.
        uneven_size: what happens to an image whose size the patch does not divide: `"pad"` adds zeros on the right and
            at the bottom, `"refuse"` raises. Nothing is ever cut off.
        use_cls_token: a learned token in front of the patches, as in published models.
        num_register_tokens: more of them, without positions, after it.
        pooling: what stands for a whole image: `"cls"`, the state of the class token, or `"mean"`, the mean of its
            patches' states.
        qkv_bias: queries, keys and values have a bias.
        pooler_output_size: width of `pooler_output`; None is `hidden_size`.
        pooler_act: activation of the pooler.
        encoder_stride: pixels that masked image modeling predicts for each patch, in each direction.
        out_features: names of the stages that a backbone gives feature maps of: `"stem"` are the embeddings, `"stage1"`
            to `"stageN"` the layers; None goes by `out_indices`.
        out_indices: the same as numbers, 0 for the stem, -1 for the last; None goes by `out_features`. Without both the
            last stage.
        apply_layernorm: a backbone's feature maps are normed by the model's last norm.
        reshape_hidden_states: they are `[batch, hidden, rows, columns]`; False gives `[batch, tokens, hidden]`, with
            the tokens in front of the patches.

    Raises:
        ValueError: a value that breaks a rule above, or an argument that is no option (with the nearest name).
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = []
    """Outputs that Trainer does not gather in evaluation."""

    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    uneven_size: str = "pad"
    use_cls_token: bool = True
    num_register_tokens: int = 0
    pooling: str = "cls"
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    encoder_stride: int = 16
    out_features: list[str] | None = None
    out_indices: list[int] | tuple[int, ...] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "EffVisionConfig":
        """As in transformers; the caller's `out_features` or `out_indices` take the place of both stored ones."""
        stages = ("out_features", "out_indices")
        if any(name in kwargs for name in stages):
            config_dict = {**config_dict, **dict.fromkeys(stages)}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def convert_original(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """See `EffConfig.convert_original`: there a table is for the whole patches of an image, the rest is dropped."""
        image, patch = (config_dict.get(name) for name in ("image_size", "patch_size"))
        if image is None or patch is None:
            return config_dict
        whole = [size - size % step for size, step in zip(pair(image), pair(patch), strict=True)]
        return config_dict if whole == list(pair(image)) else {**config_dict, "image_size": whole}

    @property
    def image_shape(self) -> tuple[int, int]:
        """`image_size` as `(height, width)`."""
        return pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """`patch_size` as `(height, width)`."""
        return pair(self.patch_size)

    @property
    def native_grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the position table is for."""
        return tuple(size // step for size, step in zip(self.image_shape, self.patch_shape, strict=True))

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of the patches: the class token and the registers."""
        return int(self.use_cls_token) + self.num_register_tokens

    @property
    def stage_names(self) -> list[str]:
        """Names of the states that a backbone may give: before the first layer, and after each."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]

    def feature_stages(self) -> list[int]:
        """Numbers of the stages that a backbone gives, from `out_features` or `out_indices`.

        Raises:
            ValueError: a stage that there is not, one twice, or stages out of order; both fields, and unequal.
        """
        names = self.stage_names
        if self.out_features is None and self.out_indices is None:
            return [len(names) - 1]
        by_field = []
        if self.out_features is not None:
            unknown = [name for name in self.out_features if name not in names]
            if unknown:
                raise ValueError(f"out_features has {unknown[0]!r}; the stages are {', '.join(names)}.")
            by_field.append([names.index(name) for name in self.out_features])
        if self.out_indices is not None:
            far = [index for index in self.out_indices if not -len(names) <= index < len(names)]
            if far:
                raise ValueError(f"out_indices has {far[0]}; the stages are 0 (the stem) to {len(names) - 1}.")
            by_field.append([index % len(names) for index in self.out_indices])
        if by_field[0] != by_field[-1]:
            raise ValueError(
                f"out_features = {self.out_features} and out_indices = {list(self.out_indices)} are different stages; "
                "give one of them."
            )
        if by_field[0] != sorted(set(by_field[0])) or not by_field[0]:
            raise ValueError(
                f"out_features = {self.out_features}, out_indices = {self.out_indices}: give one stage or more, each "
                "once, from the first to the last."
            )
        return by_field[0]

    def verify_out_features_out_indices(self) -> None:
        """Raises `ValueError` for stages that break a rule; transformers' backbones call it by this name."""
        self.feature_stages()

    def check(self) -> None:
        """See `EffConfig.check`."""
        super().check()
        self.check_positive("num_channels", "encoder_stride")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if len(pair(value)) != 2 or min(pair(value)) < 1:
                raise ValueError(f"{name} = {value}: give one number, or height and width, of 1 or more.")
        if any(size % step for size, step in zip(self.image_shape, self.patch_shape, strict=True)):
            near = [max(1, round(size / step)) * step for size, step in zip(*self._shapes(), strict=True)]
            raise ValueError(
                f"image_size = {self.image_size} is no multiple of patch_size = {self.patch_size}, so that there is no "
                f"whole table of positions for it; give {near}. Images of any size can be read nevertheless."
            )
        for name, known in (("pooling", POOLINGS), ("uneven_size", UNEVEN_SIZES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}.")
        if self.pooling == "cls" and not self.use_cls_token:
            raise ValueError("pooling = 'cls' with use_cls_token = False: there is no such token; use pooling='mean'.")
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens = {self.num_register_tokens}: it must be 0 or more.")
        if self.pooler_output_size is not None and self.pooler_output_size < 1:
            raise ValueError(
                f"pooler_output_size = {self.pooler_output_size}: it must be 1 or more, or None (hidden_size)."
            )
        self.feature_stages()
        self.check_activation("pooler_act")

    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.image_shape, self.patch_shape


def pair(size: int | Sequence[int]) -> tuple[int, ...]:
    """`(size, size)` of a number, a sequence as a tuple."""
    return (size, size) if isinstance(size, int) else tuple(size)
