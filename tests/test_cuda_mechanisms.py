"""Nyström attention and Performer in fused kernels: the same functions as in torch's operations."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton_interpreter import DEVICE

from hf_efficient_attn.cuda import FUSED, arithmetic
from hf_efficient_attn.functional import (
    FusedTable,
    dense_execution,
    fused_kernels,
    nystrom_attention,
    performer_attention,
)


HEADS, WIDTH = 2, 16


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels for float32 also on a CPU, and the names of those that gave something."""
    names: list[str] = []

    def counted(name: str, kernel: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            result = kernel(*args, **kwargs)
            if result is not None and not torch.compiler.is_compiling():
                names.append(name)
            return result

        return call

    table = {name: counted(name, kernel) for name, kernel in FUSED.items()}
    monkeypatch.setattr(FusedTable, "source", lambda: table)
    monkeypatch.setattr(FusedTable, "devices", ("cpu", "cuda"))
    monkeypatch.setattr(FusedTable, "dtypes", (torch.float32,))
    monkeypatch.setattr(arithmetic, "PROGRAMS", 12)
    yield names


def inputs(batch: int, length: int, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, length, HEADS, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE).transpose(1, 2) for _ in range(4)]


def padding(side: str | None, length: int) -> Tensor | None:
    """Of three examples one is whole, one has 7 tokens, fewer than landmarks, and one none."""
    if side is None:
        return None
    keep = torch.arange(length, device=DEVICE)[None] < torch.tensor([[length], [7], [0]], device=DEVICE)
    return keep.flip(1) if side == "left" else keep


def projection(features: int, width: int = WIDTH) -> Tensor:
    return torch.randn(features, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)


def formula(name: str, size: int, width: int = WIDTH, **options: object) -> Callable[..., Tensor]:
    if name == "performer":
        return partial(performer_attention, projection=projection(size, width), **options)
    return partial(nystrom_attention, num_landmarks=size, **{"pinv_iterations": 6, "scale_per_matrix": True} | options)


def both(
    attention: Callable[..., Tensor], given: list[Tensor], keep: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Result and gradients in kernels, with NaN at padding, and in torch's operations in float64."""
    *given, grad = (x.to(dtype) for x in given)
    found = []
    for fused in (True, False):
        own = [x.detach() if fused else x.detach().double() for x in given]
        if fused and keep is not None:
            own = [x.masked_fill(~keep[:, None, :, None], float("nan")) for x in own]
        own = [x.requires_grad_() for x in own]
        with fused_kernels(fused), dense_execution(False):
            mixed = attention(*own, keep)
        assert mixed.dtype == own[0].dtype
        found.append([mixed, *torch.autograd.grad(mixed, own, grad.to(mixed.dtype))])
    return found[0], found[1]


def check(found: list[Tensor], right: list[Tensor], keep: Tensor | None, tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(found, right, strict=True)):
        scale = b.abs().max().item()
        assert_close(a.double() / scale, b / scale, rtol=0, atol=tolerance, msg=lambda m, i=index: f"{i}: {m}")
        if keep is not None:
            assert (a.transpose(1, 2)[~keep] == 0).all()


CASES = {
    "performer": ("performer", 20, {}),
    "performer, scaled": ("performer", 70, {"scale": 0.1}),
    "16 landmarks": ("nystrom", 16, {}),
    "10 landmarks": ("nystrom", 10, {"scale": 0.5}),
    "32 landmarks, scaled by example": ("nystrom", 32, {"scale_per_matrix": False}),
}


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_portable_form(name: str, side: str | None, asked: list[str]) -> None:
    kind, size, options = CASES[name]
    keep = padding(side, 90)
    found, right = both(formula(kind, size, **options), inputs(1 if side is None else 3, 90), keep, torch.float32)
    check(found, right, keep, 1e-4)
    expected = {"feature_sums", "feature_mix"}
    if kind == "nystrom":
        expected |= {"segment_means"} | ({"pinv_iterations"} if size in (16, 32) else set())
    assert set(asked) == expected


@pytest.mark.parametrize("name", ["performer", "16 landmarks"])
def test_in_a_graph(name: str, asked: list[str]) -> None:
    """Whole, of any length, forward and backward."""
    kind, size, options = CASES[name]
    attention, keep = formula(kind, size, **options), padding("left", 40)
    *given, grad = (x.float() for x in inputs(3, 40))
    given = [x.requires_grad_() for x in given]
    right = attention(*given, keep)
    found = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=True)(*given, keep)
    assert_close(found, right)
    assert_close(torch.autograd.grad(found, given, grad), torch.autograd.grad(right, given, grad), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["performer", "16 landmarks"])
def test_dropout_is_unbiased_and_drawn_from_torchs_generator(name: str, asked: list[str]) -> None:
    kind, size, options = CASES[name]
    attention, given = formula(kind, size, **options), [x.float() for x in inputs(1, 40)[:3]]
    torch.manual_seed(0)
    draws = [attention(*given, dropout_p=0.1) for _ in range(30)]
    torch.manual_seed(0)
    assert torch.equal(attention(*given, dropout_p=0.1), draws[0])
    assert not torch.equal(draws[0], draws[1])
    right, spread = attention(*given), torch.stack(draws).std(dim=0).mean() / 30**0.5
    assert (torch.stack(draws).mean(dim=0) - right).abs().mean() < 3 * spread
    assert (attention(*given, dropout_p=1.0) == 0).all()


def test_what_the_kernels_are_not_for(asked: list[str]) -> None:
    query, key, value, _ = (x.float() for x in inputs(1, 20))
    performer_attention(query, key, value, projection=projection(8).float(), causal=True)
    performer_attention(query, key, value, projection=projection(8).float(), kernel="relu")
    nystrom_attention(query, key, value, num_landmarks=4, pinv_iterations=None, scale_per_matrix=True)
    thin = [x[..., :8] for x in (query, key, value)]
    performer_attention(*thin, projection=projection(8, 8).float())
    nystrom_attention(*thin, num_landmarks=4, pinv_iterations=6, scale_per_matrix=True)
    assert not asked


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "size", "width"), [("performer", 256, 64), ("nystrom", 64, 64), ("nystrom", 32, 128)])
def test_half_precision(kind: str, size: int, width: int, dtype: torch.dtype, side: str | None) -> None:
    """On a GPU, with nothing patched; the host never waits for it."""
    keep, given = padding(side, 1000), inputs(1 if side is None else 3, 1000, width)
    attention = formula(kind, size, width)
    found, right = both(attention, given, keep, dtype)
    check(found, right, keep, 3e-2)
    given = [x.to(dtype).requires_grad_() for x in given[:3]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(*given, keep, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
