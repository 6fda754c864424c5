"""What transformers calls: the attention function of a mechanism, and the mask function of all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .mechanisms import MECHANISMS, Call, own_window
from .names import PREFIX
from .options import options_of
from .probe import is_probing, note_call


# Arguments that change what attention is. A model that uses one would silently become another model.
_UNSUPPORTED = ("position_bias", "softcap", "s_aux", "cache", "relative_position_bias")


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of keys, `[batch, kv_length]` bool, True = attend; None for all. Arguments as transformers gives them.

    Raises:
        ValueError: a pattern of the model's own that a mask of keys cannot say, or a cache with empty places.
    """
    if use_vmap:
        raise ValueError(_OWN_PATTERN)
    if mask_function is not bidirectional_mask_function:
        if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
            raise ValueError(
                f"the cache has {kv_length} places for {q_length} new tokens: a cache with empty places (StaticCache) "
                "does not work with eff: attention; leave cache_implementation unset, or pass a DynamicCache."
            )
        if mask_function is not causal_mask_function:
            _check_neighbours(mask_function, batch_size, q_length, q_offset, device)
    if attention_mask is None:
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


_OWN_PATTERN = (
    "the model asks for a mask of its own (packed examples, chunks, blocks that look ahead), which eff: attention "
    'cannot follow; give examples a row of their own with an attention_mask, or use attn_implementation="sdpa".'
)


def _check_neighbours(
    mask_function: Callable[..., Tensor], batch: int, length: int, offset: int, device: torch.device | str
) -> None:
    """Raises `ValueError` where a token may not attend the one before it, or some, not all, the one after it.

    Any causal or bidirectional window passes, packed examples, chunks and blocks do not. In a graph it is an assertion.
    """
    place = torch.arange(length, device=device)
    later, earlier = place + offset, (place - 1).clamp(min=0) + offset
    example = torch.arange(batch, device=device)[:, None]
    head = torch.zeros(1, dtype=torch.long, device=device)
    back = mask_function(example, head, later, earlier)
    ahead = mask_function(example, head, earlier, later).expand(batch, -1)
    inner = place > 0
    plain = back.all() & ((ahead | ~inner).all() | ~(ahead & inner).any())
    if torch.compiler.is_compiling():
        torch._assert_async(plain, _OWN_PATTERN)
    elif not plain:
        raise ValueError(_OWN_PATTERN)


def attend_inside(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention module's call.

    A layer that has a sliding window of its own keeps it, whatever the mechanism: it is what it was trained with, and
    linear in length already.

    Args:
        name: a row of `MECHANISMS`.
        module: the attention module; its `config` holds the options.
        query: `[batch, heads, queries, head_dim]`.
        key, value: `[batch, key heads, length, head_dim]`; the heads of `query` are a multiple.
        attention_mask: what `padding_mask` gave.
        dropout: dropout of the probabilities, 0 outside of training.
        scaling: factor of the scores.
        is_causal: no token attends a later one; the module's own attribute where it is None.
        sliding_window: keys on each side and the query's own, or None.
        kwargs: what else the model passes.

    Returns:
        `[batch, queries, heads, head_dim]`, and None: there are no weights.

    Raises:
        ValueError: what the mechanism cannot do.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = bool(causal) and getattr(module.config, "is_causal", True) is not False
    _check_call(name, module, query, key, attention_mask, causal, kwargs)
    note_call(module)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    call = Call(module, query, key, value, attention_mask, causal, scaling, dropout)
    if sliding_window is not None:
        mixed = own_window(call, sliding_window - 1)
    else:
        mixed = MECHANISMS[name].attend(call, options_of(module.config, name, MECHANISMS))
    return mixed.transpose(1, 2).contiguous(), None


def _check_call(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> None:
    implementation, who = PREFIX + name, type(module).__name__
    if causal and MECHANISMS[name].why_not_causal is not None:
        able = [PREFIX + other for other, row in MECHANISMS.items() if row.why_not_causal is None]
        raise ValueError(
            f"{implementation} has no causal form, which {who} needs: {MECHANISMS[name].why_not_causal}; choose one of "
            f"{', '.join(able)}."
        )
    config = module.config
    crosses = getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False)
    if crosses or (not causal and query.shape[2] != key.shape[2]):
        raise ValueError(
            f"{implementation} is self-attention, and {type(config).__name__} is that of a model with cross-attention; "
            "use it in encoders and in decoders without an encoder."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        if is_probing():  # no mask was given, so it is the model's
            raise ValueError(
                f"{who} makes a mask or bias of its own, of shape {list(attention_mask.shape)}, which {implementation} "
                "cannot follow; choose another model."
            )
        raise ValueError(
            f"{implementation} takes a mask of keys [batch, length], got one of shape {list(attention_mask.shape)}; "
            "pass the tokenizer's attention_mask, and with generate() leave cache_implementation unset."
        )
    for other in _UNSUPPORTED:
        if kwargs.get(other) is not None:
            raise ValueError(
                f"{who} calls attention with {other}, which {implementation} does not have; use another model, or "
                'attn_implementation="eager".'
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{implementation} has no attention weights to return; leave output_attentions False, or use "
            'set_attn_implementation("eager").'
        )
