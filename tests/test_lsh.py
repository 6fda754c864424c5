"""What is LSH attention's own: hashing, the number of buckets, who meets whom, and the dense form."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from case_types import HEAD_DIM, HEADS, Case
from cases import CASES, paddings, qkv
from oracles import angular_buckets, bucket_factors, chunk_pairs
from reformer_cases import hashed
from torch import Tensor
from torch.testing import assert_close
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from hf_efficient_attn.functional import (
    chunk_attention,
    dense_chunk_attention,
    hash_buckets,
    hash_rotations,
    powers_of_two,
    table_sizes,
)


CPU = torch.device("cpu")
FORM = {"chunks_before": 1, "chunks_after": 0, "causal": False, "released": True, "exclude_self": True}
ROWS = [(case, name) for case in CASES if case.name in ("lsh", "local") for name in case.variants]
ROW = pytest.mark.parametrize(("case", "variant"), ROWS, ids=[f"{case.name}: {name}" for case, name in ROWS])
FACTORS = [(2,), (8,), (16,), (4, 4), (2, 4, 2)]


def rotations_of(seed: int = 0, layer: int = 0, redraw: int = 0, **sizes: int) -> Tensor:
    shape = {"heads": 3, "head_dim": 5, "rounds": 2, "directions": 4, **sizes}
    return hash_rotations(seed, layer, redraw, **shape, device=CPU)


def collide(degrees: float, factors: tuple[int, ...]) -> float:
    """How often two vectors at an angle share a bucket: 100 random pairs with 100 hashes each, all independent."""
    first, second = torch.randn(2, 1, 100, 1, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = first / first.norm(dim=-1, keepdim=True)
    second = second - (second * first).sum(dim=-1, keepdim=True) * first
    second = second / second.norm(dim=-1, keepdim=True)
    angle = math.radians(degrees)
    pair = torch.cat([first, math.cos(angle) * first + math.sin(angle) * second], dim=2)
    directions = sum(size // 2 for size in factors)
    rotations = rotations_of(heads=100, head_dim=16, rounds=100, directions=directions)
    buckets = hash_buckets(pair, rotations, torch.tensor([factors]), factors)
    return (buckets[..., 0] == buckets[..., 1]).double().mean().item()


def simulated(degrees: float, factor: int) -> float:
    """The same from the projections' joint law: normal pairs whose correlation is the cosine of the angle."""
    first, other = np.random.default_rng(2).standard_normal((2, 100_000, factor // 2))
    second = math.cos(math.radians(degrees)) * first + math.sin(math.radians(degrees)) * other
    ends = (np.concatenate([x, -x], axis=1).argmax(axis=1) for x in (first, second))
    return np.equal(*ends).mean()


@pytest.mark.parametrize("factor", [2, 4, 16])
def test_vectors_collide_the_rarer_the_wider_their_angle(factor: int) -> None:
    angles = (0, 20, 45, 70, 100, 130, 160, 180)
    found = [collide(angle, (factor,)) for angle in angles]
    assert found[0] == 1 and found[-1] == 0, "the same vector, and the opposite one"
    assert all(wider <= closer for closer, wider in itertools.pairwise(found))
    assert found[1] > found[3] + 0.1
    for angle, measured in zip(angles, found, strict=True):
        right = 1 - angle / 180 if factor == 2 else simulated(angle, factor)
        # Five standard errors of 10,000 hashes, and of the simulation's 100,000.
        assert abs(measured - right) <= 5 * (right * (1 - right) * (1 / 10_000 + 1 / 100_000)) ** 0.5 + 1e-3


def test_factors_are_hashes_of_their_own() -> None:
    """All of them have to collide, and each has directions of its own."""
    for angle in (20, 60, 90):
        right = collide(angle, (4,)) ** 2
        assert abs(collide(angle, (4, 4)) - right) < 0.03
        assert collide(angle, (2, 4, 2)) < collide(angle, (2, 4)) < collide(angle, (2,))


@pytest.mark.parametrize("factors", FACTORS)
def test_buckets_are_those_of_the_reference_and_go_by_direction(factors: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 200, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rotations = rotations_of(directions=sum(size // 2 for size in factors))
    found = hash_buckets(x, rotations, torch.tensor([factors]), factors)
    assert found.shape == (2, 3, 2, 200) and found.dtype == torch.int64
    assert set(found.flatten().tolist()) == set(range(math.prod(factors))), "every bucket is used"
    for row in range(2):
        assert torch.equal(found[row], angular_buckets(x[row], rotations, list(factors), factors))
    lengths = torch.rand(2, 3, 200, 1, generator=torch.Generator().manual_seed(4)).double() * 100 + 0.01
    assert torch.equal(hash_buckets(lengths * x, rotations, torch.tensor([factors]), factors), found)
    assert (hash_buckets(-x, rotations, torch.tensor([factors]), factors) != found).all(), "opposite ends never meet"


def test_examples_have_factors_of_their_own() -> None:
    """Less than the room, down to 1: what the reference finds for each example alone."""
    x = torch.randn(4, 3, 50, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    factors = torch.tensor([[8, 4], [4, 2], [8, 1], [1, 1]])
    rotations = rotations_of(directions=6)
    found = hash_buckets(x, rotations, factors, (8, 4))
    for row in range(4):
        assert torch.equal(found[row], angular_buckets(x[row], rotations, factors[row].tolist(), (8, 4)))
        assert found[row].max() == factors[row].prod() - 1


def test_rotations_depend_on_seed_layer_redraw_and_place_alone() -> None:
    numbers = rotations_of(5, 3, 2)
    assert numbers.dtype == torch.float32 and torch.equal(rotations_of(5, 3, 2), numbers)
    assert torch.equal(rotations_of(5, 3, 2, heads=6, head_dim=9, rounds=8, directions=64)[:3, :5, :2, :4], numbers)
    for other in ((6, 3, 2), (5, 4, 2), (5, 3, 1), (5 + 2**31, 3, 2)):
        assert (rotations_of(*other) != numbers).float().mean() > 0.99


def test_rotations_look_standard_normal_and_independent() -> None:
    shape = {"heads": 4, "head_dim": 32, "rounds": 4, "directions": 32}
    base = rotations_of(**shape)
    count = base.numel()
    moments = [base.mean(), base.square().mean() - 1, base.pow(3).mean(), base.pow(4).mean() - 3]
    # Five standard errors: powers 1 to 4 of a normal number have variance 1, 2, 15 and 96.
    for moment, variance in zip(moments, (1, 2, 15, 96), strict=True):
        assert moment.abs() < 5 * (variance / count) ** 0.5
    sample = base.flatten().sort().values.double()
    steps = torch.arange(1, count + 1) / count
    # Kolmogorov and Smirnov's distance is above 2 / sqrt(n) once in 1,500 draws.
    assert (torch.special.ndtr(sample) - steps).abs().max() < 2 / count**0.5
    others = [rotations_of(1, 0, 0, **shape), rotations_of(0, 1, 0, **shape), rotations_of(0, 0, 1, **shape)]
    for other in others:
        assert (base * other).mean().abs() < 5 / count**0.5
    for dim in range(4):
        first, second = base.narrow(dim, 0, base.shape[dim] // 2), base.narrow(dim, 1, base.shape[dim] // 2)
        assert (first * second).mean().abs() < 5 / first.numel() ** 0.5, f"neighbours along {dim}"


def test_hashing_touches_no_generator() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    hash_buckets(torch.ones(1, 3, 4, 5), rotations_of(), torch.tensor([[8]]), (8,))
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


# Tokens, chunk length, limit, buckets.
BY_HAND = [
    (0, 64, 128, [1, 1]),
    (1, 64, 128, [1, 1]),
    (64, 64, 128, [1, 1]),
    (65, 64, 128, [2, 1]),
    (127, 64, 128, [2, 1]),
    (128, 64, 128, [4, 1]),
    (191, 64, 128, [4, 1]),
    (192, 64, 128, [4, 1]),
    (256, 64, 128, [8, 1]),
    (4096, 64, 128, [128, 1]),
    (8191, 64, 128, [128, 1]),
    (8192, 64, 128, [16, 16]),
    (16384, 64, 128, [16, 32]),
    (65536, 64, 128, [32, 64]),
    (2, 1, 2, [2, 2]),
    (100, 4, 8, [4, 8]),
    (50, 7, 16, [8, 1]),
]


def test_number_of_buckets_by_hand() -> None:
    for tokens, chunk, limit, right in BY_HAND:
        assert powers_of_two(torch.tensor([tokens]), chunk, limit, 2).tolist() == [right], tokens
        assert (bucket_factors(tokens, chunk, limit) + [1])[:2] == right, tokens
        if right[1] == 1:
            assert powers_of_two(torch.tensor([tokens]), chunk, limit, 1).tolist() == [right[:1]], tokens


@pytest.mark.parametrize(("chunk", "longest"), [(64, 4096), (64, 2**16), (50, 5000), (4, 1024), (1, 300)])
def test_number_of_buckets_is_that_of_the_released_code(chunk: int, longest: int) -> None:
    """At multiples of the chunk length, which it needs; batched as alone, and never more than the room."""
    limit = 2 * max(int((longest // chunk) ** 0.5), chunk)
    counts = torch.arange(2 * chunk, longest + 1, chunk)
    batched = powers_of_two(counts, chunk, limit, 2)
    fake = SimpleNamespace(chunk_length=chunk, max_position_embeddings=longest, config=SimpleNamespace())
    for row in range(0, len(counts), max(1, len(counts) // 50)):
        length = int(counts[row])
        assert torch.equal(powers_of_two(counts[row : row + 1], chunk, limit, 2)[0], batched[row])
        LSHSelfAttention._set_num_buckets(fake, length)
        right = fake.num_buckets if isinstance(fake.num_buckets, list) else [fake.num_buckets, 1]
        assert batched[row].tolist() == right
        sizes = table_sizes(length, chunk, limit)
        most = powers_of_two(torch.arange(length + 1), chunk, limit, 2).amax(dim=0).tolist()
        assert list(sizes) == most[: len(sizes)] and most[len(sizes) :] == [1] * (2 - len(sizes))


# Two rounds over tokens 0 to 3 in chunks of two: {0, 2}, {1, 3} and {1, 2}, {0, 3}.
SMALL = torch.tensor([[[[0, 1, 0, 1], [1, 0, 0, 1]]]])
MEETINGS = {
    # Each chunk after the one before it in the ring of all four.
    "released": [[3, 1, 2, 2], [1, 3, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2]],
    "paper": [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]],
}


@pytest.mark.parametrize("rule", MEETINGS)
@pytest.mark.parametrize("exclude_self", [True, False])
def test_a_small_text_by_hand(rule: str, exclude_self: bool) -> None:
    counts = torch.tensor(MEETINGS[rule], dtype=torch.float64)
    options = {**FORM, "released": rule == "released", "chunk_length": 2}
    del options["exclude_self"]
    assert torch.equal(chunk_pairs(SMALL[0], **options)[0], counts)
    counts = counts * (1 - torch.eye(4)) if exclude_self else counts
    right = counts / counts.sum(dim=1, keepdim=True)
    zeros, value = torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[None, None]
    options |= {"exclude_self": exclude_self, "buckets": SMALL}
    assert_close(chunk_attention(zeros, zeros, value, **options)[0, 0], right)
    assert_close(dense_chunk_attention(zeros, zeros, value, **options)[1][0, 0], right)


def test_one_chunk_is_softmax_attention_to_the_others() -> None:
    query, key, value = (x.detach() for x in qkv(2, 12))
    scores = query @ key.transpose(-1, -2) / HEAD_DIM**0.5
    right = scores.masked_fill(torch.eye(12, dtype=torch.bool), -math.inf).softmax(dim=-1) @ value
    for rounds in (1, 3):
        buckets = torch.randint(0, 4, (2, HEADS, rounds, 12), generator=torch.Generator().manual_seed(6))
        ours = chunk_attention(query, key, value, buckets=buckets, chunk_length=12, **FORM)
        assert_close(ours, right, rtol=0, atol=1e-12)
    one = chunk_attention(query[:, :, :1], key[:, :, :1], value[:, :, :1], buckets=None, chunk_length=12, **FORM)
    assert_close(one, value[:, :, :1], rtol=0, atol=1e-12)


CAUSAL = [(case, name) for case, name in ROWS if case.variants[name].causal]


@pytest.mark.parametrize(("case", "variant"), CAUSAL, ids=[f"{case.name}: {name}" for case, name in CAUSAL])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_first_causal_token_has_itself_alone(case: Case, variant: str, dtype: torch.dtype, atol: float) -> None:
    """Even where it meets itself several times: no bits are lost beside the large penalty."""
    for length in (5, 20, 50):
        for keep in paddings(3, length).values():
            inputs = qkv(3, length, dtype)
            found = case.formula(*inputs, keep, None, **case.variants[variant].options)
            first = torch.zeros(3, dtype=torch.long) if keep is None else keep.int().argmax(dim=1)
            for row in range(3):
                assert_close(found[row, :, first[row]], inputs[2][row, :, first[row]], rtol=0, atol=atol)


@pytest.mark.parametrize(("released", "before"), [(True, 0), (False, 0), (False, 1)])
def test_more_rounds_see_more(released: bool, before: int) -> None:
    """Only grows where no chunk follows one of another round, which moves with the number of rounds."""
    query, key, value = (x.detach() for x in qkv(2, 100))
    rotations = rotations_of(heads=HEADS, head_dim=HEAD_DIM, rounds=6, directions=8)
    buckets = hash_buckets(key, rotations, torch.tensor([[16]]), (16,))
    options = {**FORM, "released": released, "chunks_before": before, "chunk_length": 8, "exclude_self": False}
    seen = [
        dense_chunk_attention(query, key, value, buckets=buckets[:, :, :rounds], **options)[1] > 0
        for rounds in range(1, 7)
    ]
    for fewer, more in itertools.pairwise(seen):
        assert (more | ~fewer).all() and more.sum() > 1.02 * fewer.sum()


@pytest.mark.parametrize("released", [True, False])
def test_order_matters_within_a_bucket_alone(released: bool) -> None:
    """Tokens of several buckets shuffled into one another: the results move along."""
    inputs = [x.detach() for x in qkv(1, 60)]
    generator = torch.Generator().manual_seed(7)
    buckets = torch.randint(0, 5, (60,), generator=generator)
    mixed = buckets[torch.randperm(60, generator=generator)]
    # The token that comes to each place: the next one of the bucket that is there now.
    places = torch.zeros(60, dtype=torch.long)
    for bucket in range(5):
        places[mixed == bucket] = (buckets == bucket).nonzero()[:, 0]
    assert torch.equal(buckets[places], mixed) and not torch.equal(places, torch.arange(60))
    options = {**FORM, "released": released, "chunk_length": 8}
    plain = chunk_attention(*inputs, buckets=buckets.expand(1, HEADS, 2, 60), **options)
    moved = chunk_attention(*(x[:, :, places] for x in inputs), buckets=mixed.expand(1, HEADS, 2, 60), **options)
    assert_close(moved, plain[:, :, places], rtol=0, atol=1e-12)


@ROW
@pytest.mark.parametrize("length", [1, 20, 100])
def test_the_dense_form_is_equal(monkeypatch: pytest.MonkeyPatch, case: Case, variant: str, length: int) -> None:
    for keep in paddings(3, length).values():
        inputs, results = qkv(3, length), []
        weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        for form in (chunk_attention, lambda *args, **kwargs: dense_chunk_attention(*args, **kwargs)[0]):
            monkeypatch.setattr("reformer_cases.chunk_attention", form)
            result = case.formula(*inputs, keep, None, **case.variants[variant].options)
            results.append([result, *torch.autograd.grad((result * weight).sum(), inputs)])
        for sparse, dense in zip(*results, strict=True):
            assert_close(sparse, dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_two_factors_by_length_equal_the_oracle(causal: bool) -> None:
    """Long texts have two factors, short ones beside them one, or a single bucket."""
    options = hashed(4, 2, causal=causal, limit=8).options
    keep = torch.ones(4, 120, dtype=torch.bool)
    for row, (left, right) in enumerate(((0, 0), (20, 15), (3, 90), (117, 0))):
        keep[row, :left], keep[row, 120 - right :] = False, False
    assert powers_of_two(keep.sum(dim=1), 4, 8, 2).tolist() == [[4, 8], [4, 8], [8, 1], [1, 1]]
    case = next(case for case in CASES if case.name == "lsh")
    inputs = qkv(4, 120)
    ours, right = (form(*inputs, keep, None, **options) for form in (case.formula, case.oracle))
    assert_close(ours, right, rtol=0, atol=1e-10)
