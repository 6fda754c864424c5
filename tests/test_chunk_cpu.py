"""The CPU's path of LSH and local attention: equal to the portable path and to the dense form, and really taken."""

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_efficient_attn.functional import chunk_attention, chunk_cpu, dense_chunk_attention


# The module; its name is that of the function in the package.
MODULE = sys.modules[chunk_attention.__module__]
HEADS, WIDTH = 2, 4
# Chunks before and after; one pair is more chunks than short texts have.
REACHES = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 2), (2, 2))
# A block at a time, some of them, some heads, and everything at once.
SIZES = (1, 5_000, 40_000, 10**8)


def tensors(batch: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (batch, HEADS, length, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def some_buckets(batch: int, length: int, rounds: int | None) -> Tensor | None:
    if rounds is None:
        return None
    generator = torch.Generator().manual_seed(rounds)
    return torch.randint(0, 4, (batch, HEADS, rounds, length), generator=generator)


def some_padding(length: int) -> Tensor:
    """Nothing, left, right, everything, in between, right as much as before."""
    place, part = torch.arange(length), length // 3
    right = place < length - part
    return torch.stack([place >= 0, place >= part, right, place < 0, place % 5 != 1, right])


def with_grads(function: Callable[..., Tensor], inputs: list[Tensor], keep: Tensor | None = None) -> list[Tensor]:
    mixed = function(*inputs, keep)
    mixed = mixed[0] if isinstance(mixed, tuple) else mixed
    weights = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed).cos()
    return [mixed.detach(), *torch.autograd.grad((mixed * weights).sum(), inputs)]


def without_kernel(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """`function` as devices without the kernel compute it."""

    def portable(*args: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return function(*args)

    return portable


def assert_equal(found: list[Tensor], right: list[Tensor], atol: float = 1e-10) -> None:
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("length", [1, 7, 40, 64, 130])
@pytest.mark.parametrize("rounds", [None, 1, 3])
def test_equals_the_portable_path_and_the_dense_form(
    length: int, rounds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    kernel = MODULE.cpu_chunk_attention
    monkeypatch.setattr(MODULE, "cpu_chunk_attention", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    keep = some_padding(length)
    inputs = {mask is not None: tensors(1 if mask is None else len(keep), length) for mask in (None, keep)}
    settings = product((8, 16), REACHES, (False, True), (False, True), (False, True), (None, keep))
    for number, (chunk, (before, after), causal, released, exclude_self, mask) in enumerate(settings):
        if (rounds is not None and not released) or (length < 8 and chunk == 16):
            continue
        monkeypatch.setattr(chunk_cpu, "CHUNK_BYTES", SIZES[number % 7 % 4])
        own = inputs[mask is not None]
        options = {"chunk_length": chunk, "chunks_before": before, "chunks_after": after, "causal": causal}
        options |= {"released": released, "exclude_self": exclude_self}
        options["buckets"] = some_buckets(len(own[0]), length, rounds)

        def ours(*args: Any, options: dict[str, Any] = options) -> Tensor:
            return chunk_attention(*args, **options)

        found = with_grads(ours, own, mask)
        assert len(calls) == 1 and not calls.clear()
        assert_equal(found, with_grads(without_kernel(ours, monkeypatch), own, mask))
        assert not calls
        if number % 5 == 0:
            right = with_grads(lambda *args, options=options: dense_chunk_attention(*args, **options), own, mask)
            assert_equal(found, right)
        if mask is not None:
            for tensor in found:
                assert not tensor.masked_select(~mask[:, None, :, None]).any()


LAYERS = {
    "local": {"buckets": None, "chunk_length": 8, "chunks_before": 1, "chunks_after": 1, "released": False},
    "ring": {"buckets": None, "chunk_length": 8, "chunks_before": 1, "chunks_after": 1, "released": True},
    "one round": {"chunk_length": 8, "chunks_before": 1, "chunks_after": 0, "released": True},
    "rounds": {"chunk_length": 8, "chunks_before": 1, "chunks_after": 0, "released": True},
}


def layer(name: str, batch: int, length: int, **more: Any) -> Callable[..., Tensor]:
    rounds = {"one round": 1, "rounds": 3}.get(name)
    options = {"causal": False, "exclude_self": rounds is not None, "buckets": some_buckets(batch, length, rounds)}
    options |= LAYERS[name] | more
    return lambda *args: chunk_attention(*args, **options)


LAYER = pytest.mark.parametrize("name", list(LAYERS))


@LAYER
@pytest.mark.parametrize("chunk", SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_under_dropout(name: str, chunk: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of what was computed: its slope, by finite differences."""
    monkeypatch.setattr(chunk_cpu, "CHUNK_BYTES", chunk)
    keep = some_padding(50)
    inputs, function = tensors(len(keep), 50), layer(name, len(keep), 50, causal=causal, dropout_p=0.3)

    def loss(*inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(*inputs, keep).sin().sum()

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for which, gradient in enumerate(gradients):
        moved = lambda step, which=which: [  # noqa: E731
            x + step * direction if number == which else x for number, x in enumerate(inputs)
        ]
        with torch.no_grad():
            slope = (loss(*moved(1e-6)) - loss(*moved(-1e-6))) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@LAYER
def test_dropout_keeps_the_mean(name: str) -> None:
    inputs = [x.detach() for x in tensors(1, 40)]
    right = layer(name, 1, 40)(*inputs)
    dropping = layer(name, 1, 40, dropout_p=0.25)
    torch.manual_seed(0)
    draws = torch.stack([dropping(*inputs) for _ in range(800)])
    assert (draws[0] - draws[1]).abs().max() > 0.1
    assert (draws.mean(dim=0) - right).abs().max() < 0.15


@LAYER
def test_dropping_everything(name: str) -> None:
    inputs = tensors(2, 20)
    for tensor in with_grads(layer(name, 2, 20, dropout_p=1.0), inputs):
        assert not tensor.any()


@LAYER
def test_other_orders_in_memory(name: str) -> None:
    """Heads behind tokens, numbers in steps, one head for all: inputs, and gradients that come in, in any order."""
    function, inputs = layer(name, 2, 30), [x.detach() for x in tensors(2, 30)]
    inputs[1] = inputs[1][:, :1].expand(-1, HEADS, -1, -1)
    wide = torch.randn(2, 30, HEADS, 2 * WIDTH, dtype=torch.float64)
    wide[..., ::2] = inputs[2].transpose(1, 2)
    other = [inputs[0].transpose(1, 2).contiguous().transpose(1, 2), inputs[1], wide[..., ::2].transpose(1, 2)]
    right = with_grads(function, [x.clone().contiguous().requires_grad_() for x in inputs])
    assert_equal(with_grads(function, [x.requires_grad_() for x in other]), right)
    whole = other[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(function(whole, *other[1:]).sum(), whole)
    weights = torch.ones_like(whole)
    (right,) = torch.autograd.grad((function(whole, *other[1:]) * weights).sum(), whole)
    torch.testing.assert_close(found, right)


@LAYER
def test_only_some_gradients(name: str) -> None:
    function, inputs = layer(name, 2, 30), tensors(2, 30)
    right = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    for which in range(3):
        some = [x if number == which else x.detach() for number, x in enumerate(inputs)]
        (found,) = torch.autograd.grad(function(*some).square().sum(), some[which])
        torch.testing.assert_close(found, right[which])


@LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Computed in float32, also under autocast."""
    function, inputs = layer(name, 2, 30), tensors(2, 30, dtype)
    found = with_grads(function, inputs)
    assert all(x.dtype == dtype for x in found)
    right = with_grads(function, [x.detach().double().requires_grad_() for x in inputs])
    assert_equal([x.double() for x in found], right, 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(with_grads(function, inputs), found, 0.0)


def test_a_token_with_none_but_itself_in_float32() -> None:
    """The first of a causal text meets itself in each round: its penalty is no reason to lose digits."""
    inputs, function = tensors(1, 20, torch.float32), layer("rounds", 1, 20, causal=True)
    right = with_grads(function, [x.detach().double().requires_grad_() for x in inputs])
    assert_equal([x.double() for x in with_grads(function, inputs)], right, 1e-5)


@LAYER
@pytest.mark.parametrize("chunk", SIZES)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_no_number_reaches_another_head_or_example(
    name: str, chunk: int, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that is none: heads lie behind one another in memory, and 0 times NaN is NaN. Nor from padding."""
    monkeypatch.setattr(chunk_cpu, "CHUNK_BYTES", chunk)
    keep = torch.ones(3, 43, dtype=torch.bool)
    keep[2, -6:] = False
    function, inputs = layer(name, 3, 43), tensors(3, 43)
    right = with_grads(function, inputs, keep)
    others = torch.ones(3, HEADS, dtype=torch.bool)
    others[0, 1] = False
    for which in range(3):
        dirty = [x.detach().clone() for x in inputs]
        dirty[which][0, 1, -3:] = poison
        dirty[which][2, :, -6:] = poison
        found = with_grads(function, [x.requires_grad_() for x in dirty], keep)
        assert_equal([x[others] for x in found], [x[others] for x in right])


def test_what_is_kept_for_backward() -> None:
    """Inputs and the plan; with several rounds the result and a number a row and round."""
    numbers = {name: 0 for name in LAYERS}
    length = 64
    for name in LAYERS:
        function, inputs = layer(name, 1, length), tensors(1, length)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            function(*inputs)
        numbers[name] = sum(x.numel() for x in kept if x.is_floating_point())
        assert all(x.numel() <= 2 * 3 * HEADS * length for x in kept if not x.is_floating_point())
    rows = HEADS * length
    assert numbers == {
        "local": 3 * rows * WIDTH,
        "ring": 3 * rows * WIDTH,
        "one round": 3 * rows * WIDTH,
        "rounds": 4 * rows * WIDTH + 3 * rows,
    }


@LAYER
def test_it_is_taken_in_eager_mode_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = MODULE.cpu_chunk_attention
    monkeypatch.setattr(MODULE, "cpu_chunk_attention", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    function, inputs = layer(name, 2, 30), [x.detach() for x in tensors(2, 30)]
    right = function(*inputs)
    assert len(calls) == 1
    compiled = torch.compile(function, backend="eager")
    torch.testing.assert_close(compiled(*inputs), right, rtol=0, atol=1e-10)
    assert len(calls) == 1


def test_the_papers_form_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "cpu_chunk_attention", None)
    inputs = [x.detach() for x in tensors(2, 30)]
    assert layer("rounds", 2, 30, released=False)(*inputs).isfinite().all()
