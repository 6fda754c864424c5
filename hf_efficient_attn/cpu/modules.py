"""Whether a kernel of a CPU may do the work of torch's own operations and modules."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks


# Tokens at a time: what is between the products of so many is below the size that malloc maps anew each time.
TOKENS_AT_ONCE = 1024


def in_reach(tensor: Tensor) -> bool:
    """Whether it is one for the kernels: on a CPU, in eager mode, in float32 or float64, whole (no `DTensor`)."""
    own = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)
    return own and type(tensor) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()


def in_reach_of_training(states: Tensor) -> bool:
    """Whether besides a graph is made, in the tensor's own dtype."""
    return torch.is_grad_enabled() and in_reach(states) and not torch.is_autocast_enabled("cpu")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is `kind` itself, with no hooks, so that another way of doing the same is not noticed."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # Some libraries set a `forward` on the module, such as one that fetches weights first.
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


def is_recorder(hook: Callable) -> bool:
    """Whether it is a hook with which transformers records outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def can_overwrite(states: Tensor, maker: nn.Module, *others: Tensor) -> bool:
    """Whether nobody but the caller has `states`, which `maker` made, so that the next may replace them.

    Not where a backward pass may follow, where a hook could have kept them, or where they are in the memory of
    `others`. Hooks of transformers do not count: what they record is known where it is asked for.
    """
    if torch.is_grad_enabled() or states.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if _global_forward_hooks or _global_forward_pre_hooks:
        return False
    for part in maker.modules():
        hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if any(not is_recorder(hook) for hook in hooks):
            return False
    try:
        own, *taken = (x.untyped_storage().data_ptr() for x in (states, *others))
    except NotImplementedError:  # the tensors of torch.func show no memory
        return False
    return own not in taken


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products inside keep the dtype of their factors; devices that have no autocast (meta) need nothing."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
