"""Work on each token alone, done for some tokens of a long text at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..cpu import TOKENS_AT_ONCE


TOKENS_FOR_MEMORY = 8192
"""Tokens at a time where not the time but the memory calls for it."""


def inference_chunk(states: Tensor, *modules: nn.Module, above: int) -> int:
    """Tokens at a time to send through `modules` where no backward pass follows; 0 for all at once.

    On a CPU it is what is quickest: fresh memory for the inner states of a long text costs more than the work in it;
    chunks are of one size, because a rest of a few tokens (a class token, say) would read all weights again. On other
    devices only what is longer than `above` goes in chunks. Hooks see whole texts.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    length, on_cpu = states.shape[1], states.device.type == "cpu"
    if not on_cpu and length <= above:
        return 0
    inner = [part for module in modules for part in module.modules()]
    if any(x._forward_hooks or x._forward_pre_hooks for x in inner):
        return 0
    if any(isinstance(x, nn.Dropout) and x.training and x.p > 0.0 for x in inner):
        # Reentrant gradient checkpointing calls forward without gradients first: the second call must drop the same.
        return 0
    size = TOKENS_AT_ONCE if on_cpu else TOKENS_FOR_MEMORY
    count = -(-length // (size + size // 8))
    return -(-length // max(1, count))


def in_chunks(function: Callable[..., Tensor], size: int, *states: Tensor, into: Tensor | None = None) -> Tensor:
    """`function(*states)` for `size` tokens at a time; 0 for all at once.

    Args:
        function: takes `[batch or 1, tokens, ...]` each, returns `[batch, tokens, width]`; works on each token alone.
        size: tokens at a time.
        states: `[batch or 1, length, ...]` each.
        into: where to put the result, if that is of its shape and dtype and in chunks; may be one of the `states`.

    Returns:
        `[batch, length, width]`.
    """
    length = states[0].shape[1]
    if not 0 < size < length:
        return function(*states)
    parts = zip(*(x.split(size, dim=1) for x in states), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts], dim=1)
    first = function(*next(parts))
    whole = into
    if into is None or (first.shape[0], length, first.shape[2]) != tuple(into.shape) or into.dtype != first.dtype:
        whole = first.new_empty(first.shape[0], length, first.shape[2])
    whole[:, :size] = first
    for index, part in enumerate(parts, start=1):
        whole[:, index * size : (index + 1) * size] = function(*part)
    return whole
