"""Work on each token alone, done for some tokens of a long text at a time."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


_INFERENCE_CHUNK = 1024


def inference_chunk(states: Tensor, *modules: nn.Module) -> int:
    """Tokens at a time that are quickest through `modules` on a CPU where no backward pass follows; 0 for all at once.

    Fresh memory for the inner states of a long text costs more than the work in it. Hooks see whole texts.
    """
    if torch.is_grad_enabled() or states.device.type != "cpu" or torch.compiler.is_compiling():
        return 0
    inner = (part for module in modules for part in module.modules())
    return 0 if any(x._forward_hooks or x._forward_pre_hooks for x in inner) else _INFERENCE_CHUNK


def in_chunks(function: Callable[..., Tensor], size: int, *states: Tensor) -> Tensor:
    """`function(*states)` for `size` tokens at a time; 0 for all at once.

    Args:
        function: takes `[batch or 1, tokens, ...]` each, returns `[batch, tokens, width]`; works on each token alone.
        size: tokens at a time.
        states: `[batch or 1, length, ...]` each.

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
    whole = first.new_empty(first.shape[0], length, first.shape[2])
    whole[:, :size] = first
    for index, part in enumerate(parts, start=1):
        whole[:, index * size : (index + 1) * size] = function(*part)
    return whole
