"""Performer: attention through random features, with a projection that is drawn once and kept with the weights."""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..functional import (
    KERNELS,
    check_exact_kernel,
    dense_performer_attention,
    orthogonal_features,
    performer_attention,
    performer_step,
)
from .base import SelfAttention


if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .recurrent_cache import RecurrentCacheLayer


@dataclass(kw_only=True)
class PerformerOptions:
    """Options of Performer attention.

    Args:
        num_features: random features a head; 256 as in the paper's code, more for a closer estimate (its error falls as
            1 / sqrt(num_features)). None is `floor(head_dim * ln(head_dim))`.
        kernel: `"softmax"`, which estimates softmax attention, or `"relu"`, the paper's generalised attention.
        orthogonal: features orthogonal within blocks of `head_dim`, which lowers the error; False draws them
            independently.
        projection_seed: the projections are a pure function of this seed, the layer and the number of the redraw.
        exact_below: examples of fewer valid tokens than this get softmax attention in place of its estimate: another
            function, quicker where a text is short. Each example's own tokens count, not the length of the batch. 0 is
            never; not in the causal form or with `kernel="relu"`.
    """

    num_features: int | None = 256
    kernel: str = "softmax"
    orthogonal: bool = True
    projection_seed: int = 0
    exact_below: int = 0

    def check_options(self, causal: bool = False) -> None:
        """Raises `ValueError` for a value that breaks a rule, or does not go with the causal form."""
        if self.num_features is not None and self.num_features < 1:
            raise ValueError(
                f"num_features = {self.num_features}: it must be 1 or more, or None for floor(head_dim * ln(head_dim))."
            )
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel = {self.kernel!r}: choose one of {', '.join(KERNELS)}.")
        if self.projection_seed < 0:
            raise ValueError(f"projection_seed = {self.projection_seed}: it must be 0 or more.")
        check_exact_kernel(self.exact_below, self.kernel, causal)

    def features_of(self, head_dim: int) -> int:
        """Random features a head."""
        if self.num_features is not None:
            return self.num_features
        return max(1, math.floor(head_dim * math.log(head_dim)))


def draw_projection(features: int, head_dim: int, *, orthogonal: bool, seed: int, layer: int, redraw: int) -> Tensor:
    """A projection `[features, head_dim]` in float64 on the CPU: a pure function of its arguments.

    torch's global generator is neither used nor seeded, so every process draws the same, up to the rounding of its
    linear algebra.
    """
    digest = hashlib.sha256(f"{seed} {layer} {redraw}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "little"))

    def draw(*shape: int) -> Tensor:
        # The device is named, because a model may be built where tensors have no values.
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    lengths = draw(features, head_dim)
    if not orthogonal:
        return lengths
    return orthogonal_features(draw((features + head_dim - 1) // head_dim, head_dim, head_dim), lengths)


class PerformerSelfAttention(SelfAttention):
    """Performer self-attention, FAVOR+ (Choromanski et al. 2020, arXiv 2009.14794).

    All heads of a layer share one projection, a buffer that is saved with the weights. It stays as it is, in training
    too, until `redraw_` is called (`RedrawProjections` does so every some steps). In a half-precision model the
    projection is rounded like a weight; features are computed in fp32.

    In the causal form (`is_decoder`) the cache is a state of constant size. Dropout drops whole keys of a head, see
    `performer_attention`.
    """

    options_class = PerformerOptions
    has_causal_form = True
    is_estimate = True
    has_overwriting_form = True

    def __init__(self, config: Any, layer_idx: int, options: PerformerOptions | None = None) -> None:
        super().__init__(config, layer_idx, options)
        self.register_buffer("projection", torch.empty(self.options.features_of(self.head_dim), self.head_dim))
        if not self.projection.is_meta:
            self.redraw_()

    def drawn_projection(self, count: int = 0) -> Tensor:
        """The projection after `count` redraws, `[features, head_dim]` in float64."""
        return draw_projection(
            *self.projection.shape,
            orthogonal=self.options.orthogonal,
            seed=self.options.projection_seed,
            layer=self.layer_idx,
            redraw=count,
        )

    def drawn_buffers(self) -> dict[str, Tensor]:
        """See `SelfAttention.drawn_buffers`."""
        return {"projection": self.drawn_projection()}

    @torch.no_grad()
    def redraw_(self, count: int = 0) -> None:
        """Replace the projection by the one after `count` redraws; 0 is the first one.

        Which it is depends on nothing but the seed, the layer and `count`. A cache from before is of no use afterwards.

        Raises:
            ValueError: `count` is no number of redraws.
        """
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"count = {count!r}: it is a number of redraws, give 0 or more.")
        self.projection.copy_(self.drawn_projection(count))

    def make_cache_layer(self) -> "RecurrentCacheLayer":
        """An empty cache of constant size."""
        from .recurrent_cache import RecurrentCacheLayer  # loads transformers' caches: not for a config or an encoder

        return RecurrentCacheLayer()

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        *,
        dropout_p: float,
        backend: str,
        past_key_values: "Cache | None" = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`. With a cache the eager weights are those of the input's own tokens."""
        options = {"dropout_p": dropout_p, "projection": self.projection, "kernel": self.options.kernel}
        length, weights = query.shape[2], None
        if past_key_values is not None:
            layer = self._cache_layer(past_key_values)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[:, -length:]
            state = layer.state
            if state is not None and state.top.shape[0] != query.shape[0]:
                raise ValueError(
                    f"past_key_values is of {state.top.shape[0]} examples, the input of {query.shape[0]}; go on with "
                    "the same examples, or repeat the cache with batch_repeat_interleave."
                )
            mixed, after = performer_step(query, key, value, key_padding_mask, state=state, **options)
            if backend == "eager":
                options.update(causal=True, state=state)
                mixed, weights = dense_performer_attention(query, key, value, key_padding_mask, **options)
            layer.advance(after, length)
        elif backend == "eager":
            options.update(causal=self.is_causal, exact_below=self.options.exact_below)
            mixed, weights = dense_performer_attention(query, key, value, key_padding_mask, **options)
        else:
            options.update(causal=self.is_causal, exact_below=self.options.exact_below, overwrite=overwrite)
            mixed = performer_attention(query, key, value, key_padding_mask, **options)
        return self.merge(mixed), weights

    def _cache_layer(self, past_key_values: "Cache") -> "RecurrentCacheLayer":
        """This layer's part of the cache."""
        layer = self.own_layer(past_key_values)
        if not hasattr(layer, "advance"):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__} without room for a state; pass what the last "
                "call returned or model.make_cache(), or none and use_cache=True."
            )
        return layer


def performer_layers(model: nn.Module) -> list[PerformerSelfAttention]:
    """Every Performer attention in a model, in order."""
    return [module for module in model.modules() if isinstance(module, PerformerSelfAttention)]
