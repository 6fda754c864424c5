"""torch.compile and torch.export: whole graphs, dynamic batch and length, equal to eager mode, for every row."""

import warnings
from collections.abc import Callable

import pytest
import torch
from cases import CASES, GRAPH_ROW_IDS, GRAPH_ROWS, Case, paddings, qkv, slots
from helpers import config_class, one_layer
from test_families import FAMILY, HEADS, batch_of, build
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient_attn.attention import ATTENTIONS
from hf_efficient_attn.auto import TEXT_FAMILIES


SHAPES = [(1, 1), (1, 63), (3, 64), (3, 65), (1, 257), (3, 257), (3, 1)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def formula_of(case: Case, variant: str, length: int) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    keep = paddings(2, length)["left"]
    is_global = case.variants[variant].is_global(2, length)
    # Their number would be data-dependent inside the graph; a model has a bound for it.
    is_global = slots(is_global, keep)
    options = case.variants[variant].options
    # Eager mode and graphs round differently, which an ill-conditioned inverse multiplies.
    dtype = torch.float32 if case.variants[variant].rounding == 1.0 else torch.float64
    return lambda q, k, v: case.formula(q, k, v, keep, is_global, **options), qkv(2, length, dtype)


@pytest.mark.parametrize(("case", "variant"), GRAPH_ROWS, ids=GRAPH_ROW_IDS)
def test_every_formula_is_one_graph(case: Case, variant: str) -> None:
    function, inputs = formula_of(case, variant, 50)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, right = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(right.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# The others compile within their families.
GRID_CASES = [case for case in CASES if "grid" in ATTENTIONS[case.name].wants]


@pytest.mark.parametrize("case", GRID_CASES, ids=[case.name for case in GRID_CASES])
def test_a_formula_compiles_with_inductor(case: Case) -> None:
    function, inputs = formula_of(case, next(iter(case.variants)), 50)
    compiled = torch.compile(function, fullgraph=True)
    ours, right = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(right.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "train"), [*((family, True) for family in TEXT_FAMILIES), ("eff_longformer", False)]
)
def test_every_family_compiles_with_inductor(family: str, train: bool) -> None:
    """Several examples, and the mask as an input of the graph."""
    auto = "AutoModelForSequenceClassification"
    # Two layers where they are of two kinds.
    layers = {} if "attn_layers" in config_class(family).__dataclass_fields__ else one_layer(family)
    model = build(family, auto, **layers).train(train)
    inputs = batch_of(model, auto, 3, 41)
    inputs["attention_mask"][-1, :13] = 0
    compiled = torch.compile(model, fullgraph=True)
    ours, right = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(ours.logits, right.logits, rtol=1e-4, atol=1e-4)
    if train:
        parameters = list(model.parameters())
        pairs = zip(
            torch.autograd.grad(ours.loss, parameters), torch.autograd.grad(right.loss, parameters), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class Exported(nn.Module):
    """Positional inputs and plain tensors out, as torch.export wants them."""

    def __init__(self, model: PreTrainedModel, hidden_states: bool) -> None:
        super().__init__()
        self.model = model
        self.hidden_states = hidden_states

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = self.model(**inputs, output_hidden_states=self.hidden_states, use_cache=False)
        first = outputs.to_tuple()[0]
        return (first, *outputs.hidden_states) if self.hidden_states else (first,)


def unlabelled(model: PreTrainedModel, auto: str, batch: int, length: int, padded: bool = True) -> dict[str, Tensor]:
    inputs = batch_of(model, auto, batch, length, seed=length)
    inputs = {name: x for name, x in inputs.items() if "label" not in name and "positions" not in name}
    if padded and length > 3:
        inputs["attention_mask"][-1, ..., : length // 3] = 0
    return inputs


@FAMILY
@torch.no_grad()
def test_compiles_as_one_graph_with_dynamic_shapes(family: str) -> None:
    model = build(family, "AutoModel", max_position_embeddings=300)
    function = Exported(model, hidden_states=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in [(2, 37), (3, 64), (3, 257), (2, 100)]:
        inputs = unlabelled(model, "AutoModel", batch, length)
        for a, b in zip(compiled(inputs), function(inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@FAMILY
def test_compiled_training_gives_equal_gradients(family: str) -> None:
    auto = "AutoModelForSequenceClassification"
    model = build(family, auto).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch_of(model, auto, 2, 45)
    right = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    ours = torch.autograd.grad(compiled(**inputs).loss, list(model.parameters()))
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# The other heads: test_onnx.py, whose programs are exported ones.
PROGRAMS = [(family, auto) for family, auto in HEADS if auto in ("AutoModel", "AutoModelForCausalLM")]


@pytest.mark.parametrize(("family", "auto"), PROGRAMS)
def test_the_exported_program_is_the_model_at_any_shape(family: str, auto: str) -> None:
    model = build(family, auto, max_position_embeddings=300)
    function = Exported(model, hidden_states=True)
    example = unlabelled(model, auto, 2, 37)
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=290)
    shapes = {name: {0: batch, x.dim() - 1: length} for name, x in example.items()}
    program = torch.export.export(function, (example,), dynamic_shapes=(shapes,)).module()
    for rows, tokens in SHAPES:
        inputs = unlabelled(model, auto, rows, tokens)
        for a, b in zip(program(inputs), function(inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@FAMILY
def test_too_many_global_tokens_trip_an_assertion_and_are_never_dropped(family: str) -> None:
    model = build(family, "AutoModel")
    if not hasattr(model.config, "max_global_tokens"):
        pytest.skip("no global tokens")
    model.config.max_global_tokens = 3
    inputs = unlabelled(model, "AutoModel", 2, 40, padded=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs["global_attention_mask"][0, :3] = 1
    inputs["global_attention_mask"][0, -1] = 0
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-5, atol=1e-5)
    inputs["global_attention_mask"][0, 3] = 1
    assert model(**inputs)[0].isfinite().all(), "eager mode has no bound"
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="max_global_tokens = 3"):
        warnings.simplefilter("ignore")
        compiled(**inputs)
