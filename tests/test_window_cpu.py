"""The CPU's path of window attention in pieces of any size: what the laws over small inputs do not reach."""

import pytest
import torch
from cases import HEADS, ROWS, Case, paddings, qkv
from test_formulas import formula, is_global_of, with_grads
from torch import Tensor

from hf_efficient_attn.functional import dense_execution, sliding_window_attention, window_cpu


WINDOW_ROWS = [(case, name) for case, name in ROWS if case.name == "longformer" and not case.variants[name].dense]
WINDOW_ROW = pytest.mark.parametrize(("case", "variant"), WINDOW_ROWS, ids=[name for _, name in WINDOW_ROWS])


@WINDOW_ROW
@pytest.mark.parametrize("chunk", [1, 30_000, 300_000, 10**8])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_chunks_of_any_size(
    case: Case, variant: str, chunk: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block at a time, some blocks, some heads, several examples: always the oracle, and under dropout a gradient."""
    monkeypatch.setattr(window_cpu, "CHUNK_BYTES", chunk)
    keep = paddings(3, 200)["left"]
    inputs, is_global = qkv(3, 200), is_global_of(case, variant, 3, 200, keep)
    function = formula(case, variant, keep, is_global, dropout_p=dropout_p)
    if dropout_p == 0.0:
        options = case.variants[variant].options
        right = with_grads(lambda q, k, v: case.oracle(q, k, v, keep, is_global, **options), inputs)
        for a, b in zip(with_grads(function, inputs), right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        return

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return function(*tensors).sin().sum()

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    direction = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    with torch.no_grad():
        ends = [loss(*(x + step * direction for x in inputs)) for step in (1e-6, -1e-6)]
    slope = sum((gradient * direction).sum() for gradient in gradients)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [32, 64, 100, 128])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_no_number_reaches_another_head_or_example(length: int, poison: float) -> None:
    """Not even one that is none: heads lie behind one another in memory, and 0 times NaN is NaN."""
    query, key, value = (x.detach() for x in qkv(2, length))
    with dense_execution(False):
        _check_poison(query, key, value, poison)


def _check_poison(query: Tensor, key: Tensor, value: Tensor, poison: float) -> None:
    right = sliding_window_attention(query, key, value, radius=10)
    for tensors in ((query, key, value), (query, value, key)):
        dirty = [x.clone() for x in tensors]
        dirty[2][0, 1, -3:] = poison
        inputs = dirty if tensors[2] is value else (dirty[0], dirty[2], dirty[1])
        ours = sliding_window_attention(*inputs, radius=10)
        others = torch.ones(2, HEADS, dtype=torch.bool)
        others[0, 1] = False
        torch.testing.assert_close(ours[others], right[others], rtol=0, atol=1e-12)
