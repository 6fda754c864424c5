"""Mechanisms inside in-tree models: equality, padding, gradients and dropout, over both tables."""

from types import SimpleNamespace

import pytest
import torch
from helpers import mask_of
from inside_cases import MODELS, PAIRS, SMALL, WHOLE, implementation
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficient_attn import use_efficient_attention
from hf_efficient_attn.integrations.inside import attend_inside
from hf_efficient_attn.integrations.mechanisms import MECHANISMS
from hf_efficient_attn.integrations.names import MECHANISM_NAMES
from hf_efficient_attn.integrations.options import FIELD


EVERY_PAIR = pytest.mark.parametrize(("model_name", "name"), PAIRS)
# Each model and each mechanism, not each pair.
FEW = [*PAIRS[::4], ("ViT", "neighborhood"), ("Llama", "performer"), ("Mistral", "sliding_window")]
FEW_PAIRS = pytest.mark.parametrize(("model_name", "name"), sorted(set(FEW)))
TEXT_PAIRS = [(model, name) for model, name in PAIRS if not MODELS[model].is_image]
NAMES = [name for name in MECHANISM_NAMES if name != "neighborhood"]


def test_the_names_are_those_of_the_table() -> None:
    assert sorted(MECHANISMS) == sorted(MECHANISM_NAMES)
    assert set(SMALL) == set(MECHANISMS)
    assert {name for _, name in FEW} == set(MECHANISMS) and {model for model, _ in FEW} == set(MODELS)


