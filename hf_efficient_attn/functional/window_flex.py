"""Sliding-window attention through torch's flex_attention: one fused kernel on CUDA, for inference on a CPU too."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .inputs import check_qkv, zero_padding
from .sliding_window import sliding_window_attention
from .tokens import TokenSlots
from .window_block_mask import window_block_mask


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
    in_graph = torch.compiler.is_compiling()
    in_cpu_graph, is_empty = in_graph and query.device.type == "cpu", not in_graph and key.shape[2] == 0
    if in_cpu_graph or is_empty or query.shape[2] < key.shape[2]:
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
