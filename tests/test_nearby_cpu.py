"""The convolution of the values on a CPU: what it is, its gradients, and when Nystromformer takes it."""

from types import SimpleNamespace

import pytest
import torch
from cases import HEADS, paddings, qkv
from oracles.nystromformer import convolution
from torch import Tensor, nn
from torch.testing import assert_close

from hf_efficient_attn.attention.nystromformer import NystromformerSelfAttention
from hf_efficient_attn.functional import cpu_add_nearby, nearby_cpu


def kernels(taps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(HEADS, taps, generator=torch.Generator().manual_seed(3), dtype=dtype).requires_grad_()


def right(mixed: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """A loop over the taps."""
    valid = torch.ones_like(value[:, :1, :, :1], dtype=torch.bool) if keep is None else keep[:, None, :, None]
    side, length = weight.shape[1] // 2, value.shape[2]
    padded = nn.functional.pad(value.masked_fill(~valid, 0.0), (0, 0, side, side))
    near = sum(weight[:, tap, None, None] * padded[:, :, tap : tap + length] for tap in range(weight.shape[1]))
    return mixed + near.masked_fill(~valid, 0.0)


@pytest.mark.parametrize("taps", [1, 5, 65])
@pytest.mark.parametrize("length", [1, 3, 64, 131])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_equals_its_definition(taps: int, length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients with padding on each side and in the middle, whatever stands there, merged or not."""
    monkeypatch.setattr(nearby_cpu, "_BLOCK", block)
    masks = paddings(3, length)
    masks["holes"] = torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < 0.7
    weight = kernels(taps)
    for side, keep in masks.items():
        mixed, value, grad = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(3, length))
        if side == "right":
            mixed, value = mixed.contiguous(), value.contiguous()
        given = [mixed.requires_grad_(), value.clone().requires_grad_(), weight]
        poisoned = value.clone()
        if keep is not None:
            poisoned = poisoned.masked_fill(~keep[:, None, :, None], float("nan"))
        poisoned.requires_grad_()
        expected, found = right(*given, keep), cpu_add_nearby(mixed, poisoned, weight, keep)
        message = lambda m, side=side: f"{side} padding: {m}"  # noqa: E731
        assert_close(found, expected, msg=message)
        assert_close(
            torch.autograd.grad(found, (mixed, poisoned, weight), grad),
            torch.autograd.grad(expected, given, grad),
            msg=message,
        )
        with torch.no_grad():
            assert_close(cpu_add_nearby(mixed.detach().clone(), poisoned, weight, keep), expected, msg=message)


def test_gradients_of_gradients_and_of_some_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby_cpu, "_BLOCK", 4)
    keep = paddings(2, 9)["right"]
    mixed, value, _ = (x.detach()[:, :2, :, :2] for x in qkv(2, 9))
    weight = kernels(5).detach()[:2]
    for wanted in ((0,), (1,), (2,), (0, 1, 2)):
        given = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((mixed, value, weight))]
        assert torch.autograd.gradcheck(lambda *x: cpu_add_nearby(*x, keep), given)
        assert torch.autograd.gradgradcheck(lambda *x: cpu_add_nearby(*x, keep), given)
    found = torch.func.grad(lambda w: cpu_add_nearby(mixed, value, w, keep).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    assert_close(found, torch.autograd.grad(right(mixed, value, leaf, keep).square().sum(), leaf)[0])


def module(taps: int) -> NystromformerSelfAttention:
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_size=HEADS * 8,
        num_attention_heads=HEADS,
        attention_probs_dropout_prob=0.0,
        num_landmarks=8,
        conv_kernel_size=taps,
        pinv_iterations=6,
        inv_coeff_init_option=True,
        check_options=lambda: None,
        _attn_implementation="sdpa",
    )
    return NystromformerSelfAttention(config, 0)


def test_gradients_of_published_kernels_are_right_in_single_precision() -> None:
    """oneDNN's are not, for 65 taps over more than 64 tokens."""
    ours = module(65)
    mixed, value, grad = (x.detach().float() for x in qkv(1, 200))
    (found,) = torch.autograd.grad(ours._add_nearby(mixed, value, None), ours.conv.weight, grad)
    weight = ours.conv.weight.detach().double()[:, 0, :, 0].requires_grad_()
    near = convolution(value.double(), None, weight)
    assert_close(found[:, 0, :, 0].double(), torch.autograd.grad(near, weight, grad.double())[0], rtol=1e-4, atol=1e-4)


def test_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a hook would miss the module's call, nor in other dtypes; results are the same."""
    calls: list[torch.dtype] = []

    def spy(mixed: Tensor, *rest: Tensor) -> Tensor:
        calls.append(mixed.dtype)
        return cpu_add_nearby(mixed, *rest)

    monkeypatch.setattr("hf_efficient_attn.attention.nystromformer.cpu_add_nearby", spy)
    ours, states = module(5), torch.randn(2, 50, HEADS * 8, generator=torch.Generator().manual_seed(0))
    keep = paddings(2, 50)["left"]
    plain, _ = ours(states, keep)
    assert calls == [torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = ours(states, keep)
    assert_close(half.float(), plain, rtol=0.1, atol=0.1)
    seen = []
    ours.conv.register_forward_hook(lambda *x: seen.append(x))
    hooked, _ = ours(states, keep)
    assert calls == [torch.float32] and len(seen) == 1
    assert_close(hooked, plain)