def padded(case: object, side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of two examples, and which rows of the output count."""
    inputs = case.inputs()
    if case.is_image:
        return inputs, torch.ones((), dtype=torch.bool)
    inputs["attention_mask"] = mask_of([45, 29], 45, side)
    return inputs, inputs["attention_mask"].bool()


def gradients(model: nn.Module, output: Tensor, rows: Tensor) -> list[Tensor | None]:
    weights = torch.linspace(-1, 1, output.shape[-1])
    total = (output * weights).sin()
    total = (total[rows] if rows.dim() else total).sum()
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize(("model_name", "name"), [pair for pair in PAIRS if pair[1] in WHOLE])
def test_is_the_model_itself_where_the_mechanism_is_softmax(model_name: str, name: str) -> None:
    """Results and every gradient, with padding on the right."""
    case = MODELS[model_name]
    model, (inputs, rows) = case.build(), padded(case)
    right = case.run(model, **inputs)
    right_gradients = gradients(model, right, rows)
    use_efficient_attention(model, name, **WHOLE[name])
    ours = case.run(model, **inputs)
    pick = (lambda x: x[rows]) if rows.dim() else (lambda x: x)
    torch.testing.assert_close(pick(ours), pick(right), rtol=0, atol=1e-5)
    for a, b in zip(gradients(model, ours, rows), right_gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@EVERY_PAIR
def test_is_used_and_taken_out_again(model_name: str, name: str) -> None:
    case = MODELS[model_name]
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        before = case.run(model, **inputs)
        keys = list(model.state_dict())
        assert use_efficient_attention(model, name, **SMALL[name]) is model
        ours = case.run(model, **inputs)
        assert (ours - before).abs().max() > 1e-2, "the model goes on as before"
        assert list(model.state_dict()) == keys
        model.set_attn_implementation("sdpa")
        assert torch.equal(case.run(model, **inputs), before)
        model.set_attn_implementation(implementation(name))
        assert torch.equal(case.run(model, **inputs), ours)
        use_efficient_attention(model, None)
        assert torch.equal(case.run(model, **inputs), before)
    assert not hasattr(model.config, FIELD)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("model_name", "name"), TEXT_PAIRS)
def test_what_stands_in_padding_never_matters(model_name: str, name: str, side: str) -> None:
    """NaN in every padded position from the first layer on."""
    case = MODELS[model_name]
    model, (inputs, rows) = case.build(), padded(case, side)
    use_efficient_attention(model, name, **SMALL[name])
    padding = ~rows[..., None]
    with torch.no_grad():
        right = case.run(model, **inputs)
        hook = lambda _, args, result: result.masked_fill(padding, torch.nan)  # noqa: E731
        model.get_input_embeddings().register_forward_hook(hook)
        ours = case.run(model, **inputs)
    assert ours[~rows].isnan().all(), "the poison is not where it should be"
    assert torch.equal(ours[rows], right[rows])


@pytest.mark.parametrize(
    ("model_name", "name"), [pair for pair in TEXT_PAIRS if pair[0] in ("Bert", "ModernBert", "Llama")]
)
def test_alone_is_as_in_a_batch(model_name: str, name: str) -> None:
    case = MODELS[model_name]
    model, (inputs, rows) = case.build(), padded(case)
    use_efficient_attention(model, name, **SMALL[name])
    with torch.no_grad():
        ours = case.run(model, **inputs)
        for number, length in enumerate(rows.sum(dim=1).tolist()):
            alone = case.run(model, input_ids=inputs["input_ids"][number : number + 1, :length])
            torch.testing.assert_close(ours[number : number + 1, :length], alone, rtol=0, atol=2e-5)


def a_module(name: str, causal: bool = False, **options: object) -> nn.Module:
    """What an attention module shows to its attention function."""
    module = nn.Module()
    module.layer_idx, module.is_causal = 1, causal
    module.config = SimpleNamespace(**{FIELD: {name: options}})
    return module


@pytest.mark.parametrize("name", [name for name in NAMES if name in WHOLE])
def test_scale_and_shared_key_heads_reach_the_formula(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 20, 8, generator=generator)
    key, value = (torch.randn(2, 2, 20, 8, generator=generator) for _ in range(2))
    ours, weights = attend_inside(name, a_module(name, **WHOLE[name]), query, key, value, None, scaling=0.7)
    right = F.scaled_dot_product_attention(query, key, value, scale=0.7, enable_gqa=True).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_unbiased_and_its_own(name: str) -> None:
    """The mean over many draws is the result without dropout."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, 12, 8, generator=generator) for _ in range(3))
    module = a_module(name, **{**SMALL[name], **WHOLE.get(name, {})})
    right = attend_inside(name, module, query, key, value, None)[0]
    torch.manual_seed(0)
    query, key, value = (x.expand(400, -1, -1, -1) for x in (query, key, value))
    draws = attend_inside(name, module, query, key, value, None, dropout=0.2)[0]
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert error.min() > 0
    assert ((draws.mean(dim=0) - right[0]).abs() < 5 * error).all()


@FEW_PAIRS
def test_dropout_comes_from_the_model_in_training_only(model_name: str, name: str) -> None:
    case = MODELS[model_name]
    if case.name == "ModernBert":
        overrides = {case.dropout: 0.3, "mlp_dropout": 0.0, "embedding_dropout": 0.0}
    else:
        overrides = {case.dropout: 0.3}
    model, inputs = case.build(num_hidden_layers=1, **overrides), case.inputs()
    use_efficient_attention(model, name, **SMALL[name])
    with torch.no_grad():
        assert torch.equal(case.run(model, **inputs), case.run(model, **inputs))
        model.train()
        assert not torch.equal(case.run(model, **inputs), case.run(model, **inputs))


@FEW_PAIRS
def test_training_moves_every_layer(model_name: str, name: str) -> None:
    """With gradient checkpointing, and equal to training without it."""
    case = MODELS[model_name]
    model, (inputs, rows) = case.build(), padded(case)
    use_efficient_attention(model, name, **SMALL[name])
    model.train()
    right = gradients(model, case.run(model, **inputs), rows)
    attention = [x for (key, _), x in zip(model.named_parameters(), right, strict=True) if is_projection(key)]
    assert len(attention) >= 2
    assert all(x is not None and x.isfinite().all() and x.abs().max() > 0 for x in attention)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(model, case.run(model, **inputs), rows), right, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def is_projection(key: str) -> bool:
    names = ("query", "value", "q_lin", "v_lin", "Wqkv", "q_proj", "v_proj")
    return any(f"{name}.weight" in key for name in names)
