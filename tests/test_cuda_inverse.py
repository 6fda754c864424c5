"""The inverse's iteration and the means of segments on a GPU: against their definitions, with every gradient."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton_interpreter import DEVICE

from hf_efficient_attn.cuda import arithmetic
from hf_efficient_attn.cuda.inverse import pinv_iterations
from hf_efficient_attn.cuda.segments import segment_means
from hf_efficient_attn.functional.nystrom import segment_landmarks


def right_iterations(matrix: Tensor, start: Tensor, iterations: int) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ start
        start = start @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
    return start


@pytest.mark.parametrize(("size", "iterations"), [(16, 6), (32, 1), (64, 4)])
def test_iterations(size: int, iterations: int) -> None:
    scores, grad = torch.randn(2, 2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = (3 * scores).softmax(dim=-1).to(DEVICE)
    start = (matrix.transpose(-1, -2) / matrix.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)).detach()
    given, ours = [matrix, start], [matrix.float(), start.float()]
    for x in given + ours:
        x.requires_grad_()
    right, found = right_iterations(*given, iterations), pinv_iterations(*ours, iterations)
    assert_close(found.double(), right, rtol=0, atol=1e-5 * right.abs().max().item())
    grads = torch.autograd.grad(right, given, grad.to(DEVICE))
    for a, b in zip(torch.autograd.grad(found, ours, grad.to(DEVICE).float()), grads, strict=True):
        assert_close(a.double(), b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "landmarks", "side"), [(150, 16, None), (150, 70, "left"), (20, 33, "right")])
def test_means(
    length: int, landmarks: int, side: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "PROGRAMS", 12)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(2, length, 2, 16, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    grad = torch.randn(2, 2, landmarks, 16, generator=generator).to(DEVICE)
    keep = None
    if side is not None:
        keep = torch.arange(length, device=DEVICE)[None] < torch.tensor([[length], [length // 3]], device=DEVICE)
        keep = keep.flip(1) if side == "left" else keep
    marks = segment_landmarks(tensor.float(), keep, landmarks)
    given = tensor.double().requires_grad_()
    right = marks._replace(sizes=marks.sizes.double()).means(given)
    ours = tensor if keep is None else tensor.masked_fill(~keep[:, None, :, None], float("nan"))
    ours = ours.detach().requires_grad_()
    found = segment_means(ours, marks.segment, marks.sizes)
    assert_close(found.double(), right, rtol=1e-6, atol=1e-6)
    found_grad, right_grad = (
        torch.autograd.grad(found, ours, grad)[0],
        torch.autograd.grad(right, given, grad.double())[0],
    )
    assert_close(found_grad.double(), right_grad, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)
    if keep is not None:
        assert (found_grad.transpose(1, 2)[~keep] == 0).all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="where kernels are interpreted")
def test_operators_keep_the_rules_of_torch() -> None:
    operators = torch.ops.hf_efficient_attn
    matrix, start = (torch.rand(1, 2, 16, 16, requires_grad=True) for _ in range(2))
    torch.library.opcheck(operators.pinv_iterations.default, (matrix / 16, start, 2))
    tensor = torch.randn(1, 20, 2, 16).transpose(1, 2).requires_grad_()
    marks = segment_landmarks(tensor, None, 4)
    torch.library.opcheck(operators.segment_means.default, (tensor, marks.segment, marks.sizes))
