"""The kernels of a GPU, in Triton's interpreter where there is none: every row of the table that takes one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import HEADS, ROW_IDS, ROWS, Case, paddings, slots
from torch import Tensor

from hf_efficient_attn.functional import FusedTable, dense_execution


kernels = pytest.importorskip("hf_efficient_attn.cuda", reason="Triton is there for Linux only").KERNELS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEAD_DIM = 16  # the smallest that kernels are for
# Mechanisms, and variants of theirs by the beginning of the name, that no kernel is for.
WITHOUT = {
    "softmax": ("",),
    "neighborhood": ("",),
    "longformer": ("dilated", "causal dilated"),
    "nystromformer": ("inverted exactly",),
    "performer": ("relu", "causal"),
    "lsh": ("paper",),
}
# The interpreter takes a hundredth of a second for each pair of blocks: without a GPU, only these rows.
QUICK = {
    "longformer": ("wide, in blocks", "global, in blocks", "causal global"),
    "big_bird": ("internal", "both"),
    "nystromformer": ("eight, in blocks", "scaled by example"),
    "performer": ("softmax",),
    "lsh": ("one round", "three rounds"),
    "local": ("ahead", "causal"),
}
TAKEN = [
    pair
    for pair in zip(ROWS, ROW_IDS, strict=True)
    if not any(pair[0][1].startswith(start) for start in WITHOUT.get(pair[0][0].name, ()))
    and (DEVICE.type == "cuda" or pair[0][1] in QUICK.get(pair[0][0].name, ()))
]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels take float32 on this device; the names of those that were called."""
    names: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return kernels[name](*args, **kwargs)

        return kernel

    table = {name: counted(name) for name in kernels}
    monkeypatch.setattr(FusedTable, "source", staticmethod(lambda: table))
    monkeypatch.setattr(FusedTable, "devices", (DEVICE.type,))
    monkeypatch.setattr(FusedTable, "dtypes", (torch.float32,))
    return names


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
@pytest.mark.parametrize("length", [1, 70])
def test_equals_the_oracle_in_result_and_every_gradient(
    case: Case, variant: str, length: int, used: list[str]
) -> None:
    """With NaN in padding, which no kernel may read."""
    chosen, options = case.variants[variant], options_of(case, variant)
    for side, keep in paddings(2, length).items():
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
