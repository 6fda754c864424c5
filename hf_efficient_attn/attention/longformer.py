"""Longformer: a sliding window, and global tokens with projections of their own."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cpu import add_idle, can_add_idle, is_plain
from ..functional import (
    TokenSlots,
    dense_attention,
    flex_sliding_window_attention,
    gather_tokens,
    projected_attention,
    replace_tokens,
    select_tokens,
    sliding_window_allowed,
    sliding_window_attention,
)
from .base import SelfAttention
from .prefix import Prefix


if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.cache_utils import Cache

    from .cache import WindowCacheLayer


@dataclass(kw_only=True)
class LongformerOptions:
    """Options of Longformer attention; defaults of the published base model.

    Args:
        attention_window: total width of the window as published, `attention_window // 2` keys on each side; even; one
            number, or one a layer.
        attention_dilation: distance of neighbouring keys in a window; one number, or one entry a layer, each a number
            or a list with one number a head. Published encoders have 1.
        causal_global: `"prefix"` lets the first tokens of an example be global in the causal form; None, as in the
            paper's language models, allows no global tokens there. Without meaning for encoders.
    """

    attention_window: int | list[int] = 512
    attention_dilation: int | list[int | list[int]] = 1
    causal_global: str | None = None

    def check_options(self, num_layers: int, num_heads: int) -> None:
        """Raises `ValueError` for windows or dilations that do not fit `num_layers` layers of `num_heads` heads."""
        for name in ("attention_window", "attention_dilation"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != num_layers:
                raise ValueError(
                    f"{name} has {len(value)} entries for {num_layers} layers; give one number or one entry a layer."
                )
        if self.causal_global not in (None, "prefix"):
            raise ValueError(f"causal_global = {self.causal_global!r}: choose 'prefix' or None.")
        for layer in range(num_layers):
            window = self.window_of(layer)
            check_window(window, f" (layer {layer})")
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


def check_window(window: int, where: str = "") -> None:
    """Raises `ValueError` for a total width that no window has; `where` stands behind it in the message."""
    if window <= 0 or window % 2 != 0:
        raise ValueError(
            f"attention_window = {window}{where}: the total width must be a positive even number, half of it on each "
            f"side; use {max(2, window + 1)}."
        )


class LongformerSelfAttention(SelfAttention):
    """Longformer self-attention (Beltagy, Peters & Cohan 2020, arXiv 2004.05150).

    A token attends its window and the global tokens, in one softmax with the local projections. The row of a global
    token is attention over all tokens with `query_global`, `key_global` and `value_global`.

    In the causal form (`is_decoder`) the window looks back only. The paper's language models have no global tokens;
    with `causal_global="prefix"` the first tokens of an example may be global: all later tokens attend them, and they
    attend each other, up to themselves, with the global projections.
    """

    options_class = LongformerOptions
    backends = ("eager", "sdpa", "flex_attention")
    has_causal_form = True
    has_overwriting_form = True
    wants = ("global_tokens",)

    def __init__(self, config: Any, layer_idx: int, options: LongformerOptions | None = None) -> None:
        super().__init__(config, layer_idx, options)
        self.radius = self.options.window_of(layer_idx) // 2
        self.dilation = self.options.dilation_of(layer_idx)
        self.query_global = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_global = nn.Linear(config.hidden_size, config.hidden_size)
        self.value_global = nn.Linear(config.hidden_size, config.hidden_size)

    @classmethod
    def check(cls, options: LongformerOptions, config: Any) -> None:
        """See `SelfAttention.check`."""
        options.check_options(config.num_hidden_layers, config.num_attention_heads)

    @property
    def window(self) -> dict[str, Any]:
        """The window, as the formulas take it."""
        return {"radius": self.radius, "dilation": self.dilation, "causal": self.is_causal}

    def make_cache_layer(self) -> "WindowCacheLayer":
        """An empty cache: the window's reach, and a prefix of global tokens."""
        from .cache import WindowCacheLayer  # loads transformers' caches: not for a config or an encoder

        steps = self.dilation if isinstance(self.dilation, list) else [self.dilation]
        return WindowCacheLayer(self.radius * max(steps))

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
        past_key_values: "Cache | None" = None,
        block_masks: "dict[str, BlockMask] | None" = None,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`; `global_tokens` and `overwrite` as in `sliding_window_attention`.

        `block_masks` are flex_attention's, by the `repr` of the `window`, for inputs without a cache from before.
        """
        options = (dropout_p, backend, block_masks, overwrite)
        batch, length, _ = hidden_states.shape
        if global_tokens is None:
            maps = (self.query_global, self.key_global, self.value_global)
            alone = not torch.is_grad_enabled() or can_add_idle(value, maps)
            if past_key_values is None and alone:
                mixed, weights = self._windows(query, key, value, key_padding_mask, None, length, *options)
                mixed = self.merge(mixed)
                return add_idle(mixed, maps) if torch.is_grad_enabled() else mixed, weights
            # No slots: the global projections still take part, with nothing to project, so their gradient is 0.
            nowhere = torch.zeros(batch, length, dtype=torch.bool, device=hidden_states.device)
            global_tokens = select_tokens(nowhere, 0)
        columns = global_tokens
        global_states = gather_tokens(hidden_states, global_tokens.index)
        global_query = self.split(self.query_global(global_states))
        if self.is_causal:
            prefix = self._prefix(global_states, key, value, global_tokens)
            if past_key_values is not None:
                prefix = self._cached_prefix(past_key_values, prefix, global_tokens.index)
                key, value = past_key_values.update(key, value, self.layer_idx)
                seen = past_key_values.get_seq_length(self.layer_idx)
                key, value, key_padding_mask, columns = _behind_prefix(key, value, key_padding_mask, prefix, seen)
            rows, row_weights = self._causal_rows(global_query, prefix, columns, dropout_p)
        else:
            rows, row_weights = self._global_rows(global_query, hidden_states, key_padding_mask, dropout_p)
        mixed, weights = self._windows(query, key, value, key_padding_mask, columns, length, *options)
        if weights is not None:
            weights = replace_tokens(weights, row_weights, global_tokens)
        return self.merge(replace_tokens(mixed, rows, global_tokens, overwrite)), weights

    def _windows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        columns: TokenSlots | None,
        length: int,
        dropout_p: float,
        backend: str,
        block_masks: "dict[str, BlockMask] | None",
        overwrite: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to windows and `columns`: `[batch, heads, length, head_dim]`, and from eager the weights."""
        options = {"dropout_p": dropout_p, "global_tokens": columns, **self.window}
        if backend == "eager":
            allowed = sliding_window_allowed(key, key_padding_mask, columns, queries=length, **self.window)
            return dense_attention(query, key, value, allowed, dropout_p=dropout_p)
        if backend == "flex_attention":
            block_mask = None if block_masks is None else block_masks[repr(self.window)]
            return flex_sliding_window_attention(
                query, key, value, key_padding_mask, block_mask=block_mask, **options
            ), None
        mixed = sliding_window_attention(query, key, value, key_padding_mask, overwrite=overwrite, **options)
        return mixed, None

    def _global_rows(
        self, query: Tensor, hidden_states: Tensor, key_padding_mask: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """Rows of an encoder's global tokens: attention over all tokens, with the global projections.

        Returns:
            `[batch, heads, slots, head_dim]` and the weights `[batch, heads, slots, length]`.
        """
        if is_plain(self.key_global, nn.Linear) and is_plain(self.value_global, nn.Linear):
            return projected_attention(
                query,
                hidden_states,
                key_padding_mask,
                key_weight=self.key_global.weight,
                key_bias=self.key_global.bias,
                value_weight=self.value_global.weight,
                value_bias=self.value_global.bias,
                dropout_p=dropout_p,
            )
        # Adapters, hooks and whatever else stands in for a linear map is more than a weight and a bias.
        allowed = None
        if key_padding_mask is not None:
            allowed = key_padding_mask[:, None, None, :]
            hidden_states = hidden_states.masked_fill(~key_padding_mask[:, :, None], 0.0)
        key, value = self.split(self.key_global(hidden_states)), self.split(self.value_global(hidden_states))
        return dense_attention(query, key, value, allowed, dropout_p=dropout_p)

    def _prefix(self, states: Tensor, key: Tensor, value: Tensor, global_tokens: TokenSlots) -> Prefix:
        """The input's own global tokens, whose `states` are `[batch, slots, hidden]`."""
        return Prefix(
            gather_tokens(key, global_tokens.index),
            gather_tokens(value, global_tokens.index),
            self.split(self.key_global(states)),
            self.split(self.value_global(states)),
            global_tokens.valid[:, None, :, None],
        )

    def _cached_prefix(self, past_key_values: "Cache", prefix: Prefix, index: Tensor) -> Prefix:
        """The global tokens of this input and of those before it; kept in the cache."""
        layer = self.own_layer(past_key_values)
        if hasattr(layer, "extend_prefix"):
            return layer.extend_prefix(prefix, index)
        if prefix.valid.shape[2] > 0:
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, which has no place for global tokens; pass "
                "model.make_cache(), or none and use_cache=True."
            )
        return prefix

    def _causal_rows(
        self, query: Tensor, prefix: Prefix, columns: TokenSlots, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """Rows of the input's global tokens: attention over the prefix up to themselves, with the global projections.

        Returns:
            `[batch, heads, slots, head_dim]`, and the weights over the keys that `columns` stand for.
        """
        slots = query.shape[2]
        before = prefix.valid.shape[2] - slots
        order = torch.arange(before + slots, device=query.device)
        allowed = prefix.valid.transpose(2, 3) & (order[None, :] <= order[before:, None])
        rows, weights = dense_attention(query, prefix.global_key, prefix.global_value, allowed, dropout_p=dropout_p)
        keys = weights.new_zeros(*weights.shape[:3], columns.mask.shape[1])
        return rows, keys.scatter_add(3, columns.index[:, None, None, :].expand_as(weights), weights)


def _behind_prefix(
    key: Tensor, value: Tensor, key_padding_mask: Tensor | None, prefix: Prefix, seen: int
) -> tuple[Tensor, Tensor, Tensor | None, TokenSlots]:
    """Cached keys and values with those of the prefix in front, where they stand for good.

    `key_padding_mask` covers the `seen` tokens so far; the result covers the keys. A global token that the window still
    holds as well counts only in front.
    """
    batch, slots, kept = key.shape[0], prefix.valid.shape[2], key.shape[2]
    in_front = torch.arange(slots, device=key.device).expand(batch, -1)
    valid = prefix.valid[:, 0, :, 0]
    mask = torch.cat([valid, valid.new_zeros(batch, kept)], dim=1)
    columns = TokenSlots(mask, in_front, valid)
    if slots == 0:
        return key, value, None if key_padding_mask is None else key_padding_mask[:, -kept:], columns
    if key_padding_mask is None:
        key_padding_mask = valid.new_ones(batch, seen)
    is_prefix = key_padding_mask.long().cumsum(dim=1) <= valid.sum(dim=1, keepdim=True)
    counted = torch.cat([valid, (key_padding_mask & ~is_prefix)[:, -kept:]], dim=1)
    return torch.cat([prefix.key, key], dim=2), torch.cat([prefix.value, value], dim=2), counted, columns
