"""Tensors made once for a shape: kept where they serve the next call, and only there."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_efficient_attn.functional.kept import Kept


@pytest.fixture
def made() -> list[int]:
    return []


@pytest.fixture
def numbers(made: list[int]) -> Kept:
    def make(count: int) -> Tensor:
        made.append(count)
        return torch.arange(count)

    return Kept(make, most=2)


def test_makes_each_once_and_keeps_the_last_ones(numbers: Kept, made: list[int]) -> None:
    like = torch.empty(0)
    for count in (3, 4, 3, 4, 5, 4):
        assert numbers(like, count).tolist() == list(range(count))
    assert made == [3, 4, 5]
    numbers(like, 3)
    assert made == [3, 4, 5, 3]


def test_what_evaluation_made_serves_training(numbers: Kept) -> None:
    like = torch.empty(0)
    with torch.inference_mode():
        assert not numbers(like, 3).is_inference()


def test_keeps_nothing_that_stands_in_for_a_tensor(numbers: Kept, made: list[int]) -> None:
    plain = torch.empty(0)
    with FakeTensorMode():
        assert type(numbers(torch.empty(0), 3)) is not Tensor
    torch.func.functionalize(lambda x: x + numbers(plain, 3).sum())(torch.ones(1))
    torch.func.grad(lambda x: (x * numbers(plain, 3).sum()).sum())(torch.ones(1))
    assert type(numbers(plain, 3)) is Tensor and numbers(plain, 3).tolist() == [0, 1, 2]
    before = len(made)
    with FakeTensorMode():
        numbers(torch.empty(0), 3)
    assert len(made) == before + 1, "what is kept is not for others"


def test_asks_nothing_of_a_gpu_in_a_graph(numbers: Kept, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A traced graph cannot hold the question whether a CUDA graph is recorded."""
    like = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    asked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.append(True) or True)
    monkeypatch.setattr("hf_efficient_attn.functional.kept.is_plain_tensor", lambda tensor: True)
    for _ in range(2):
        numbers(like, 3)
    assert len(made) == 2 and len(asked) == 2, "recorded graphs have memory of their own"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    numbers(like, 3)
    assert len(asked) == 2
