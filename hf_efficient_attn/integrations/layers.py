"""Which layer an attention module of another model is, and the random numbers that follow from it."""

import gc

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..attention.performer import draw_projection


# On modules without an index of their own; a number, so that copies of a model keep it.
_NUMBER = "_efficient_attention_layer"


def layer_of(module: nn.Module) -> int:
    """The order of an attention module among the attention modules of its model, from 0."""
    index = getattr(module, "layer_idx", None)
    if index is None:
        index = getattr(module, _NUMBER, None)
    if index is None:
        # The identity is part of the call so that a compiled layer is not taken for another one.
        index = _found_number(module, id(module), torch.compiler.is_compiling())
    return index


@torch.compiler.assume_constant_result
def _found_number(module: nn.Module, identity: int, compiling: bool) -> int:
    models = [(model, number_layers(model)) for model in _living_models()]
    models = [(model, numbers) for model, numbers in models if identity in numbers]
    if not models:
        raise ValueError(
            f"this {type(module).__name__} belongs to no model of transformers, so its order is not known; set its "
            "layer_idx."
        )
    # The innermost one: it is what stays the same, whatever it is built into.
    model, numbers = min(models, key=lambda found: len(found[1]))
    if not compiling:
        keep_numbers(model, numbers)
    return numbers[identity]


def number_layers(model: PreTrainedModel) -> dict[int, int]:
    """The order of every module that has `model`'s own config, by its id.

    Only modules of one class count together. A part with another config is a model of its own, in whatever it is built.
    """
    counts: dict[type, int] = {}
    numbers = {}
    for module in model.modules():
        if getattr(module, "config", None) is model.config and not isinstance(module, PreTrainedModel):
            numbers[id(module)] = counts.get(type(module), 0)
            counts[type(module)] = numbers[id(module)] + 1
    return numbers


def keep_numbers(model: nn.Module, numbers: dict[int, int]) -> None:
    """Write the order down at the modules that do not have it anyway."""
    for module in model.modules():
        if id(module) in numbers and getattr(module, "layer_idx", None) is None:
            setattr(module, _NUMBER, numbers[id(module)])


def models_around(module: nn.Module) -> list[PreTrainedModel]:
    """The models that `module` is in, inner ones first."""
    sizes = [(sum(1 for _ in model.modules()), model) for model in _living_models() if module in set(model.modules())]
    return [model for _, model in sorted(sizes, key=lambda found: found[0])]


def _living_models() -> list[PreTrainedModel]:
    """Every model of this process: a module does not know what it is part of."""
    return [x for x in gc.get_objects() if issubclass(type(x), PreTrainedModel) and "_modules" in vars(x)]


class _Projections:
    """What has been drawn so far, an attribute each: a graph can look those up as they come, entries of a table not."""


_PROJECTIONS = _Projections()


def projection_of(
    layer: int, features: int, head_dim: int, *, orthogonal: bool, seed: int, device: torch.device
) -> Tensor:
    """The projection `[features, head_dim]` of a layer, float32 on `device`: a pure function of the other arguments.

    It is drawn once a device and kept outside of every model.
    """
    kind = "orthogonal" if orthogonal else "independent"
    name = f"{kind}_{features}_{head_dim}_{seed}_{layer}_{device.type}_{device.index}"
    _keep_projection(name, layer, features, head_dim, orthogonal, seed, device)
    return getattr(_PROJECTIONS, name)


@torch.compiler.assume_constant_result
def _keep_projection(
    name: str, layer: int, features: int, head_dim: int, orthogonal: bool, seed: int, device: torch.device
) -> None:
    if not hasattr(_PROJECTIONS, name):
        # Not a tensor of whatever mode the first caller is in: it outlives that.
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableTorchDispatch():
            drawn = draw_projection(features, head_dim, orthogonal=orthogonal, seed=seed, layer=layer, redraw=0)
            setattr(_PROJECTIONS, name, drawn.float().to(device))
