"""Steps of the frame on a CPU, dropout with the residual and the feed-forward layer: gradients, and what is kept."""

import sys
from collections.abc import Callable

import pytest
import torch
from frame_family import BERT, build, inputs_for
from torch import Tensor, nn
from torch.nn import functional as F

from hf_efficient_attn.cpu import dropout, dropout_add, feed_forward, in_reach, residual


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 50, 16, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))


@pytest.mark.parametrize("chunk", [1, 10**4, 10**9])
def test_equals_its_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entries in the result, in both gradients and in the gradient of a gradient."""
    monkeypatch.setattr(residual, "CHUNK_BYTES", chunk)
    states, rest = inputs()
    torch.manual_seed(0)
    total = dropout_add(states * 1, rest, 0.25)
    kept = ((total - rest).abs() > 1e-12).double()
    assert abs(kept.mean() - 0.75) < 0.03
    assert not torch.equal(kept[0], kept[1]), "each row has its own"
    torch.testing.assert_close(total, rest + states * kept / 0.75)
    direction = torch.randn(total.shape, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad((total * direction).sum(), (states, rest), create_graph=True)
    torch.testing.assert_close(grads, (direction * kept / 0.75, direction))
    (second,) = torch.autograd.grad(grads[0].square().sum(), direction)
    torch.testing.assert_close(second, 2 * direction * (kept / 0.75) ** 2)


def test_keeps_nothing_and_leaves_its_input() -> None:
    states, rest = inputs()
    product = states * 1
    before = product.detach().clone()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        total = dropout_add(product, rest, 0.1)
    assert total.requires_grad and not saved
    assert torch.equal(product, before)


def test_torch_func_takes_it() -> None:
    states, rest = (x.detach() for x in inputs())

    def loss(states: Tensor, rest: Tensor) -> Tensor:
        torch.manual_seed(0)
        return dropout_add(states * 1, rest, 0.25).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(states, rest)
    wanted = [x.clone().requires_grad_() for x in (states, rest)]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*wanted), wanted))


def test_dropout_alone_keeps_its_share_and_its_gradient() -> None:
    states = torch.ones(300, 1000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    result = dropout(states, 0.3)
    assert ((result == 0).double().mean() - 0.3).abs() < 0.005
    assert (result.mean() - 1).abs() < 0.005
    (grad,) = torch.autograd.grad(result.sum(), states)
    assert torch.equal(grad, result.detach()), "of ones, the factor itself"
    torch.manual_seed(0)
    assert torch.equal(dropout(states, 0.3), result)
    for p in (0.0, 1.0):
        torch.testing.assert_close(dropout(states, p), states * (1 - p))


@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
def test_the_ends(dropout_p: float) -> None:
    states, rest = inputs()
    torch.testing.assert_close(dropout_add(states * 1, rest, dropout_p), rest + states * (1 - dropout_p))


def test_leaves_and_other_dtypes_are_left_alone() -> None:
    states, rest = inputs()
    before = states.detach().clone()
    for given in (states, states.half().requires_grad_()):
        dropout_add(given, rest, 0.5).sum().backward()
    assert torch.equal(states, before)


def test_the_frame_uses_it_and_hooks_see_what_they_should() -> None:
    model = build(BERT, "Model", hidden_dropout_prob=0.3).train()
    given = inputs_for("Model")
    seen = {}
    parts = {"drop": model.encoder.layer[1].output.dropout, "dense": model.encoder.layer[0].output.dense}
    for name, part in parts.items():
        part.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    model.encoder.layer[0].attention.output.dropout = nn.Identity()
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr("hf_efficient_attn.encoder.layer.dropout_add", lambda *x: calls.append(x) or dropout_add(*x))
        model(**given)
    assert len(calls) == 2, "of four steps, one has a hook on its dropout, and one has none"
    assert ((seen["drop"] == 0).double().mean() - 0.3).abs() < 0.05


def test_the_frame_drops_the_sublayer_and_not_the_residual() -> None:
    model = build(BERT, "Model", hidden_dropout_prob=0.3, norm_position="pre").train()
    output = model.encoder.layer[0].attention.output
    sublayer, rest = torch.randn(4, 50, 32), torch.randn(4, 50, 32)
    with torch.no_grad():
        added = output(sublayer, rest) - rest
        kept = added.abs() > 1e-9
        torch.testing.assert_close(added[kept], (output.dense(sublayer) / 0.7)[kept], rtol=1e-3, atol=1e-5)
    assert abs(kept.double().mean() - 0.7) < 0.03


def feed_forward_inputs(biases: bool = True) -> list[Tensor | None]:
    shapes = ((2, 10, 4), (6, 4), (6,), (5, 6), (5,))
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return [x if biases or x.dim() > 1 else None for x in made]


def plain_feed_forward(*given: Tensor | None) -> Tensor:
    states, inner, inner_bias, outer, outer_bias = given
    return F.linear(F.gelu(F.linear(states, inner, inner_bias)), outer, outer_bias)


@pytest.mark.parametrize("tokens", [1, 7, 1024])
@pytest.mark.parametrize("biases", [True, False])
def test_feed_forward_equals_its_definition(tokens: int, biases: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its gradients, all of them and one at a time."""
    monkeypatch.setattr(sys.modules["hf_efficient_attn.cpu.feed_forward"], "TOKENS_AT_ONCE", tokens)
    given = feed_forward_inputs(biases)
    tensors = [x for x in given if x is not None]
    found, wanted = feed_forward(*given, F.gelu), plain_feed_forward(*given)
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, tensors, direction)
    torch.testing.assert_close(torch.autograd.grad(found, tensors, direction), expected)
    for one, right in zip(tensors, expected, strict=True):
        alone = [None if x is None else x.detach().requires_grad_(x is one) for x in given]
        (leaf,) = (x for x in alone if x is not None and x.requires_grad)
        torch.testing.assert_close(torch.autograd.grad(feed_forward(*alone, F.gelu), leaf, direction)[0], right)


