"""Dropout with the residual in one step: what is dropped, gradients, and what is kept for them."""

import pytest
import torch
from frame_family import BERT, build, inputs_for
from torch import Tensor, nn

from hf_efficient_attn.cpu import dropout_add, residual


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
