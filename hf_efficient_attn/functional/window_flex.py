"""Sliding-window attention through torch's flex_attention: one fused kernel on CUDA, for inference on a CPU too."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .inputs import check_qkv, count_blocks, zero_padding
from .sliding_window import sliding_window_attention
from .tokens import TokenSlots
from .window import head_dilations, keys_in_windows, make_window


_BLOCK = 128  # of queries and of keys; flex_attention's own default


def flex_sliding_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    radius: int,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
    global_tokens: TokenSlots | None = None,
    block_mask: BlockMask | None = None,
) -> Tensor:
    """The same function as `sliding_window_attention`, through one fused kernel.

    Queries over cached keys go through that one, and so does a graph compiled for a CPU, where torch 2.13 cannot
    compile this kernel together with what is around it.

    Args:
        block_mask: what `window_block_mask` gives for the same arguments, to share it between layers.

    Raises:
        ValueError: as there; dropout, which flex_attention does not have; gradients on a CPU.
    """
    shape = {"radius": radius, "dilation": dilation, "causal": causal}
    check_qkv(query, key, value, key_padding_mask, last_queries=causal)
    if dropout_p > 0.0:
        raise ValueError(
            f"dropout_p = {dropout_p}: flex_attention has no dropout of probabilities; set it to 0 "
            "(attention_probs_dropout_prob=0.0 in a config), or use the sdpa backend."
        )
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if wants_grad and query.device.type == "cpu":
        raise ValueError(
            "flex_attention on a CPU is for inference only, and these tensors want gradients; call it under "
            "torch.no_grad(), or use the sdpa backend (attn_implementation='sdpa')."
        )
    in_cpu_graph = torch.compiler.is_compiling() and query.device.type == "cpu"
    if in_cpu_graph or query.shape[2] < key.shape[2]:
        options = {"scale": scale, "global_tokens": global_tokens, **shape}
        return sliding_window_attention(query, key, value, key_padding_mask, **options)
    if block_mask is None:
        block_mask = window_block_mask(key, key_padding_mask, global_tokens, **shape)
    if not wants_grad:
        query, key, value = (x.detach() for x in (query, key, value))
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled_kernel(query.device.type)
    return zero_padding(kernel(query, key, value, block_mask=block_mask, scale=scale), key_padding_mask)


@cache
def _compiled_kernel(device: str) -> Any:
    # Without compilation flex_attention holds the whole matrix of scores. Its kernel for a CPU does not compile with
    # dynamic shapes (torch 2.13), so there each new shape is compiled anew.
    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)


def window_block_mask(
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    global_tokens: TokenSlots | None = None,
    *,
    radius: int,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
) -> BlockMask:
    """Which blocks of keys a block of queries needs, and the rule within them.

    Of `key` `[batch, heads, length, head_dim]` only the shape and device count. The blocks are found by arithmetic,
    not from a matrix of pairs: memory O(batch * (length / 128)^2).
    """
    batch, heads, length = key.shape[:3]
    window, dilations = make_window(radius, causal), head_dilations(dilation, heads)
    every = torch.ones(batch, length, dtype=torch.bool, device=key.device)
    counted = keys_in_windows(key_padding_mask, global_tokens)
    counted = every if counted is None else counted
    is_global = ~every if global_tokens is None else global_tokens.mask
    # Tensors, because the kernel would be compiled again for each new number.
    steps = torch.tensor(dilations, device="cpu").to(key.device, non_blocking=True)
    before, after = -window.back * steps, window.ahead * steps

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = k - q
        near = (distance >= before[h]) & (distance <= after[h]) & (distance % steps[h] == 0)
        pair = (near & counted[b, k]) | is_global[b, k]
        return pair & (distance <= 0) if causal else pair

    blocks = count_blocks(length, _BLOCK)
    index = torch.arange(blocks, device=key.device)
    distance = (index[None, :] - index[:, None]) * _BLOCK  # from a query block's first token to a key block's
    nearest, farthest = distance - (_BLOCK - 1), distance + (_BLOCK - 1)  # of any pair of their tokens
    reach = max(dilations)
    in_reach = (farthest >= -window.back * reach) & (nearest <= window.ahead * reach)
    needed = in_reach | _by_block(is_global, blocks).any(dim=2)[:, None, :]
    whole = (nearest >= -window.back) & (farthest <= window.ahead) & (reach == 1)
    whole = whole & _by_block(counted, blocks).all(dim=2)[:, None, :]
    if causal:
        needed = needed & (nearest <= 0)
    partial_blocks, whole_blocks = _block_lists(needed & ~whole), _block_lists(needed & whole)
    return BlockMask.from_kv_blocks(
        *partial_blocks, *whole_blocks, BLOCK_SIZE=_BLOCK, mask_mod=allowed, seq_lengths=(length, length)
    )


def _by_block(mask: Tensor, blocks: int) -> Tensor:
    """`[batch, length]` -> `[batch, blocks, _BLOCK]`, False after the end."""
    return F.pad(mask, (0, blocks * _BLOCK - mask.shape[1])).unflatten(1, (blocks, _BLOCK))


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the chosen key blocks of each query block, and which they are, those first: flex_attention's form."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]
