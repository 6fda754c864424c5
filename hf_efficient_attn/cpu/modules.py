"""Whether a kernel may do the work of one of torch's modules."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is `kind` itself, with no hooks, so that another way of doing the same is not noticed."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # Some libraries set a `forward` on the module, such as one that fetches weights first.
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)
