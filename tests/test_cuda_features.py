"""Sums over keys and mixes for queries through features: against their definitions, with every gradient."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from triton_interpreter import DEVICE

from hf_efficient_attn.cuda import arithmetic
from hf_efficient_attn.cuda.features import feature_mix, feature_sums


BATCH, HEADS, WIDTH = 2, 2, 16


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(DEVICE) for x in shapes]


def padding(side: str | None, length: int) -> Tensor | None:
    if side is None:
        return None
    keep = torch.arange(length, device=DEVICE)[None] < torch.tensor([[length], [length // 3]], device=DEVICE)
    return keep.flip(1) if side == "left" else keep


def merged(tensor: Tensor, keep: Tensor | None = None) -> Tensor:
    """In float32, as the parts of merged heads, with NaN at padding."""
    tensor = tensor.float()
    if keep is not None:
        tensor = tensor.masked_fill(~keep[:, None, :, None], float("nan"))
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def dense_sums(
    key: Tensor, value: Tensor, weights: Tensor, keep: Tensor | None, drops: Tensor | float, root: float, half: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`drops` `[batch, heads, features, length]` are the factors of dropout."""
    logits = root * weights @ key.transpose(-1, -2)
    if half:
        logits = logits - root**2 * key.square().sum(dim=-1)[:, :, None] / 2
    if keep is not None:
        logits = logits.masked_fill(~keep[:, None, None], -torch.inf)
        value = value.masked_fill(~keep[:, None, :, None], 0.0)
    top = logits.detach().amax(dim=-1)
    top = torch.where(top == -torch.inf, 0.0, top)
    phi = (logits - top[..., None]).exp()
    return (phi * drops) @ value, phi.sum(dim=-1), top


def dense_mix(
    query: Tensor,
    weights: Tensor,
    table: Tensor,
    normalisers: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    drops: Tensor | float,
    root: float,
) -> Tensor:
    logits = root * query @ weights.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias[:, :, None]
    p = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()
    total = p @ normalisers[..., None]
    result = (p * drops) @ table / torch.where(total > 0, total, 1.0)
    return result if keep is None else result.masked_fill(~keep[:, None, :, None], 0.0)


