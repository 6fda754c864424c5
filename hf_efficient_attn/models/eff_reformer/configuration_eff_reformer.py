"""Config of EffReformer."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ...attention.local import LocalOptions
from ...attention.lsh import LSHOptions
from ...encoder.configuration import EffEncoderConfig, fsdp_plan, tp_plan


LAYER_KINDS = ("local", "lsh")


@strict
class EffReformerConfig(LSHOptions, LocalOptions, EffEncoderConfig):
    r"""
    Config of the EffReformer classes. `EffEncoderConfig` documents the shared fields, `LSHOptions` and `LocalOptions`
    the two kinds of attention. `feed_forward_size` is another name of `intermediate_size`.

    Args:
        attn_layers: `"local"` or `"lsh"` for each layer; a shorter list is repeated. None takes them in turn.
        attention_head_size: width of a head; None is a share of `hidden_size`.
        lsh_attention_probs_dropout_prob, local_attention_probs_dropout_prob: dropout of probabilities in these layers;
            None is `attention_probs_dropout_prob`.
        axial_pos_embds: positions as places on a grid, whose axes have tables of their own; else one table.
        axial_pos_shape: numbers of places along the axes, whose product is at least `max_position_embeddings`; None
            takes a square. Inputs of any length up to that work, in training too.
        axial_pos_embds_dim: widths of the axes' embeddings, which join to `hidden_size`; None takes a quarter and the
            rest.
        axial_norm_std: standard deviation of new axial embeddings.
        chunk_size_lm_head: tokens at a time that get logits, 0 for all at once.
        reversible: compute states again in the backward pass instead of keeping them, but for the last layer's; False
            (with the eager backend) for higher derivatives. Compiled and exported models keep them.

    Example:

    ```python
    >>> from hf_efficient_attn import EffReformerConfig, EffReformerModel
    >>> model = EffReformerModel(EffReformerConfig(num_hidden_layers=2, num_hashes=2))
    ```
    """

    model_type = "eff_reformer"
    attribute_map: ClassVar[dict[str, str]] = {"feed_forward_size": "intermediate_size"}
    has_causal_form: ClassVar[bool] = True
    original_model_types: ClassVar[tuple[str, ...]] = ("reformer",)
    original_fields_without_meaning: ClassVar[tuple[str, ...]] = (
        "attn_chunk_length",
        "attn_type",
        "num_chunks_after",
        "num_chunks_before",
        "sinusoidal_pos_embds",
    )
    qkv_bias: ClassVar[bool] = False
    base_model_fsdp_plan: ClassVar[dict[str, str]] = fsdp_plan("embeddings.word_embeddings", "encoder.layers.*")
    base_model_tp_plan: ClassVar[dict[str, str]] = tp_plan(
        "encoder.layers.*", "feed_forward.dense.dense", "feed_forward.output.dense"
    )

    attn_layers: list[str] | tuple[str, ...] | None = None
    attention_head_size: int | None = None
    vocab_size: int = 320
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 512
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.05
    attention_probs_dropout_prob: float | int = 0.0
    lsh_attention_probs_dropout_prob: float | int | None = None
    local_attention_probs_dropout_prob: float | int | None = None
    max_position_embeddings: int = 4096
    axial_pos_embds: bool = True
    axial_pos_shape: list[int] | tuple[int, ...] | None = None
    axial_pos_embds_dim: list[int] | tuple[int, ...] | None = None
    axial_norm_std: float = 1.0
    chunk_size_feed_forward: int = 0
    chunk_size_lm_head: int = 0
    type_vocab_size: int = 0
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    reversible: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.attn_layers is None:
            # A single layer has room for the first only.
            self.attn_layers = LAYER_KINDS[: max(1, self.num_hidden_layers)]
        if self.axial_pos_shape is None:
            side = max(1, math.isqrt(max(0, self.max_position_embeddings - 1)) + 1)
            self.axial_pos_shape = [side, max(1, -(-self.max_position_embeddings // side))]
        if self.axial_pos_embds_dim is None:
            first = max(1, self.hidden_size // 4)
            self.axial_pos_embds_dim = [first, self.hidden_size - first]
        # As a file would have them, so that a config equals its saved self.
        self.attn_layers = list(self.attn_layers)
        self.axial_pos_shape, self.axial_pos_embds_dim = list(self.axial_pos_shape), list(self.axial_pos_embds_dim)
        super().__post_init__(**kwargs)

    @classmethod
    def convert_original(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Published configs have a layer for each entry, heads of 64, and no seed for random hashes."""
        converted = {"attn_layers": ["local", "lsh"] * 3, "num_attention_heads": 12, "attention_head_size": 64}
        converted |= {"local_attention_probs_dropout_prob": 0.05, "lsh_attention_probs_dropout_prob": 0.0}
        converted |= {"axial_pos_shape": [64, 64], "axial_pos_embds_dim": [64, 192], **config_dict}
        # There a number of layers in the file wins over the list, whose one kind then is that of all.
        converted.setdefault("num_hidden_layers", len(converted["attn_layers"]))
        converted["attn_layers"] = converted["attn_layers"][: converted["num_hidden_layers"]]
        converted["intermediate_size"] = converted.pop("feed_forward_size", 512)
        if converted.get("hash_seed") is None:
            converted["hash_seed"] = 0
        if converted.get("axial_pos_embds", True):
            # The grid bounds the length there as well.
            places = math.prod(converted["axial_pos_shape"])
            converted["max_position_embeddings"] = min(places, converted.get("max_position_embeddings", 4096))
        return converted

    @property
    def output_size(self) -> int:
        """Width of the last states: both streams of the reversible layers."""
        return 2 * self.hidden_size

    def layer_kind(self, layer: int) -> str:
        """`"local"` or `"lsh"`."""
        return self.attn_layers[layer % len(self.attn_layers)]

    def check(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        super().check()
        self.check_lsh_options(self.is_decoder)
        self.check_local_options(self.is_decoder)
        layers = list(self.attn_layers)
        if not 1 <= len(layers) <= self.num_hidden_layers or set(layers) - set(LAYER_KINDS):
            raise ValueError(
                f"attn_layers = {layers} for {self.num_hidden_layers} layers: give 'local' or 'lsh' for each layer, or "
                "a shorter pattern to repeat."
            )
        if self.attention_head_size is not None and self.attention_head_size < 1:
            raise ValueError(f"attention_head_size = {self.attention_head_size}: it must be 1 or more, or None.")
        for name in ("lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} = {value}: a probability lies between 0 and 1.")
        for name in ("chunk_size_feed_forward", "chunk_size_lm_head"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be 0 (all at once) or more.")
        if self.axial_norm_std < 0:
            raise ValueError(f"axial_norm_std = {self.axial_norm_std}: it must be 0 or more.")
        if self.axial_pos_embds:
            self._check_axes()
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings = True: eff_reformer's last states are twice as wide as its embeddings; leave it "
                "False."
            )
        for name, value in (("embedding_size", self.hidden_size), ("type_vocab_size", 0), ("norm_position", "post")):
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name} = {getattr(self, name)!r}: eff_reformer has no such choice; leave it out.")
        if self.rescale_embeddings:
            raise ValueError("rescale_embeddings = True: eff_reformer has no such choice; leave it False.")

    def _check_axes(self) -> None:
        shape, widths = self.axial_pos_shape, self.axial_pos_embds_dim
        if not shape or len(shape) != len(widths) or min(*shape, *widths) < 1:
            raise ValueError(
                f"axial_pos_shape = {shape} and axial_pos_embds_dim = {widths}: give one positive number an axis each, "
                "or leave both out."
            )
        if sum(widths) != self.hidden_size:
            raise ValueError(
                f"axial_pos_embds_dim = {widths} join to {sum(widths)}, but hidden_size = {self.hidden_size}; give "
                "widths that add up to it, or leave them out."
            )
        if math.prod(shape) < self.max_position_embeddings:
            raise ValueError(
                f"axial_pos_shape = {shape} has {math.prod(shape)} places, fewer than max_position_embeddings = "
                f"{self.max_position_embeddings}; give a larger grid, or leave it out."
            )


__all__ = ["EffReformerConfig"]
