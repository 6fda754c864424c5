"""Checks and padding steps that every formula shares."""

from collections.abc import Iterable

import torch
from torch import Tensor


def check_qkv(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, *, last_queries: bool = False
) -> None:
    """Raises `ValueError` unless all are `[batch, heads, length, head_dim]` with a `[batch, length]` bool mask.

    With `last_queries` the query may be shorter: the last rows of the sequence of keys.
    """
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ValueError(
            "query, key and value must be [batch, heads, length, head_dim], got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; split the heads before the call."
        )
    shorter = last_queries and query.shape[2] < key.shape[2]
    expected = (*key.shape[:2], query.shape[2], key.shape[3]) if shorter else key.shape
    if tuple(query.shape) != tuple(expected) or value.shape != key.shape:
        raise ValueError(
            "self-attention needs query, key and value of one shape, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    check_key_padding_mask(key_padding_mask, key.shape[0], key.shape[2])


def check_key_padding_mask(key_padding_mask: Tensor | None, batch: int, length: int) -> None:
    """Raises `ValueError` for a mask that is not bool `[batch, length]`."""
    if key_padding_mask is None:
        return
    expected = (batch, length)
    if tuple(key_padding_mask.shape) != expected or key_padding_mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask must be a bool tensor of shape [batch, length] = {list(expected)}, True = attend, "
            f"got {key_padding_mask.dtype} of shape {list(key_padding_mask.shape)}; convert with `mask.bool()`."
        )


def check_prepared(what: str, facts: Iterable[tuple[str, object, object]], advice: str) -> None:
    """Raises `ValueError` where something was prepared for other inputs than those of a call.

    `facts` are names, what it was made for and what the call has; `what` and `advice` frame the message.
    """
    for name, made, given in facts:
        if made != given:
            raise ValueError(f"{what} made for {name} = {made}, but this call has {name} = {given}: {advice}")


def zero_padding(tensor: Tensor, key_padding_mask: Tensor | None, overwrite: bool = False) -> Tensor:
    """`tensor` `[batch, heads, length, head_dim]` with 0 at padding, so that not even inf or NaN there counts.

    With `overwrite` in the same memory, else in new memory where there is a mask.
    """
    if key_padding_mask is None:
        return tensor
    fill = tensor.masked_fill_ if overwrite else tensor.masked_fill
    return fill(~key_padding_mask[:, None, :, None], 0.0)


def masked_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask of `allowed`: 0 where True, the most negative finite number of `dtype` where False.

    Finite, because a row of -inf alone makes NaN in some kernels; callers zero such rows.
    """
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min)


def count_blocks(length: int, block: int) -> int:
    """Blocks of size `block` that cover `length`.

    One more while compiling or exporting: a count that might be 1 makes the graph special to short inputs.
    """
    blocks = (length + block - 1) // block
    return blocks + 1 if torch.compiler.is_compiling() else blocks
