"""Vision families through torch.compile and torch.export: whole graphs, dynamic batch, height and width."""

import pytest
import torch
from helpers import random_images
from test_vision_families import FAMILY, HEADS, MECHANISM, batch_of, build, one_layer_of, result_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient_attn.attention import ATTENTIONS
from hf_efficient_attn.auto import VISION_FAMILIES


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


class Exported(nn.Module):
    """Positional inputs and plain tensors out, as torch.export wants them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return result_of(self.model, inputs)


# The frame, with the mechanism for images and with one that knows no grid. Each of the others in a graph is in
# test_compile.py, and in this frame as a program below.
@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize(("mechanism", "masked"), [("neighborhood", True), ("softmax", True), ("softmax", False)])
@torch.no_grad()
def test_compiles_as_one_graph_with_dynamic_shapes(
    family: str, mechanism: str, masked: bool, fresh_compiler: None
) -> None:
    function = Exported(build(family, "AutoModel", mechanism, **one_layer_of(mechanism)))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, height, width in [(2, 20, 28), (3, 16, 12), (2, 36, 44)]:
        inputs = {"pixel_values": random_images(batch, height, width)}
        if masked:
            inputs["patch_mask"] = torch.ones(batch, height // 4, width // 4, dtype=torch.long)
            inputs["patch_mask"][-1, 2:], inputs["patch_mask"][-1, :, 3:] = 0, 0
        found, right = compiled(inputs), function(inputs)
        if masked:
            keep = torch.cat([torch.ones(batch, 2), inputs["patch_mask"].flatten(1)], dim=1).bool()
            found, right = found[keep], right[keep]
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@FAMILY
@MECHANISM
def test_compiled_training_gives_equal_gradients(family: str, mechanism: str, fresh_compiler: None) -> None:
    auto = "AutoModelForImageClassification"
    model = build(family, auto, mechanism).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch_of(auto, 2, 20, 28)
    right = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    ours = torch.autograd.grad(compiled(**inputs).loss, list(model.parameters()))
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Heads do not know the mechanism: each of both in a program, not each pair.
PROGRAMS = [
    (family, auto, mechanism, uneven_size)
    for family, auto in HEADS
    for mechanism in ATTENTIONS
    for uneven_size in ("pad", "refuse")
    if mechanism == "softmax" or (auto == "AutoModel" and uneven_size == "pad")
]


@pytest.mark.parametrize(("family", "auto", "mechanism", "uneven_size"), PROGRAMS)
def test_the_exported_program_is_the_model_at_any_size(
    family: str, auto: str, mechanism: str, uneven_size: str, fresh_compiler: None
) -> None:
    """Dynamic batch, height and width; where uneven sizes are refused, the program says that it takes whole patches."""
    function = Exported(build(family, auto, mechanism, uneven_size=uneven_size))
    example = {"pixel_values": random_images(2, 20, 28)}
    batch, scale = torch.export.Dim("batch", min=1, max=64), 4 if uneven_size == "refuse" else 1
    # From two rows and columns on: to torch.export a dimension of 1 is another program.
    least = 2 if uneven_size == "refuse" else 5
    height, width = (torch.export.Dim(name, min=least, max=400) for name in ("height", "width"))
    shapes = {"pixel_values": {0: batch, 2: scale * height, 3: scale * width}}
    program = torch.export.export(function, (example,), dynamic_shapes=(shapes,)).module()
    for rows, *size in [(1, 20, 28), (3, 16, 12), (2, 44, 8), (1, 17, 30), (3, 40, 9)]:
        if uneven_size == "refuse":
            size = [4 * x for x in size]
        inputs = {"pixel_values": random_images(rows, *size)}
        torch.testing.assert_close(program(inputs), function(inputs), rtol=1e-5, atol=1e-5)
