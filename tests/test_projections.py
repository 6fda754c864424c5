"""Query, key and value as one step of the frame on a CPU: gradients, and where the maps themselves run."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efficient_attn.attention.base import SelfAttention
from hf_efficient_attn.attention.lsh import LSHOptions, LSHSelfAttention
from hf_efficient_attn.cpu import linear_maps


WIDTHS = (5, 3, 4)


def maps(bias: bool = True, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, n, bias=bias, dtype=dtype) for n in WIDTHS]


def states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def is_own(outputs: tuple[Tensor, ...]) -> bool:
    return all(type(x.grad_fn).__name__ == "_LinearMapsBackward" for x in outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[0, 0], lambda x: x[:, :0]])
def test_equals_the_maps(bias: bool, used: tuple[int, ...], layout: Callable[[Tensor], Tensor]) -> None:
    """Bit by bit forward; gradients of all inputs and of each alone, also where some outputs are not used."""
    linears, given = maps(bias), states()
    parameters = [p for linear in linears for p in linear.parameters()]
    found, wanted = linear_maps(layout(given), linears), tuple(linear(layout(given)) for linear in linears)
    assert is_own(found) and len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    directions = [torch.randn_like(wanted[i]) for i in used]

    def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        chosen = [outputs[i] for i in used]
        return torch.autograd.grad(chosen, inputs, directions, retain_graph=True, allow_unused=True)

    expected = gradients(wanted, [given, *parameters])
    for a, b in zip(gradients(found, [given, *parameters]), expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    for one, right in zip([given, *parameters], expected, strict=True):
        if right is None:
            continue
        for x in (given, *parameters):
            x.requires_grad_(x is one)
        torch.testing.assert_close(gradients(linear_maps(layout(given), linears), [one])[0], right)


def test_leaves_the_gradients_it_is_given() -> None:
    linears, given = maps(), states()
    outputs = linear_maps(given, linears)
    directions = [torch.randn_like(x) for x in outputs]
    before = [x.clone() for x in (*directions, given, *outputs)]
    torch.autograd.backward(outputs, directions)
    assert all(torch.equal(a, b) for a, b in zip(before, (*directions, given, *outputs), strict=True))
    first = given.grad.clone()
    torch.autograd.backward(linear_maps(given, linears), directions)
    torch.testing.assert_close(given.grad, 2 * first)


def test_sums_the_gradient_where_it_stands() -> None:
    outputs, names = linear_maps(states(), maps()), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    assert names.count("addmm_") == 2 and not {"add", "addmm"} & set(names), names


def of_parameters(given: Tensor, *weights_and_biases: Tensor, own: bool = True) -> Tensor:
    """A number from the maps, as a function of what is in them."""
    linears = maps()
    for linear, weight, bias in zip(linears, weights_and_biases[:3], weights_and_biases[3:], strict=True):
        del linear.weight, linear.bias
        linear.weight, linear.bias = weight, bias
    outputs = linear_maps(given, linears) if own else tuple(linear(given) for linear in linears)
    return sum((x**3).sum() for x in outputs)


def test_has_gradients_of_gradients_and_torch_func_takes_it() -> None:
    inputs = [states()[:, :2].detach(), *(x.weight.detach() for x in maps()), *(x.bias.detach() for x in maps())]
    leaves = [x.clone().requires_grad_() for x in inputs]
    second = []
    for own in (True, False):
        result = of_parameters(*leaves, own=own)
        firsts = torch.autograd.grad(result, leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(x.square().sum() for x in firsts), leaves))
    torch.testing.assert_close(*second)
    found, wanted = (
        torch.func.grad(lambda *x, own=own: of_parameters(*x, own=own), argnums=tuple(range(7)))(*inputs)
        for own in (True, False)
    )
    torch.testing.assert_close(found, wanted)


def test_backward_inside_autocast_is_exact() -> None:
    found = []
    for inside in (False, True):
        linears, given = maps(dtype=torch.float32), states(torch.float32)
        outputs = linear_maps(given, linears)
        assert is_own(outputs)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        found.append([given.grad, *(p.grad for linear in linears for p in linear.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def set_forward(module: nn.Module) -> None:
    module.forward = type(module).forward.__get__(module)


def set_weight(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", nn.Identity())


@pytest.mark.parametrize(
    "notice",
    [
        lambda x: x.register_forward_hook(lambda *_: None),
        lambda x: x.register_forward_pre_hook(lambda *_: None),
        lambda x: x.register_full_backward_hook(lambda *_: None),
        set_forward,
        set_weight,
    ],
)
def test_a_map_that_is_watched_runs_itself(notice: Callable[[nn.Module], object]) -> None:
    linears = maps()
    assert is_own(linear_maps(states(), linears))
    notice(linears[1])
    assert not is_own(linear_maps(states(), linears))


def test_elsewhere_the_maps_run_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = maps(dtype=torch.float32)
    with torch.no_grad():
        assert not is_own(linear_maps(states(torch.float32), linears))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = linear_maps(states(torch.float32), linears)
        assert not is_own(outputs) and outputs[0].dtype == torch.bfloat16
    assert not is_own(linear_maps(states(torch.bfloat16), maps(dtype=torch.bfloat16)))
    assert not is_own(linear_maps(states().to("meta"), [linear.to("meta") for linear in maps()]))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_own(linear_maps(states(torch.float32), linears))


def test_mechanisms_project_with_it() -> None:
    config = SimpleNamespace(hidden_size=6, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    given = states(torch.float32)
    plain, lsh = SelfAttention(config, 0), LSHSelfAttention(config, 0, LSHOptions())
    for module in (plain, lsh):
        with torch.no_grad():
            wanted = module.project(given)
        for use in (True, False):
            found = module.project(given)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
            nodes = {x.grad_fn.next_functions[0][0].next_functions[0][0].name() for x in (found[0], found[2])}
            assert (nodes == {"_LinearMapsBackward"}) is use, nodes
            module.value.register_forward_hook(lambda *_: None)
