"""What is true of Nyström attention alone."""

from collections.abc import Callable

import pytest
import torch
from cases import HEAD_DIM, HEADS, paddings, qkv
from torch import Tensor
from torch.testing import assert_close

from hf_efficient_attn.cpu import Scratch, draw_replay
from hf_efficient_attn.functional import dense_nystrom_attention, dropout_cpu, nystrom_attention, softmax_attention
from hf_efficient_attn.functional.nystrom import iterative_pinv, segment_landmarks


def options(landmarks: int, iterations: int | None = 6, per_matrix: bool = True) -> dict[str, object]:
    return {"num_landmarks": landmarks, "pinv_iterations": iterations, "scale_per_matrix": per_matrix}


def squares(batch: int = 3, size: int = 8, spread: float = 2.0) -> Tensor:
    """Random matrices whose rows are probabilities; the example with more spread is easier to invert."""
    scores = torch.randn(batch, HEADS, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (spread * torch.arange(1, batch + 1)[:, None, None, None] * scores).softmax(dim=-1)


def constant_in_segments(keep: Tensor | None, batch: int, length: int, landmarks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that are one random vector a segment; values differ from token to token."""
    like = torch.empty(batch, 1, length, 1, dtype=torch.float64)
    member = segment_landmarks(like, keep, landmarks).average > 0
    generator = torch.Generator().manual_seed(2)
    query, key = (
        2 * torch.randn(1, HEADS, landmarks, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    spread = member.double().transpose(1, 2)[:, None].expand(batch, 1, -1, -1)
    return spread @ query, spread @ key, qkv(batch, length)[2].detach()


@pytest.mark.parametrize("landmarks", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [24, 61, 100])
def test_tokens_constant_in_segments_get_softmax_attention(landmarks: int, length: int) -> None:
    """Also where segments are not equally long."""
    for side, keep in paddings(3, length).items():
        inputs = constant_in_segments(keep, 3, length, landmarks)
        right = softmax_attention(*inputs, keep)
        for iterations in (None, 40):
            ours = nystrom_attention(*inputs, keep, **options(landmarks, iterations))
            assert_close(ours, right, rtol=0, atol=1e-8, msg=lambda m: f"{side} padding: {m}")  # noqa: B023


def test_rows_of_weights_sum_to_one_once_the_inverse_has_converged() -> None:
    query, key, value = qkv(2, 60)
    rough, fine, exact = (
        dense_nystrom_attention(query, key, value, **options(4, n))[1].sum(dim=-1) for n in (3, 40, None)
    )
    assert_close(exact, torch.ones_like(exact), rtol=0, atol=1e-9)
    assert_close(fine, exact, rtol=0, atol=1e-9)
    assert (rough - 1).abs().max() > 1e-3, "three iterations are an approximation, or this shows nothing"


def test_more_iterations_come_closer_to_the_inverse() -> None:
    matrices = squares()
    right = torch.linalg.inv(matrices)
    errors = [(iterative_pinv(matrices, n) - right).abs().amax() for n in (4, 8, 12, 30)]
    assert all(a > b for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 1e-8


@pytest.mark.parametrize("per_matrix", [True, False])
def test_batch_mates_do_not_change_an_inverse(per_matrix: bool) -> None:
    matrices = squares()
    together = iterative_pinv(matrices, 6, per_matrix)
    for row in range(3):
        alone = iterative_pinv(matrices[row : row + 1], 6, per_matrix)
        assert_close(together[row : row + 1], alone, rtol=0, atol=1e-12)


def test_heads_share_a_scale_only_if_told_to() -> None:
    matrices = squares()
    alone = torch.cat([iterative_pinv(matrices[:, h : h + 1], 3) for h in range(HEADS)], dim=1)
    assert_close(iterative_pinv(matrices, 3), alone, rtol=0, atol=1e-12)
    shared = iterative_pinv(matrices, 3, scale_per_matrix=False)
    assert (shared - alone).abs().max() > 1e-3
    # The head with the largest column sum is the one that sets the scale.
    first = matrices.sum(dim=-2).amax(dim=-1).argmax(dim=1)
    rows = torch.arange(3)
    assert_close(shared[rows, first], alone[rows, first], rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [6, None])
def test_short_examples_are_softmax_attention_beside_long_ones(iterations: int | None) -> None:
    """Chosen example by example; the form that is not chosen gives no gradient, and no NaN that something hides."""
    keep = torch.zeros(5, 50, dtype=torch.bool)
    for row, count in enumerate([50, 9, 8, 1, 0]):
        keep[row, :count] = True
    inputs = qkv(5, 50)
    ours = nystrom_attention(*inputs, keep, **options(8, iterations))
    right = softmax_attention(*inputs, keep)
    assert_close(ours[2:], right[2:], rtol=0, atol=1e-12)
    assert (ours[:2] - right[:2]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    with torch.autograd.set_detect_anomaly(True):
        mine, theirs = (torch.autograd.grad(x[2:].square().sum(), inputs) for x in (ours, right))
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        assert_close(a, b, rtol=0, atol=1e-12)


def test_segments_are_of_equal_size_but_for_one_token() -> None:
    for count in (8, 9, 50, 63):
        keep = torch.zeros(1, 64, dtype=torch.bool)
        keep[0, 64 - count :] = True
        landmarks = segment_landmarks(torch.empty(1, 1, 64, 1), keep, 8)
        sizes = (landmarks.average[0] > 0).sum(dim=1)
        assert sizes.sum() == count and sizes.max() - sizes.min() <= 1
        assert_close(landmarks.average.sum(dim=2), torch.ones(1, 8))
        segment = (landmarks.average[0] > 0).int().argmax(dim=0)[64 - count :]
        assert (segment.diff() >= 0).all(), "segments follow each other"


@pytest.mark.parametrize("name", ["num_landmarks", "pinv_iterations"])
def test_wrong_options_are_refused(name: str) -> None:
    for function in (nystrom_attention, dense_nystrom_attention):
        with pytest.raises(ValueError, match=f"{name} = 0: give 1 or more"):
            function(*qkv(1, 5), **{**options(2), name: 0})


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("length", [5, 8, 9, 40])
def test_segments_given_are_as_none(length: int, side: str) -> None:
    inputs, keep = qkv(3, length), paddings(3, length)[side]
    segments = segment_landmarks(inputs[0], keep, 8)
    assert torch.equal(
        nystrom_attention(*inputs, keep, segments=segments, **options(8)),
        nystrom_attention(*inputs, keep, **options(8)),
    )


# Batch (None: without a mask), length and landmarks of the segments, whether the call has a mask -> what differs.
WRONG_SEGMENTS: dict[str, tuple[int | None, int, int, bool, str]] = {
    "length": (3, 41, 8, True, "length = 41, but this call has length = 40"),
    "landmarks": (3, 40, 4, True, "num_landmarks = 4, but this call has num_landmarks = 8"),
    "batch": (2, 40, 8, True, "own = 2, but this call has examples with padding of their own = 3"),
    "mask": (3, 40, 8, False, "own = 3, but this call has examples with padding of their own = 1"),
    "no mask": (None, 40, 8, True, "own = 1, but this call has examples with padding of their own = 3"),
}


@pytest.mark.parametrize("name", WRONG_SEGMENTS)
def test_segments_of_other_inputs_are_refused(name: str) -> None:
    batch, length, landmarks, padded, message = WRONG_SEGMENTS[name]
    mask = None if batch is None else torch.ones(batch, length, dtype=torch.bool)
    segments = segment_landmarks(torch.empty(batch or 3, 1, length, 1), mask, landmarks)
    keep = torch.ones(3, 40, dtype=torch.bool) if padded else None
    with pytest.raises(ValueError, match=message):
        nystrom_attention(*qkv(3, 40), keep, segments=segments, **options(8))


def test_segments_of_a_whole_text_are_none_of_a_padded_one() -> None:
    """Also where there is one, so that their shape is that of any."""
    inputs, keep = qkv(1, 40), torch.arange(40)[None] < 30
    segments = segment_landmarks(inputs[0], None, 8)
    with pytest.raises(ValueError, match="padding = False, but this call has padding = True"):
        nystrom_attention(*inputs, keep, segments=segments, **options(8))


@pytest.mark.parametrize("function", [nystrom_attention, lambda *x, **kwargs: dense_nystrom_attention(*x, **kwargs)[0]])
def test_autocast_does_not_reach_the_inverse(function: Callable[..., Tensor]) -> None:
    inputs = [x.detach() for x in qkv(2, 60, torch.float32)]
    plain = function(*inputs, **options(8, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(function(*inputs, **options(8, 12)), plain, rtol=0, atol=0)
    shape = function(*(x.to("meta") for x in inputs), **options(8)).shape
    assert shape == plain.shape, "a device without autocast"


def kept_entries(few: bool, query: Tensor, key: Tensor, dropout_p: float) -> Tensor:
    """What dropout keeps over the share it keeps, `[batch, heads, queries, length]`, drawn in the kernel's order."""
    replay = draw_replay(dropout_p)
    kept, draws = query.new_empty(*query.shape[:3], key.shape[2]), replay.generator()
    for where in dropout_cpu._chunks(query, key) if few else dropout_cpu.parts_of_heads(query, key):
        at = (where[0], slice(None), slice(None), where[1]) if few else where
        kept[at] = replay.kept(kept[at], Scratch(), draws)
    assert key.shape[2] < 1000 or abs(kept.mean() - replay.keep_share) < 0.01
    return kept / replay.keep_share


def masked_biases(count: int) -> dict[str, Tensor | None]:
    """No bias, one that all examples share, one where the first example has no key, one with half or no keys at all."""
    lowest = torch.finfo(torch.float64).min
    shared, own = (torch.zeros(n, 1, 1, count, dtype=torch.float64) for n in (1, 3))
    shared[..., : count // 2] = lowest
    own[1, ..., count // 2 :], own[2] = lowest, lowest
    infinite = torch.where(shared < 0, -torch.inf, 0.0)
    # Other keys for each query, or besides for each head.
    generator = torch.Generator().manual_seed(4)
    queries, heads = (torch.randn(n, h, 7, count, generator=generator) for n, h in ((3, 1), (1, HEADS)))
    pairs = {"queries": queries.double().masked_fill(queries > 0, lowest), "heads": heads.double()}
    return {"none": None, "shared": shared, "own": own, "infinite": infinite, **pairs}


@pytest.mark.parametrize("few", [False, True], ids=["heads", "chunks"])
@pytest.mark.parametrize("bias", ["none", "shared", "own", "infinite", "queries", "heads"])
@pytest.mark.parametrize(("count", "keys"), [(5, 1), (300, 1), (300, 17), (3000, 700), (300, 10**6)])
def test_dropout_on_a_cpu_is_that_of_the_plain_form(
    count: int, keys: int, bias: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and gradients, with the entries that were dropped: some heads at a time, or some keys of all heads.

    Where an example has no key both are the mean of the values. Merged heads are split as a model splits them.
    """
    threads = torch.get_num_threads()
    monkeypatch.setattr(dropout_cpu, "CHUNK_BYTES", 8 * HEADS * 7 * keys // threads + threads if few else keys)
    monkeypatch.setattr(dropout_cpu, "_FEW_QUERIES", 7 if few else 6)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(3, n, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for n in (7, count, count)
    )
    added = masked_biases(count)[bias]
    few = few and keys < count
    torch.manual_seed(0)
    kept = kept_entries(few, query, key, 0.25)
    torch.manual_seed(0)
    ours = dropout_cpu.cpu_dropout_attention(query, key, value, added, 0.25)
    assert (type(ours.grad_fn).__name__ == "_ChunkedDropoutAttentionBackward") is few
    scores = query @ key.transpose(-1, -2)
    right = ((scores if added is None else scores + added).softmax(dim=-1) * kept) @ value
    assert_close(ours, right, rtol=0, atol=1e-12)
    weight = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    found, expected = (torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (ours, right))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)
    assert found[1].stride() == key.stride() and found[2].stride() == value.stride(), "as a model reads them"


def test_dropout_in_chunks_agrees_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_cpu, "_keys_at_once", lambda query: 4)
    inputs = [x.detach()[:, :, :n].requires_grad_() for x, n in zip(qkv(2, 11), (3, 11, 11), strict=True)]
    bias = torch.zeros(2, 1, 1, 11, dtype=torch.float64)
    bias[1, ..., :5] = torch.finfo(torch.float64).min

    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(0)
        return dropout_cpu.cpu_dropout_attention(*tensors, bias, 0.3)

    assert torch.autograd.gradcheck(attend, inputs)


def test_chunks_keep_large_scores_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, where the logarithm of a sum would vanish beside the largest score."""
    query, key, value = (x.detach()[:, :, :n] for x, n in zip(qkv(1, 64), (2, 64, 64), strict=True))
    key = key[:, :, :1] * 1e7 + torch.zeros_like(key)
    right = value.mean(dim=2, keepdim=True).expand(-1, -1, 2, -1)
    monkeypatch.setattr(dropout_cpu, "_keys_at_once", lambda query: 5)
    inputs = [x.float().requires_grad_() for x in (query, key, value)]
    ours = dropout_cpu.cpu_dropout_attention(*inputs, None, 1e-9)
    assert_close(ours, right.float())
    (grad,) = torch.autograd.grad(ours.sum(), inputs[2])
    assert_close(grad, torch.full_like(grad, 2 / 64))


def test_an_exact_inverse_is_exact_in_single_precision() -> None:
    """Of an ill-conditioned matrix: what float32 would lose, float64 inside keeps."""
    inputs = [0.3 * x.detach() for x in qkv(2, 100, torch.float32)]
    found = nystrom_attention(*inputs, **options(20, None))
    assert_close(found, nystrom_attention(*(x.double() for x in inputs), **options(20, None)).float())
    assert found.dtype == torch.float32


@pytest.mark.parametrize("few", [False, True])
def test_backward_inside_autocast_is_exact(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout_cpu, "_keys_at_once", lambda query: 7 if few else 10**6)

    def gradients(inside: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        inputs = [x.detach().requires_grad_() for x in qkv(1, 60, torch.float32)]
        result = dropout_cpu.cpu_dropout_attention(*inputs, None, 0.25).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return torch.autograd.grad(result, inputs)

    assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_padding_gets_nothing_under_dropout_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for graphs and other devices, with a dropout that drops nothing."""
    inputs, keep = [x.detach() for x in qkv(3, 60)], paddings(3, 60)["left"]
    expected = nystrom_attention(*inputs, keep, **options(8))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        found = nystrom_attention(*inputs, keep, dropout_p=1e-12, **options(8))
    assert_close(found, expected, rtol=0, atol=1e-9)