def check(found: list[Tensor], right: list[Tensor], tolerance: float = 5e-5) -> None:
    """Relative to the largest entry."""
    for index, (a, b) in enumerate(zip(found, right, strict=True)):
        scale = b.abs().max().item() + 1e-30
        assert_close(a.double() / scale, b / scale, rtol=0, atol=tolerance, msg=lambda m, i=index: f"{i}: {m}")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that chunks are some tiles long, also the last one."""
    monkeypatch.setattr(arithmetic, "PROGRAMS", 12)


SHAPES = [(140, 70, True, None), (80, 16, False, "right"), (67, 100, False, "left"), (66, 5, True, "left")]


@pytest.mark.parametrize(("dropout_p", "whole_keys"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize(("length", "features", "shared", "side"), SHAPES)
def test_sums(length: int, features: int, shared: bool, side: str | None, dropout_p: float, whole_keys: bool) -> None:
    """Dropout is read off the sums of values that are an identity matrix."""
    shape = (BATCH, HEADS, length, WIDTH)
    rows = (features, WIDTH) if shared else (BATCH, HEADS, features, WIDTH)
    sums, ones = (BATCH, HEADS, features, WIDTH), (BATCH, HEADS, features)
    key, value, weights, sums_grad, ones_grad = tensors(shape, shape, rows, sums, ones)
    keep, root, seed = padding(side, length), 0.7, torch.tensor([7], device=DEVICE)
    options = {"root": root, "half_norm": shared, "precise": True}
    options |= {"dropout_p": dropout_p, "whole_keys": whole_keys, "seed": seed}
    drops = 1.0
    if dropout_p > 0.0:
        drops = torch.empty(BATCH, HEADS, features, length, dtype=torch.float64, device=DEVICE)
        flat = weights.float() * 0
        for start in range(0, length, WIDTH):
            part = min(WIDTH, length - start)
            probe = torch.zeros(BATCH, HEADS, length, WIDTH, device=DEVICE)
            probe[:, :, start : start + part, :part] = torch.eye(part, device=DEVICE)
            drops[..., start : start + part] = feature_sums(torch.zeros_like(probe), probe, flat, None, **options)[0][
                ..., :part
            ]
        assert set(drops.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < drops.mean() / 2 < 0.6
        if whole_keys:
            assert (drops == drops[:, :, :1]).all()
    given = [x.requires_grad_() for x in (key, value, weights)]
    right = dense_sums(*given, keep, drops, root, shared)
    right_grads = torch.autograd.grad(right[:2], given, (sums_grad, ones_grad))
    ours = [merged(key.detach(), keep), merged(value.detach(), keep), weights.detach().float()]
    ours = [x.requires_grad_() for x in ours]
    found = feature_sums(*ours, keep, **options)
    check(found, right)
    grads = torch.autograd.grad(found[:2], ours, (sums_grad.float(), ones_grad.float()))
    check(grads, right_grads)
    assert grads[0].transpose(1, 2).is_contiguous()
    if keep is not None:
        assert all((x.transpose(1, 2)[~keep] == 0).all() for x in grads[:2])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize(("length", "features", "shared", "side"), SHAPES)
def test_mix(length: int, features: int, shared: bool, side: str | None, dropout_p: float) -> None:
    """Dropout is read off the mixes of a table that is an identity matrix."""
    shape = (BATCH, HEADS, length, WIDTH)
    rows = (features, WIDTH) if shared else (BATCH, HEADS, features, WIDTH)
    query, weights, table, grad = tensors(shape, rows, (BATCH, HEADS, features, WIDTH), shape)
    normalisers, bias = tensors((BATCH, HEADS, features), (BATCH, HEADS, features), seed=1)
    normalisers = normalisers.exp()
    bias[1, 0, :3] = -torch.inf
    keep, root, seed = padding(side, length), 0.7, torch.tensor([7], device=DEVICE)
    options = {"root": root, "precise": True, "dropout_p": dropout_p, "seed": seed}
    drops = 1.0
    if dropout_p > 0.0:
        drops = torch.empty(BATCH, HEADS, length, features, dtype=torch.float64, device=DEVICE)
        zeros = torch.zeros(shape, device=DEVICE)
        for start in range(0, features, WIDTH):
            part = min(WIDTH, features - start)
            probe = torch.zeros(BATCH, HEADS, features, WIDTH, device=DEVICE)
            probe[:, :, start : start + part, :part] = features * torch.eye(part, device=DEVICE)
            one = torch.ones(BATCH, HEADS, features, device=DEVICE)
            part_drops = feature_mix(zeros, weights.float() * 0, probe, one, None, None, **options)
            drops[..., start : start + part] = part_drops[..., :part].round()
        assert set(drops.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < drops.mean() / 2 < 0.6
    given = [x.requires_grad_() for x in (query, weights, table, normalisers, bias)]
    right = dense_mix(*given, keep, drops, root)
    right_grads = torch.autograd.grad(right, given, grad)
    ours = [merged(query.detach(), keep), *(x.detach().float() for x in given[1:])]
    ours = [x.requires_grad_() for x in ours]
    found = feature_mix(*ours, keep, **options)
    check([found], [right])
    assert found.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(found, ours, merged(grad, keep))
    check(grads, right_grads)
    if keep is not None:
        assert all((x.transpose(1, 2)[~keep] == 0).all() for x in (found, grads[0]))


def test_half_precision_without_precise_products() -> None:
    """In bfloat16, with weights of float32 and of bfloat16: as near as its 8 bits; and nothing valid gives zeros."""
    shape = (BATCH, HEADS, 70, 32)
    query, key, value, grad = (x.bfloat16() for x in tensors(shape, shape, shape, shape))
    (weights,) = tensors((66, 32))
    keep = padding("right", 70)
    keep[1] = False
    for dtype in (torch.float32, torch.bfloat16):
        found, right = [], []
        for mine in (False, True):
            given = [x.to(x.dtype if mine else torch.float64).detach().requires_grad_() for x in (query, key, value)]
            rows = weights.to(dtype) if mine else weights.to(dtype).double()
            if mine:
                sums, ones, top = feature_sums(*given[1:], rows, keep, root=0.4, half_norm=True)
                mix = feature_mix(given[0], rows, sums, ones, top, keep, root=0.4)
            else:
                sums, ones, top = dense_sums(*given[1:], rows, keep, 1.0, 0.4, True)
                mix = dense_mix(given[0], rows, sums, ones, top, keep, 1.0, 0.4)
            (found if mine else right).extend([mix, *torch.autograd.grad(mix, given, grad.to(mix.dtype))])
        check(found, right, 2.5e-2)
        assert (found[0][1] == 0).all() and all((x[1] == 0).all() for x in found[1:])


@pytest.mark.skipif(DEVICE.type != "cpu", reason="where kernels are interpreted")
def test_operators_keep_the_rules_of_torch() -> None:
    """Schemas, shapes without data, autograd: what `torch.compile` relies on."""
    shape = (1, 2, 20, 16)
    key, value = (merged(x).requires_grad_() for x in tensors(shape, shape))
    weights, table = (x.float().requires_grad_() for x in tensors((1, 2, 5, 16), (1, 2, 5, 16)))
    ones = torch.ones(1, 2, 5, requires_grad=True)
    keep, seed = torch.ones(1, 20, dtype=torch.bool), torch.tensor([3])
    operators = torch.ops.hf_efficient_attn
    torch.library.opcheck(
        operators.feature_sums.default, (key, value, weights, keep, seed, 0.5, True, 0.2, False, True)
    )
    torch.library.opcheck(operators.feature_mix.default, (key, weights, table, ones, None, keep, seed, 0.5, 0.2, True))


def test_gradients_of_gradients_are_refused() -> None:
    shape = (1, 1, 16, 16)
    key, value, weights = (x.float().requires_grad_() for x in tensors(shape, shape, (4, 16)))
    sums = feature_sums(key, value, weights, None, root=1.0, half_norm=False)[0]
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(sums.sum(), key, create_graph=True)
