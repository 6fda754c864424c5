"""The kernels of a GPU, in Triton's interpreter where there is none: every row of the table that takes one."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import HEADS, ROW_IDS, ROWS, Case, paddings, slots
from torch import Tensor
from triton_interpreter import DEVICE

from hf_efficient_attn.cuda import FUSED, room
from hf_efficient_attn.functional import (
    FusedTable,
    add_nearby,
    big_bird_attention,
    chunk_attention,
    dense_execution,
    fused,
    fused_kernels,
    select_tokens,
    sliding_window_attention,
)


HEAD_DIM = 16  # the smallest that kernels are for
# Mechanisms, and variants of theirs by the beginning of the name, that no kernel is for.
WITHOUT = {
    "softmax": ("",),
    "longformer": ("dilated", "causal dilated"),
    "nystromformer": ("inverted exactly",),
    "performer": ("relu", "causal"),
    "lsh": ("",),  # the rows' directions are for another head size; below
}
# The interpreter takes a hundredth of a second for each pair of blocks: without a GPU, only these rows.
QUICK = {
    "longformer": ("wide, in blocks", "global, in blocks", "causal global"),
    "big_bird": ("internal", "both"),
    "nystromformer": ("eight, in blocks", "scaled by example"),
    "performer": ("softmax",),
    "local": ("ahead", "causal"),
    "neighborhood": ("wide", "registers"),
}
TAKEN = [
    pair
    for pair in zip(ROWS, ROW_IDS, strict=True)
    if not any(pair[0][1].startswith(start) for start in WITHOUT.get(pair[0][0].name, ()))
    and (DEVICE.type == "cuda" or pair[0][1] in QUICK.get(pair[0][0].name, ()))
]


def rows_of(batch: int, length: int) -> list[Tensor]:
    """Query, key, value and the weight of each number of the result."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, HEADS, length, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(4)]


def on(device: torch.device, options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}


def options_of(case: Case, variant: str) -> dict[str, Any]:
    options = dict(case.variants[variant].options)
    if case.name == "performer":
        generator = torch.Generator().manual_seed(7)
        options["projection"] = torch.randn(len(options["projection"]), HEAD_DIM, generator=generator).double()
    return options


@pytest.mark.parametrize(("case", "variant"), [row for row, _ in TAKEN], ids=[name for _, name in TAKEN])
@pytest.mark.parametrize("length", [1, 70 if DEVICE.type == "cuda" else 41])
def test_equals_the_oracle_in_result_and_every_gradient(case: Case, variant: str, length: int, used: list[str]) -> None:
    """With NaN in padding, which no kernel may read."""
    chosen, options = case.variants[variant], options_of(case, variant)
    for side, keep in paddings(2, length).items():
        if side == "right" and DEVICE.type == "cpu":
            continue
        *inputs, weight = rows_of(2, length)
        is_global = chosen.is_global(2, length)
        right = [x.clone().requires_grad_() for x in inputs]
        expected = case.oracle(*right, keep, None if is_global is None else slots(is_global, keep).mask, **options)
        expected = [expected, *torch.autograd.grad((expected * weight).sum(), right)]
        ours = [x.to(DEVICE, torch.float32) for x in inputs]
        hidden = None if keep is None else ~keep.to(DEVICE)[:, None, :, None]
        if hidden is not None:
            ours = [x.masked_fill(hidden, torch.nan) for x in ours]
        # In memory as a model has them: the heads of a token side by side.
        ours = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in ours]
        marked = None if is_global is None else is_global.to(DEVICE)
        mask = None if keep is None else keep.to(DEVICE)
        with dense_execution(chosen.dense):
            result = case.formula(*ours, mask, marked, **on(DEVICE, options))
        found = [result, *torch.autograd.grad((result * weight.to(DEVICE, torch.float32)).sum(), ours)]
        for what, mine, right_one in zip(("result", "query", "key", "value"), found, expected, strict=True):
            tolerance = 2e-4 * chosen.rounding * max(1.0, right_one.abs().max().item())
            difference = (mine.cpu().double() - right_one).abs().max().item()
            assert difference <= tolerance, (side, what, difference)
    assert used or length == 1 or variant == "more than tokens"


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_sorted_chunks_equal_the_portable_way(rounds: int, causal: bool, used: list[str]) -> None:
    """LSH as released: chunks of sorted tokens in a ring, each token itself only where there is nothing else."""
    length, keep = 37, paddings(2, 37)["left"]
    *inputs, weight = rows_of(2, length)
    buckets = torch.randint(4, (2, HEADS, rounds, length), generator=torch.Generator().manual_seed(1))
    near = {"chunk_length": 8, "chunks_before": 1, "chunks_after": 0 if causal else 1, "causal": causal}
    found = []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        rows = [x.to(device, dtype).requires_grad_() for x in inputs]
        mixed = chunk_attention(
            *rows, keep.to(device), buckets=buckets.to(device), released=True, exclude_self=True, **near
        )
        found.append([mixed, *torch.autograd.grad((mixed * weight.to(mixed)).sum(), rows)])
    assert used == ["blocks"] * rounds
    for right, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu().double(), right, rtol=2e-4, atol=2e-4)


