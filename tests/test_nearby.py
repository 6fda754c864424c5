"""The convolution of the values as matrix products: what it is, its gradients, and when Nystromformer takes it."""

from types import SimpleNamespace

import pytest
import torch
from cases import HEADS, paddings, qkv
from torch import Tensor, nn
from torch.testing import assert_close

from hf_efficient_attn.attention import nystromformer
from hf_efficient_attn.functional import add_nearby, nearby, zero_padding


def convolution(taps: int, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    torch.manual_seed(3)
    sizes = {"kernel_size": (taps, 1), "padding": (taps // 2, 0), "groups": HEADS, "bias": False}
    return nn.Conv2d(HEADS, HEADS, **sizes, dtype=dtype)


@pytest.mark.parametrize("taps", [1, 3, 65])
@pytest.mark.parametrize("length", [1, 3, 64, 131])
def test_equals_the_convolution(taps: int, length: int) -> None:
    """Results and gradients with padding on each side, whatever stands there, and in the order of merged heads."""
    conv = convolution(taps)
    for side, keep in paddings(3, length).items():
        mixed, value, grad = qkv(3, length)
        right = mixed + zero_padding(conv(zero_padding(value, keep)), keep)
        right_grads = torch.autograd.grad(right, (mixed, value, conv.weight), grad)
        poisoned = value.detach().transpose(1, 2).contiguous().transpose(1, 2)
        if keep is not None:
            poisoned = poisoned.masked_fill(~keep[:, None, :, None], float("nan"))
        poisoned.requires_grad_()
        found = add_nearby(mixed, poisoned, conv.weight[:, 0, :, 0], keep)
        message = lambda m, side=side: f"{side} padding: {m}"  # noqa: E731
        assert_close(found, right, msg=message)
        assert_close(torch.autograd.grad(found, (mixed, poisoned, conv.weight), grad), right_grads, msg=message)


def test_gradients_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "_BLOCK", 4)
    value, weight = torch.randn(1, 2, 6, 2).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()
    function = lambda v, w: add_nearby(torch.zeros_like(v), v, w, None)  # noqa: E731
    assert torch.autograd.gradcheck(function, (value, weight))
    assert torch.autograd.gradgradcheck(function, (value, weight))


def test_in_a_graph_of_any_length() -> None:
    compiled = torch.compile(add_nearby, backend="aot_eager", fullgraph=True, dynamic=True)
    weight = convolution(5).weight[:, 0, :, 0].detach().requires_grad_()
    for length in (7, 64, 130):
        mixed, value, grad = qkv(2, length)
        keep = paddings(2, length)["left"]
        found, right = compiled(mixed, value, weight, keep), add_nearby(mixed, value, weight, keep)
        assert_close(found, right)
        given = (mixed, value, weight)
        assert_close(torch.autograd.grad(found, given, grad), torch.autograd.grad(right, given, grad))


def _attention(dtype: torch.dtype) -> nystromformer.NystromformerSelfAttention:
    config = SimpleNamespace(
        hidden_size=16,
        num_attention_heads=2,
        attention_probs_dropout_prob=0.0,
        num_landmarks=4,
        conv_kernel_size=5,
        pinv_iterations=6,
        inv_coeff_init_option=True,
        check_options=lambda: None,
        _attn_implementation="sdpa",
    )
    return nystromformer.NystromformerSelfAttention(config, 0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_when_nystromformer_takes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the devices of its list, where the module is a plain convolution in the dtype of the values."""
    taken: list[Tensor] = []

    def counted(*inputs: Tensor) -> Tensor:
        taken.append(inputs[0])
        return add_nearby(*inputs)

    monkeypatch.setattr(nystromformer, "add_nearby", counted)
    attention, states = _attention(dtype), torch.randn(1, 20, 16).to(dtype)
    usual = attention(states)[0]
    assert not taken, "the tensors are on a CPU"
    monkeypatch.setattr(nystromformer, "_MULTIPLYING", ("cpu",))
    assert_close(attention(states)[0], usual, rtol=2e-2, atol=2e-2)
    assert len(taken) == 1
    hook = attention.conv.register_forward_hook(lambda *_: None)
    attention(states)
    assert len(taken) == 1
    hook.remove()
    attention(states)
    assert len(taken) == 2
    with torch.autocast("cpu", dtype=dtype):
        attention.float()(states.float())
    assert len(taken) == 3