def test_feed_forward_has_gradients_of_gradients_and_torch_func_takes_it() -> None:
    given = feed_forward_inputs()
    assert torch.autograd.gradgradcheck(lambda *x: feed_forward(*x, F.gelu), given)
    plain = [x.detach() for x in given]
    found, wanted = (
        torch.func.grad(lambda *x, f=f: f(*x).square().sum(), argnums=(0, 1, 2, 3, 4))(*plain)
        for f in (lambda *x: feed_forward(*x, F.gelu), plain_feed_forward)
    )
    torch.testing.assert_close(found, wanted)


def test_feed_forward_keeps_one_wide_tensor() -> None:
    given = feed_forward_inputs()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        feed_forward(*given, F.gelu)
    assert saved.count((20, 6)) == 1


class Part(Tensor):
    """A subclass, as `DTensor` is one."""


def test_tensors_of_other_kinds_are_left_to_torch() -> None:
    own = torch.zeros(2, 3)
    assert in_reach(own) and in_reach(nn.Parameter(own))
    assert not in_reach(own.as_subclass(Part)) and not in_reach(own.half()) and not in_reach(own.to("meta"))


def set_forward(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)


@pytest.mark.parametrize(
    "part", ["intermediate", "intermediate.dense", "intermediate.activation", "output", "output.dense"]
)
@pytest.mark.parametrize("notice", [lambda x: x.register_forward_hook(lambda *_: None), set_forward])
def test_the_frame_computes_again_only_where_nobody_notices(part: str, notice: Callable[[nn.Module], object]) -> None:
    """Equal gradients either way; who watches a part of a layer sees it called."""
    model = build(BERT, "Model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr("hf_efficient_attn.encoder.layer.feed_forward", lambda *x: calls.append(x) or feed_forward(*x))
        grads = []
        for count in (2, 1):
            calls.clear()
            model.zero_grad()
            model(**inputs_for("Model")).last_hidden_state.square().sum().backward()
            grads.append([p.grad.clone() for p in model.encoder.parameters()])
            assert len(calls) == count
            notice(model.encoder.layer[0].get_submodule(part))
        calls.clear()
        with torch.no_grad():
            model(**inputs_for("Model"))
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs_for("Model"))
        assert not calls
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_inference_on_a_long_text_overwrites_nothing_that_anybody_holds() -> None:
    """Chunks go where their inputs were, but not where a hook or the caller sees them."""
    model = build(BERT, "Model", max_position_embeddings=2100)
    given = {"inputs_embeds": torch.randn(1, 2100, 32, generator=torch.Generator().manual_seed(8))}
    before, plain = given["inputs_embeds"].clone(), model(**given).last_hidden_state
    recorded = model(**given, output_hidden_states=True).hidden_states
    assert torch.equal(given["inputs_embeds"], before)
    kept = {}
    layer = model.encoder.layer[0]
    for name, part in {"attention": layer.attention, "mechanism": layer.attention.self}.items():
        part.register_forward_hook(lambda module, args, output, name=name: kept.update({name: output[0]}))
    found = model(**given).last_hidden_state
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(recorded[-1], plain, rtol=0, atol=1e-5)
    assert len({x.data_ptr() for x in recorded}) == len(recorded)
    with torch.enable_grad():
        right = model(**given, output_hidden_states=True).hidden_states
        for a, b in zip(recorded, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    held = {name: x.clone() for name, x in kept.items()}
    with torch.enable_grad():
        model(**given)
    for name, x in held.items():
        torch.testing.assert_close(x, kept[name], rtol=0, atol=1e-5, msg=lambda m: f"{name}: {m}")  # noqa: B023