def test_the_logarithm_of_a_sum_has_gradients(used: list[str]) -> None:
    query, key, value, weight = (x[:1, :1, :20].to(DEVICE, torch.float32) for x in rows_of(1, 20))
    rows = [x.clone().requires_grad_() for x in (query, key, value)]
    lists = torch.tensor([[[[0, 1], [1, -1], [2, 1]]]], device=DEVICE)
    mixed, lse = fused("blocks", query)(*rows, lists, None, None, size=8, scale=0.3, dropout_p=0.0)
    ours = torch.autograd.grad((mixed * weight).sum() + (lse * weight[..., 0]).sum(), rows)
    rows = [x.clone().requires_grad_() for x in (query, key, value)]
    block = torch.arange(20, device=DEVICE) // 8
    listed = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1]], device=DEVICE, dtype=torch.bool)[block][:, block]
    scores = (rows[0] @ rows[1].transpose(-1, -2) * 0.3).masked_fill(~listed, -torch.inf)
    right = (scores.softmax(dim=-1) @ rows[2] * weight).sum() + (scores.logsumexp(dim=-1) * weight[..., 0]).sum()
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, torch.autograd.grad(right, rows), rtol=1e-4, atol=1e-5)


def one_head(length: int) -> list[Tensor]:
    return [x[:1, :1].to(DEVICE, torch.float32) for x in rows_of(1, length)]


