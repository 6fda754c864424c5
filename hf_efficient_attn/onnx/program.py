"""A model as a function of tensors that a graph is made of."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .inputs import ProgramInputs


class Program(nn.Module):
    """The model without what ONNX does not have: assertions, optional outputs, outputs within outputs.

    Where the model would raise, all outputs are NaN.
    """

    def __init__(self, model: PreTrainedModel, inputs: ProgramInputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs
        self.asks = {"use_cache": False} if hasattr(model.config, "use_cache") else {}

    def outputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name -> output; of outputs that are several, each with its number."""
        found: dict[str, Tensor] = {}
        for name, value in self.model(**inputs, **self.asks).items():
            if isinstance(value, Tensor):
                found[name] = value
            else:
                found |= {f"{name}.{number}": one for number, one in enumerate(value)}
        return found

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """As the model; outputs in the order of `outputs`."""
        with _Assertions() as assertions:
            found = self.outputs(inputs)
        holds = torch.stack([x.all() for x in (*assertions.found, *self.inputs.fits(inputs))] or [torch.tensor(True)])
        return tuple(torch.where(holds.all(), x, torch.nan) for x in found.values())


class _Assertions(TorchFunctionMode):
    """Collects what a model asserts of its input, which a graph for ONNX would leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch._assert_async:
            self.found.append(args[0])
            return None
        return function(*args, **(kwargs or {}))
