"""Mechanisms inside in-tree models as whole graphs of torch.compile."""

import pytest
import torch
from helpers import mask_of, random_ids
from inside_cases import MODELS, PAIRS, SMALL, implementation
from torch import nn

from hf_efficient_attn.integrations.layers import layer_of
from hf_efficient_attn.integrations.options import FIELD


# Every mechanism, and layers with and without an index or a window of their own; not each pair.
SOME = [
    ("Bert", "nystrom", 1),
    ("DistilBert", "block_sparse", 1),
    ("ModernBert", "lsh", 2),
    ("SiglipVision", "neighborhood", 1),
    ("ViT", "performer", 2),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def fresh(model_name: str, name: str, layers: int) -> nn.Module:
    """As `from_pretrained` leaves it: no call of the model, and none of the helper, was before."""
    model = MODELS[model_name].build(attn_implementation=implementation(name), num_hidden_layers=layers)
    setattr(model.config, FIELD, {name: SMALL[name]})
    return model


@pytest.mark.parametrize(("model_name", "name", "layers"), SOME)
def test_one_graph_gives_results_and_gradients(model_name: str, name: str, layers: int) -> None:
    assert (model_name, name) in PAIRS
    case = MODELS[model_name]
    model, inputs = fresh(model_name, name, layers), case.inputs()
    if not case.is_image:
        inputs["attention_mask"] = mask_of([45, 29], 45)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours, right = case.run(compiled, **inputs), case.run(model, **inputs)
    rows = inputs.get("attention_mask", torch.ones(ours.shape[:2])).bool()
    torch.testing.assert_close(ours[rows], right[rows], rtol=0, atol=2e-5)
    parameters = [x for x in model.parameters() if x.requires_grad]
    both = [torch.autograd.grad(x[rows].sin().sum(), parameters, allow_unused=True) for x in (ours, right)]
    for a, b in zip(*both, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_one_graph_without_a_mask_and_at_other_lengths() -> None:
    model = fresh("Llama", "sliding_window", 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (20, 33, 64):
        ids = random_ids(2, length)
        ours, right = (x(ids, use_cache=False).logits for x in (compiled, model))
        torch.testing.assert_close(ours, right, rtol=0, atol=2e-5)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(RuntimeError, match="packed examples"):
        compiled(random_ids(1, 10), position_ids=packed, use_cache=False)


@torch.no_grad()
def test_layers_compiled_one_by_one_keep_their_own_numbers() -> None:
    """One code object, two layers: the graph of the first must not serve the second."""
    model, eager = (fresh("ViT", "performer", 2) for _ in range(2))
    inputs = MODELS["ViT"].inputs()
    right = eager(**inputs)[0]
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(model(**inputs)[0], right, rtol=0, atol=2e-5)
    assert [layer_of(layer.attention) for layer in model.layers] == [0, 1]
    first = eager.layers[0].attention
    eager.layers[1].attention._efficient_attention_layer = layer_of(first)
    assert (eager(**inputs)[0] - right).abs().max() > 1e-3, "the numbers make no difference here"


@torch.no_grad()
def test_an_image_model_is_exported_once_it_has_run() -> None:
    """What stands before its patches is measured by a run, which the weights of an export cannot do."""
    case = MODELS["ViT"]
    model, inputs = fresh("ViT", "neighborhood", 1), case.inputs()
    with pytest.raises(ValueError, match="run the model once before it is exported"):
        torch.export.export(model, (inputs["pixel_values"],), strict=False)
    right = model(**inputs)[0]
    program = torch.export.export(model, (inputs["pixel_values"],), strict=False)
    torch.testing.assert_close(program.module()(inputs["pixel_values"])[0], right, rtol=0, atol=1e-6)
