"""Rows and columns of the tokens of another model's image, and how many tokens come before them."""

import torch
from torch import nn

from ..encoder.vision_configuration import pair
from .layers import models_around
from .options import NeighborhoodInsideOptions
from .probe import calling_modules, is_probing


# On modules: a number, so that copies of a model keep it.
_FRONT = "_efficient_attention_front"


def grid_of(options: NeighborhoodInsideOptions, module: nn.Module, length: int) -> tuple[tuple[int, int], int]:
    """Rows and columns for inputs of `length` tokens to `module`, and how many tokens come before them.

    The second is measured once, at the model's own image size, and is the same at every other.

    Raises:
        ValueError: no grid is known, or `length` is not that of the grid.
    """
    config = module.config
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    native = None if None in sizes else tuple(image // patch for image, patch in zip(*map(pair, sizes), strict=True))
    if options.grid is None and native is None:
        raise ValueError(
            f"eff:neighborhood needs tokens in rows and columns, and a {type(config).__name__} has no "
            "image_size and patch_size; choose 'sliding_window', or give grid=[rows, columns]."
        )
    probing = is_probing()
    # A probe is an image of the model's own size, whatever the option says.
    rows, columns = native if probing and native is not None else options.grid or native
    if probing or native is None:
        front = length - rows * columns
        if front >= 0 and native is not None:
            setattr(module, _FRONT, front)
        fits = front >= 0
    else:
        front = _front_of(module)
        fits = length == front + rows * columns
    if not fits:
        before = f" and {front} before them" if front > 0 else ""
        raise ValueError(
            f"eff:neighborhood has a grid of {rows} x {columns} patches{before}, but the input has {length} tokens; "
            "give grid=[rows, columns] of this input's patches."
        )
    return (rows, columns), front


def _front_of(module: nn.Module) -> int:
    front = getattr(module, _FRONT, None)
    if front is None:
        # The identity is part of the call so that a compiled layer is not taken for another one.
        front = _measured_front(module, id(module))
    return front


@torch.compiler.assume_constant_result
def _measured_front(module: nn.Module, identity: int) -> int:
    """Run the models that `module` is in, inner ones first, until one notes the number at it."""
    # Whatever mode the first caller is in.
    with torch.no_grad(), torch._C._DisableTorchDispatch():
        for model in models_around(module):
            calling_modules(model)
            if (front := getattr(module, _FRONT, None)) is not None:
                return front
    raise ValueError(
        f"eff:neighborhood cannot tell how many tokens of {type(module).__name__} come before its patches: no model "
        "around it runs on an image of its config's size; choose another mechanism."
    )
