"""Nystromformer: softmax attention through landmarks, and a convolution of the values beside it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cpu import in_reach, is_plain
from ..functional import (
    Landmarks,
    add_nearby,
    cpu_add_nearby,
    dense_nystrom_attention,
    nystrom_attention,
    segment_landmarks,
    zero_padding,
)
from .base import SelfAttention


# Devices on which matrix products are so much quicker than convolutions that most of a product may be zeros.
_MULTIPLYING = ("cuda",)


@dataclass(kw_only=True)
class NystromformerOptions:
    """Options of Nyström attention, with the names and defaults that published configs have for them.

    Args:
        num_landmarks: landmarks an example; one with no more tokens gets softmax attention itself.
        conv_kernel_size: tokens that the convolution of the values covers, odd; None for no convolution.
        pinv_iterations: steps towards the inverse of the landmarks' matrix; None inverts it exactly
            (`torch.linalg.pinv`) in float64, which costs more, and multiplies the rounding of queries and keys by the
            condition number of that matrix: results in float32 may then move by 1e-3 with the batch they are in.
        inv_coeff_init_option: scale the first step by each matrix's own largest column sum. False takes the largest of
            all heads of an example: what published weights, whose configs say False, were trained with (there it is
            the largest of the whole batch, so that examples depend on each other; a batch of one is the same).
    """

    num_landmarks: int = 64
    conv_kernel_size: int | None = 65
    pinv_iterations: int | None = 6
    inv_coeff_init_option: bool = True

    def check_options(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        if self.num_landmarks < 1:
            raise ValueError(f"num_landmarks = {self.num_landmarks}: it must be 1 or more; published models have 64.")
        size = self.conv_kernel_size
        if size is not None and (size < 1 or size % 2 == 0):
            raise ValueError(
                f"conv_kernel_size = {size}: it must be a positive odd number, the token itself and as many on each "
                f"side, or None for no convolution; use {max(1, size + 1)}."
            )
        if self.pinv_iterations is not None and self.pinv_iterations < 1:
            raise ValueError(
                f"pinv_iterations = {self.pinv_iterations}: it must be 1 or more, or None to invert exactly; published "
                "models have 6."
            )


class NystromformerSelfAttention(SelfAttention):
    """Nyström self-attention (Xiong et al. 2021, arXiv 2102.03902), plus a depthwise convolution of the values.

    The convolution has one kernel a head and runs over the tokens of an example, zeros beyond both ends. Tokens that
    are masked between others count as zeros there. There is no causal form: landmarks are means over the whole text.
    """

    options_class = NystromformerOptions
    is_estimate = True
    has_overwriting_form = True

    def __init__(self, config: Any, layer_idx: int, options: NystromformerOptions | None = None) -> None:
        super().__init__(config, layer_idx, options)
        self.options.check_options()
        self.conv = None
        if self.options.conv_kernel_size is not None:
            self.conv = nn.Conv2d(
                self.num_attention_heads,
                self.num_attention_heads,
                (self.options.conv_kernel_size, 1),
                padding=(self.options.conv_kernel_size // 2, 0),
                groups=self.num_attention_heads,
                bias=False,
            )

    @property
    def landmarks(self) -> dict[str, Any]:
        """The options, as the formulas take them."""
        return {
            "num_landmarks": self.options.num_landmarks,
            "pinv_iterations": self.options.pinv_iterations,
            "scale_per_matrix": self.options.inv_coeff_init_option,
        }

    def segments(self, hidden_states: Tensor, key_padding_mask: Tensor | None) -> Landmarks:
        """The segments of landmarks of `hidden_states` `[batch, length, hidden]`, the same in all layers."""
        return segment_landmarks(hidden_states[:, None], key_padding_mask, self.options.num_landmarks)

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
        overwrite: bool = False,
        segments: Landmarks | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`; the weights are those of the landmarks, without the convolution.

        `segments` are what `segments` gives, where they are prepared once for all layers.
        """
        weights = None
        if backend == "eager":
            mixed, weights = dense_nystrom_attention(
                query, key, value, key_padding_mask, dropout_p=dropout_p, **self.landmarks
            )
        else:
            options = {"dropout_p": dropout_p, "overwrite": overwrite, "segments": segments, **self.landmarks}
            mixed = nystrom_attention(query, key, value, key_padding_mask, **options)
        if self.conv is not None:
            mixed = self._add_nearby(mixed, value, key_padding_mask)
        return self.merge(mixed), weights

    def _add_nearby(self, mixed: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """The convolution of the values on top of `mixed`, which this may change where no gradient is wanted."""
        weight, plain = self.conv.weight, is_plain(self.conv, nn.Conv2d)
        if plain and in_reach(mixed) and mixed.dtype == value.dtype == weight.dtype:
            # Faster, and right: oneDNN's gradient of a kernel of 65 is not, in float32 beyond 64 tokens (torch 2.13).
            return cpu_add_nearby(mixed, value, weight[:, 0, :, 0], key_padding_mask)
        if plain and mixed.dtype == value.dtype and self._multiplies(value):
            return add_nearby(mixed, value, weight[:, 0, :, 0].to(value.dtype), key_padding_mask)
        near = self.conv(zero_padding(value, key_padding_mask))
        return mixed + zero_padding(near, key_padding_mask)

    def _multiplies(self, value: Tensor) -> bool:
        """Whether the convolution is to be matrix products: on a GPU, in the dtype that it has there."""
        weight, kind = self.conv.weight, value.device.type
        if kind not in _MULTIPLYING or torch.compiler.is_exporting():
            return False
        if not torch.compiler.is_compiling() and any(type(x) not in (Tensor, nn.Parameter) for x in (value, weight)):
            return False
        if torch.is_autocast_enabled(kind):
            return value.dtype == torch.get_autocast_dtype(kind)
        return value.dtype == weight.dtype
