"""Whether a model really calls the attention function that its config names."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..encoder.vision_configuration import pair
from ..modes import eval_mode


# While a model is probed: the modules that have called so far.
_probing: list[nn.Module] | None = None


def note_call(module: nn.Module) -> None:
    """Note that `module` called, if this is a probe."""
    if is_probing():
        _probing.append(module)


def is_probing() -> bool:
    """Whether this call is part of a probe: a tiny text, or an image of the model's own size."""
    return not torch.compiler.is_dynamo_compiling() and _probing is not None


@contextmanager
def _noting() -> Iterator[list[nn.Module]]:
    global _probing
    before, _probing = _probing, []
    try:
        yield _probing
    finally:
        _probing = before


def calling_modules(model: PreTrainedModel) -> list[nn.Module] | None:
    """The modules that call an `eff:` function when `model` runs on a tiny input, or its parts where it cannot.

    Nothing is changed, torch's generators neither: some models draw in evaluation too. None where no part runs on a
    tiny input.

    Raises:
        ValueError: what the functions raise.
    """
    devices = {x.device for x in model.parameters() if x.device.type in ("cuda", "xpu")}
    kind = next((device.type for device in devices), "cuda")
    with eval_mode(model), torch.random.fork_rng(devices, device_type=kind):
        called = _run(model)
        if called is not None:
            return called
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
        runs = [called for part in parts if (called := _run(part)) is not None]
        return sum(runs, []) if runs else None


def _run(model: PreTrainedModel) -> list[nn.Module] | None:
    inputs = _tiny_input(model)
    if inputs is None:
        return None
    with _noting() as called, torch.no_grad():
        try:
            model(**inputs)
        except Exception as error:
            if _comes_from_attention(error):
                raise
            return None  # it wants other inputs
    return called


def _comes_from_attention(error: Exception) -> bool:
    where = error.__traceback__
    while where is not None:
        if where.tb_frame.f_globals.get("__package__") == __package__ and where.tb_frame.f_globals is not globals():
            return True
        where = where.tb_next
    return False


def _tiny_input(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """One short text, or one blank image, as `model` takes it."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        return None
    if model.main_input_name == "input_ids":
        return {"input_ids": torch.ones(1, 4, dtype=torch.long, device=parameter.device)}
    if model.main_input_name == "pixel_values":
        sizes = [getattr(model.config, name, None) for name in ("image_size", "num_channels")]
        if None not in sizes:
            return {
                "pixel_values": torch.zeros(1, sizes[1], *pair(sizes[0]), device=parameter.device, dtype=model.dtype)
            }
    return None


def modules_with_the_interface(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose `forward` looks up transformers' table of attention functions, by its code."""
    return [module for module in model.modules() if "ALL_ATTENTION_FUNCTIONS" in _names_in(type(module))]


def _names_in(kind: type[nn.Module]) -> tuple[str, ...]:
    function = kind.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    return () if code is None else code.co_names