def windows(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    near = torch.zeros(1, query.shape[2], dtype=torch.bool, device=DEVICE)
    near[:, 3] = True
    return sliding_window_attention(
        query, key, value, radius=6, dropout_p=dropout_p, global_tokens=select_tokens(near, 1)
    )


def blocks(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    lists = torch.tensor([[[[0, 1], [1, 0]]]], device=DEVICE)
    return fused("blocks", query)(query, key, value, lists, None, None, size=8, scale=0.25, dropout_p=dropout_p)[0]


@pytest.mark.parametrize("attention", [windows, blocks])
def test_dropout_drops_the_same_in_both_passes(
    attention: Callable[..., Tensor], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, _, weight = one_head(16)
    # Values that show each probability: the result's column j is that of key j.
    value = torch.eye(16, device=DEVICE)[None, None]
    torch.manual_seed(3)
    dropped = attention(query, key, value, 0.5)
    whole = attention(query, key, value, 0.0)
    factor = dropped / whole
    kept = factor > 1.0
    assert ((factor < 1e-4) | ((factor - 2.0).abs() < 1e-3) | (whole == 0)).all()
    assert 0.3 < kept[whole > 0].float().mean() < 0.7
    rows = [x.clone().requires_grad_() for x in (query, key, value)]
    torch.manual_seed(3)
    ours = torch.autograd.grad((attention(*rows, 0.5) * weight).sum(), rows)
    rows = [x.clone().requires_grad_() for x in (query, key, value)]
    scores = (rows[0] @ rows[1].transpose(-1, -2) * 0.25).masked_fill(whole == 0, -torch.inf)
    mixed = (scores.softmax(dim=-1) * kept * 2.0) @ rows[2]
    torch.testing.assert_close(ours, torch.autograd.grad((mixed * weight).sum(), rows), rtol=1e-4, atol=1e-5)
    assert used
    torch.manual_seed(4)
    assert not torch.equal(attention(query, key, value, 0.5), dropped)


def sliced(mask: Tensor) -> Tensor:
    return torch.cat([mask, ~mask], dim=1)[:, : mask.shape[1]]


def transposed(mask: Tensor) -> Tensor:
    return mask.T.contiguous().T


@pytest.mark.parametrize("laid_out", [sliced, transposed])
def test_masks_may_lie_in_memory_as_they_like(laid_out: Callable[[Tensor], Tensor], used: list[str]) -> None:
    keep = paddings(2, 40)["left"].to(DEVICE)
    strange = laid_out(keep)
    assert torch.equal(strange, keep) and strange.stride() != keep.stride()
    query, key, value, _ = (x.to(DEVICE, torch.float32) for x in rows_of(2, 40))
    weight = value[0, :, :7, 0].contiguous()
    for attend in (
        lambda mask: sliding_window_attention(query, key, value, mask, radius=5),
        lambda mask: chunk_attention(query, key, value, mask, buckets=None, exclude_self=False, **CHUNKS),
        lambda mask: add_nearby(query, value, weight, mask),
    ):
        torch.testing.assert_close(attend(strange), attend(keep), rtol=0, atol=0)
    assert used


CHUNKS = {"chunk_length": 8, "chunks_before": 1, "chunks_after": 0, "causal": False, "released": True}


@pytest.mark.parametrize("attention", [windows, blocks])
def test_gradients_of_gradients_are_refused(attention: Callable[..., Tensor], used: list[str]) -> None:
    rows = [x.requires_grad_() for x in one_head(16)[:3]]
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(attention(*rows, 0.0).sum(), rows, create_graph=True)


def test_transforms_of_functions_go_by_torchs_operations(used: list[str]) -> None:
    query, key, value, _ = one_head(24)

    def total(rows: Tensor) -> Tensor:
        return sliding_window_attention(rows, key, value, radius=4).square().sum()

    with torch.enable_grad():
        leaf = query.clone().requires_grad_()
        right = torch.autograd.grad(total(leaf), leaf)[0]
    assert used == ["window"]
    torch.testing.assert_close(torch.func.grad(total)(query), right, rtol=1e-4, atol=1e-5)
    assert used == ["window"], "no kernel was asked again"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_rounding(
    dtype: torch.dtype, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedTable, "dtypes", (dtype,))
    *inputs, weight = (x[:1, :2, :40] for x in rows_of(1, 40))
    keep = paddings(2, 40)["left"][1:]
    marked = torch.zeros(1, 40, dtype=torch.bool)
    marked[:, 30] = True
    none = torch.zeros(1, 2, 3, 0, dtype=torch.long)
    for attend in (
        lambda q, k, v, mask, on: sliding_window_attention(
            q, k, v, mask, radius=6, global_tokens=select_tokens(marked.to(on), 1)
        ),
        lambda q, k, v, mask, on: big_bird_attention(q, k, v, mask, block_size=16, random_blocks=none.to(on)),
        lambda q, k, v, mask, on: add_nearby(q, v, k[0, :, :7, 0], mask),
    ):
        found = []
        for kind, device in ((torch.float64, torch.device("cpu")), (dtype, DEVICE)):
            rows = [x.to(device, dtype).to(kind).requires_grad_() for x in inputs]
            mixed = attend(*rows, keep.to(device), device)
            grads = torch.autograd.grad((mixed * weight.to(mixed)).sum(), rows, allow_unused=True)
            found.append([mixed, *(x for x in grads if x is not None)])
        for right, ours in zip(*found, strict=True):
            assert (ours.cpu().double() - right).abs().max() <= 3e-2 * right.abs().max()
    assert set(used) >= {"window", "add_nearby"}


def test_any_way_to_a_formula_finds_them() -> None:
    """The table has its source as soon as it is imported, whatever imports it."""
    program = "import hf_efficient_attn\nfrom hf_efficient_attn.functional import FusedTable\nprint(FusedTable.source)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "_kernels" in result.stdout


def test_the_smallest_gpu_says_how_much_room_there_is(used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = (SimpleNamespace(shared_memory_per_block_optin=size) for size in (232_448, 101_376))
    assert room.least([large, large], True) == 232_448 and room.least([large, small], True) == room.NARROW
    assert room.least([], True) == room.WIDE
    assert room.least([large], False) == 0 and room.least([large, SimpleNamespace()], True) == 0
    wide = [torch.zeros(1, 1, 16, 128, device=DEVICE)] * 3
    matrix = torch.eye(64, device=DEVICE)
    for size, taken in ((room.NARROW, (False, False)), (166_912, (False, True)), (room.WIDE, (True, True))):
        monkeypatch.setattr(room, "ROOM", size)
        found = [FUSED["add_nearby"](wide[0], wide[1], wide[0][0, :, :7, 0], None)]
        found.append(FUSED["pinv_iterations"](matrix, matrix, 1))
        assert tuple(x is not None for x in found) == taken


def test_can_be_turned_off(used: list[str]) -> None:
    rows = one_head(16)[:3]
    with fused_kernels(False):
        portable = windows(*rows, 0.0)
    assert not used
    torch.testing.assert_close(windows(*rows, 0.0), portable, rtol=1e-4, atol=1e-5)
    assert used == ["window"]


@pytest.mark.parametrize("attention", [windows, blocks])
def test_what_is_added_atomically_is_not_deterministic(
    attention: Callable[..., Tensor], used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = one_head(16)[:3]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    if attention is windows:
        attention(*rows, 0.0)
    else:
        with pytest.raises(TypeError, match="NoneType"):
            attention(*rows, 0.0)
    assert len(used) == 1, "it is asked, and leaves it to others"
    if attention is windows:
        with fused_kernels(False):
            right = attention(*rows, 0.0)
        torch.testing.assert_close(attention(*rows, 0.0), right, rtol=0, atol=0)


@pytest.mark.parametrize("grid", [None, (1, 5, 1, 1)])
@pytest.mark.parametrize(
    "name",
    ["hf_efficient_attn::window_forward", "hf_efficient_attn::blocks_forward", "hf_efficient_attn::add_nearby"],
)
def test_operators_keep_the_rules_of_torch(name: str, grid: tuple[int, ...] | None, used: list[str]) -> None:
    if grid is not None and not name.endswith("blocks_forward"):
        pytest.skip("has no grid")
    query, key, value, _ = (x.requires_grad_() for x in one_head(16))
    if name.endswith("add_nearby"):
        args = (query, key, torch.randn(1, 3, device=DEVICE).requires_grad_(), None)
    elif name.endswith("window_forward"):
        args = (query, key, value, *(None,) * 7, 3, 3, False, 0.25, 0.0)
    else:
        lists = torch.tensor([[[[0, 1], [1, -1]]]], device=DEVICE, dtype=torch.int32)
        args = (query, key, value, lists, None, None, None, 8, 0, False, False, grid, 0.25, 0.0)
    namespace, operator = name.split("::")
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, args)


@pytest.mark.parametrize("attention", [windows, blocks])
def test_a_graph_has_the_kernels(attention: Callable[..., Tensor], used: list[str]) -> None:
    rows = one_head(16)[:3]
    expected = attention(*rows, 0.0)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*rows, 0.0), expected)
