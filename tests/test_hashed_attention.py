"""LSH attention of separate queries and keys against a loop over queries that follows its docstring."""

import math
import sys

import pytest
import torch
from torch import Tensor

from hf_efficient_attn.functional import hashed_attention, softmax_attention


def windows(query_buckets: list[int], key_buckets: list[int], chunk: int, before: int, after: int) -> list[list[int]]:
    """For one head and round: the keys of each token's query, from sorted lists."""
    count = len(query_buckets)
    query_order = sorted(range(count), key=lambda i: (query_buckets[i], i))
    key_order = sorted(range(count), key=lambda i: (key_buckets[i], i))
    size = min((before + 1 + after) * chunk, count)
    found: list[list[int]] = [[] for _ in range(count)]
    for first in range(0, count, chunk):
        middle = min(first + chunk // 2, count - 1)
        bucket = query_buckets[query_order[middle]]
        own = [place for place in range(count) if query_buckets[query_order[place]] == bucket]
        theirs = sum(x == bucket for x in key_buckets)
        place = sum(x < bucket for x in key_buckets) + (middle - own[0]) * theirs // len(own)
        start = min(max(place - (middle - first) - before * chunk, 0), count - size)
        for token in query_order[first : first + chunk]:
            found[token] = key_order[start : start + size]
    return found


def dense(query: Tensor, key: Tensor, value: Tensor, buckets: tuple[Tensor, Tensor], **sizes: int) -> Tensor:
    """Softmax in which a key counts as often as it is met; one example without padding."""
    result = torch.zeros_like(query)
    for head in range(query.shape[0]):
        counts = torch.zeros(query.shape[1], key.shape[1], dtype=query.dtype)
        for number in range(buckets[0].shape[1]):
            met = windows(*(x[head, number].tolist() for x in buckets), **sizes)
            for token, keys in enumerate(met):
                counts[token, keys] += 1
        scores = query[head] @ key[head].T / math.sqrt(query.shape[2]) + counts.log()
        result[head] = scores.softmax(dim=-1) @ value[head]
    return result


def tensors(length: int, rounds: int, buckets: int, batch: int = 2) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(length + rounds)
    qkv = [torch.randn(batch, 2, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    both = (torch.randint(0, buckets, (batch, 2, rounds, length), generator=generator) for _ in range(2))
    return [x.requires_grad_() for x in qkv], tuple(both)


SIZES = [
    {"chunk": 4, "before": 1, "after": 1},
    {"chunk": 5, "before": 0, "after": 0},
    {"chunk": 3, "before": 2, "after": 0},
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("length", "rounds", "buckets"), [(1, 1, 2), (23, 1, 6), (40, 3, 4), (17, 2, 1)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_follows_its_rule_with_padding(
    length: int, rounds: int, buckets: int, side: str, sizes: dict[str, int]
) -> None:
    qkv, both = tensors(length, rounds, buckets)
    padding = 6
    keep = torch.zeros(2, length + padding, dtype=torch.bool)
    real = slice(padding, None) if side == "left" else slice(None, length)
    keep[:, real] = True
    keep[1, length + padding - 1 if side == "right" else 0] = False
    wide = [torch.full((2, 2, length + padding, 8), torch.nan, dtype=torch.float64) for _ in range(3)]
    for x, inner in zip(wide, qkv, strict=True):
        x[:, :, real] = inner.detach()
    wide_buckets = [torch.zeros(2, 2, rounds, length + padding, dtype=torch.long) for _ in range(2)]
    for x, inner in zip(wide_buckets, both, strict=True):
        x[..., real] = inner
    names = {"chunk_length": sizes["chunk"], "chunks_before": sizes["before"], "chunks_after": sizes["after"]}
    ours = hashed_attention(*wide, keep, query_buckets=wide_buckets[0], key_buckets=wide_buckets[1], **names)
    for example in range(2):
        parts = [x[example].detach() for x in qkv]
        right = dense(*parts, tuple(x[example] for x in both), **sizes)
        torch.testing.assert_close(ours[example][:, real], right, rtol=0, atol=1e-12)
    assert (ours.masked_fill(keep[:, None, :, None], 0) == 0).all()


def test_gradients_are_those_of_the_rule() -> None:
    qkv, both = tensors(21, 2, 4, batch=1)
    names = {"chunk_length": 4, "chunks_before": 1, "chunks_after": 0}
    ours = hashed_attention(*qkv, query_buckets=both[0], key_buckets=both[1], **names)
    right = dense(*(x[0] for x in qkv), tuple(x[0] for x in both), chunk=4, before=1, after=0)
    for a, b in zip(
        torch.autograd.grad(ours.sin().sum(), qkv), torch.autograd.grad(right.sin().sum(), qkv), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_window_is_softmax_and_pieces_do_not_matter(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, both = tensors(50, rounds, 8)
    names = {"query_buckets": both[0], "key_buckets": both[1], "chunks_before": 1, "chunks_after": 1}
    whole = hashed_attention(*qkv, chunk_length=50, **names)
    torch.testing.assert_close(whole, softmax_attention(*qkv), rtol=0, atol=1e-12)
    right = hashed_attention(*qkv, chunk_length=4, **names)
    monkeypatch.setattr(sys.modules[hashed_attention.__module__], "_SEGMENT", 8)
    torch.testing.assert_close(hashed_attention(*qkv, chunk_length=4, **names), right, rtol=0, atol=1e-12)


def test_hashing_finds_what_is_near() -> None:
    """Clusters in shuffled order: with the right buckets the window holds the query's own cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = 6 * torch.nn.functional.normalize(torch.randn(8, 16, generator=generator), dim=-1)
    kind = torch.randint(0, 8, (256,), generator=generator)
    key = centres[kind][None, None]
    other = torch.randint(0, 8, (256,), generator=generator)
    query, value = centres[other][None, None], torch.randn(1, 1, 256, 16, generator=generator)
    names = {"chunk_length": 16, "chunks_before": 1, "chunks_after": 1}
    both = {"query_buckets": other[None, None, None], "key_buckets": kind[None, None, None]}
    full = softmax_attention(query, key, value)
    near = hashed_attention(query, key, value, **both, **names)
    nowhere = {name: torch.zeros(1, 1, 1, 256, dtype=torch.long) for name in both}
    far = hashed_attention(query, key, value, **nowhere, **names)
    assert (near - full).abs().mean() < 0.3 * (far - full).abs().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_length": 0}, "chunk_length = 0"),
        ({"chunks_before": -1}, "chunks_before = -1"),
        ({"key_buckets": torch.zeros(2, 2, 1, 9, dtype=torch.long)}, "key_buckets must be"),
    ],
)
def test_what_does_not_fit_raises(change: dict[str, object], message: str) -> None:
    qkv, both = tensors(10, 1, 2)
    names = {"query_buckets": both[0], "key_buckets": both[1]}
    names |= {"chunk_length": 4, "chunks_before": 1, "chunks_after": 1}
    with pytest.raises(ValueError, match=message):
        hashed_attention(*qkv, **{**names, **change})
