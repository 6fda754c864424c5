"""Longformer: a sliding window, and global tokens with projections of their own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import (
    TokenSlots,
    dense_attention,
    gather_tokens,
    projected_attention,
    replace_tokens,
    select_tokens,
    sliding_window_allowed,
    sliding_window_attention,
)
from .base import SelfAttention


@dataclass(kw_only=True)
class LongformerOptions:
    """Options of Longformer attention; defaults of the published base model.

    Args:
        attention_window: total width of the window as published, `attention_window // 2` keys on each side; even; one
            number, or one a layer.
        attention_dilation: distance of neighbouring keys in a window; one number, or one entry a layer, each a number
            or a list with one number a head. Published encoders have 1.
    """

    attention_window: int | list[int] = 512
    attention_dilation: int | list[int | list[int]] = 1

    def check_options(self, num_layers: int, num_heads: int) -> None:
        """Raises `ValueError` for windows or dilations that do not fit `num_layers` layers of `num_heads` heads."""
        for name in ("attention_window", "attention_dilation"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != num_layers:
                raise ValueError(
                    f"{name} has {len(value)} entries for {num_layers} layers; give one number or one entry a layer."
                )
        for layer in range(num_layers):
            window = self.window_of(layer)
            if window <= 0 or window % 2 != 0:
                raise ValueError(
                    f"attention_window = {window} (layer {layer}): the total width must be a positive even number, "
                    f"half of it on each side; use {max(2, window + 1)}."
                )
            dilation = self.dilation_of(layer)
            if isinstance(dilation, list) and len(dilation) != num_heads:
                raise ValueError(
                    f"attention_dilation of layer {layer} has {len(dilation)} entries for {num_heads} heads; "
                    "give one number or one a head."
                )
            if min(dilation if isinstance(dilation, list) else [dilation]) < 1:
                raise ValueError(f"attention_dilation = {dilation} (layer {layer}): each entry must be 1 or more.")

    def window_of(self, layer: int) -> int:
        """Total window width of `layer`."""
        return self.attention_window[layer] if isinstance(self.attention_window, list) else self.attention_window

    def dilation_of(self, layer: int) -> int | list[int]:
        """Dilation of `layer`, one number or one a head."""
        return self.attention_dilation[layer] if isinstance(self.attention_dilation, list) else self.attention_dilation


class LongformerSelfAttention(SelfAttention):
    """Longformer self-attention (Beltagy, Peters & Cohan 2020, arXiv 2004.05150).

    A token attends its window and the global tokens, in one softmax with the local projections. The row of a global
    token is attention over all tokens with `query_global`, `key_global` and `value_global`.
    """

    options_class = LongformerOptions

    def __init__(self, config: Any, layer_idx: int, options: LongformerOptions | None = None) -> None:
        super().__init__(config, layer_idx, options)
        self.radius = self.options.window_of(layer_idx) // 2
        self.dilation = self.options.dilation_of(layer_idx)
        self.query_global = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_global = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_global = nn.Linear(config.hidden_size, config.hidden_size)

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
        global_tokens: TokenSlots | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`; `global_tokens` as in `sliding_window_attention`."""
        batch, length, _ = hidden_states.shape
        if global_tokens is None:
            # No slots: the global projections still take part, with nothing to project, so their gradient is 0.
            nowhere = torch.zeros(batch, length, dtype=torch.bool, device=hidden_states.device)
            global_tokens = select_tokens(nowhere, 0)
        rows, row_weights = projected_attention(
            self.split(self.query_global(gather_tokens(hidden_states, global_tokens.index))),
            hidden_states,
            key_padding_mask,
            key_weight=self.key_global.weight,
            key_bias=self.key_global.bias,
            value_weight=self.value_global.weight,
            value_bias=self.value_global.bias,
            dropout_p=dropout_p,
        )
        if backend == "sdpa":
            mixed = sliding_window_attention(
                query,
                key,
                value,
                key_padding_mask,
                dropout_p=dropout_p,
                radius=self.radius,
                dilation=self.dilation,
                global_tokens=global_tokens,
            )
            return self.merge(replace_tokens(mixed, rows, global_tokens)), None
        shape = {"radius": self.radius, "dilation": self.dilation}
        allowed = sliding_window_allowed(key, key_padding_mask, global_tokens, **shape)
        mixed, weights = dense_attention(query, key, value, allowed, dropout_p=dropout_p)
        weights = replace_tokens(weights, row_weights, global_tokens)
        return self.merge(replace_tokens(mixed, rows, global_tokens)), weights
