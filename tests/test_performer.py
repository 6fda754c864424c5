"""What FAVOR+ promises beyond the laws: an unbiased estimate, an error that falls, stability, and no look ahead."""

import pytest
import torch
from cases import HEAD_DIM, HEADS, ROWS, Case, paddings, qkv
from oracles import performer_weights, softmax
from test_formulas import formula, with_grads
from torch import Tensor

from hf_efficient_attn.attention.performer import draw_projection
from hf_efficient_attn.functional import (
    PerformerState,
    dense_performer_attention,
    favor_causal,
    favor_cpu,
    orthogonal_features,
    performer_attention,
    performer_step,
)


PERFORMER_ROWS = [(case, name) for case, name in ROWS if case.name == "performer"]
ROW = pytest.mark.parametrize(("case", "variant"), PERFORMER_ROWS, ids=[name for _, name in PERFORMER_ROWS])
KERNEL = pytest.mark.parametrize("kernel", ["softmax", "relu"])
DRAWS = 4000


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def project(features: int, head_dim: int = HEAD_DIM, seed: int = 0) -> Tensor:
    return draw_projection(features, head_dim, orthogonal=True, seed=seed, layer=0, redraw=0)


def estimates(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """The estimate of `exp(x y)` from each draw of `rows` `[draws, features, d]`."""
    norms = (x.square().sum() + y.square().sum()) / 2
    return torch.exp(rows @ (x + y) - norms).mean(dim=1)


def short_pair(d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two vectors whose sum has norm 1: beyond, averages of thousands of draws still look wrong."""
    x, y = randn(2, d, seed=seed)
    return (pair := torch.stack([x, y]) / (x + y).norm())[0], pair[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d", [4, 16])
def test_the_estimate_is_unbiased(d: int, seed: int) -> None:
    x, y = short_pair(d, seed)
    rows = orthogonal_features(randn(DRAWS, d, d, seed=10 + seed), randn(DRAWS * d, d, seed=20 + seed))
    found = estimates(x, y, rows.view(DRAWS, d, d))
    error = found.std() / DRAWS**0.5
    assert (found.mean() - torch.exp(x @ y)).abs() <= 4 * error


def test_without_the_signs_it_would_be_biased() -> None:
    """What `orthogonal_features` mends: rows of a library's QR are no Haar-distributed matrix."""
    d, draws = 16, 20 * DRAWS
    shift = torch.ones(d, dtype=torch.float64) / d**0.5
    raw = torch.linalg.qr(randn(draws, d, d))[0] * randn(draws, d, d, seed=1).norm(dim=2, keepdim=True)
    right = orthogonal_features(randn(draws, d, d), randn(draws * d, d, seed=1)).view(draws, d, d)
    deviations = []
    for rows in (raw, right):
        found = estimates(shift, torch.zeros_like(shift), rows)
        deviations.append(((found.mean() - 1).abs() / (found.std() / draws**0.5)).item())
    assert deviations[0] > 8 and deviations[1] <= 4, deviations


def test_features_are_orthogonal_in_blocks_with_the_norms_of_gaussian_vectors() -> None:
    d = 8
    rows = orthogonal_features(randn(4, d, d).float(), randn(29, d, seed=1))
    assert rows.shape == (29, d) and rows.dtype == torch.float64
    for start in range(0, 29, d):
        block = rows[start : start + d]
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-9
    torch.testing.assert_close(rows.norm(dim=1), randn(29, d, seed=1).norm(dim=1))
    with pytest.raises(ValueError, match="4 blocks of 8 rows are too few for 33 features; draw 5"):
        orthogonal_features(randn(4, d, d), randn(33, d))


def slope(counts: list[int], errors: list[float]) -> float:
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_the_error_falls_as_one_over_the_root_of_the_features() -> None:
    """Of the kernel, and of attention against softmax attention."""
    d, counts = 16, [32, 64, 128, 256, 512, 1024, 2048]
    x, y = short_pair(d, 5)
    # Norms of 1 after scaling: with large ones the error has a heavy tail, and few draws say little.
    query, key, value = (size * randn(1, 2, 32, d, seed=seed) for size, seed in ((0.5, 1), (0.5, 2), (1.0, 3)))
    right = softmax(query, key, value)
    kernel_errors, errors = [], []
    for count in counts:
        draws = [project(count, d, seed) for seed in range(64)]
        found = estimates(x, y, torch.stack(draws)) / torch.exp(x @ y)
        kernel_errors.append((found - 1).square().mean().sqrt().item())
        outputs = torch.stack([performer_attention(query, key, value, projection=draw) for draw in draws[:16]])
        errors.append((outputs - right).square().mean().sqrt().item())
    assert abs(slope(counts, kernel_errors) + 0.5) <= 0.1, kernel_errors
    assert abs(slope(counts, errors) + 0.5) <= 0.1, errors


@KERNEL
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_positive_and_leave_constants_alone(kernel: str, causal: bool) -> None:
    query, key, value = (x.detach() for x in qkv(2, 100))
    options = {"projection": project(20), "kernel": kernel, "causal": causal}
    ones = performer_attention(query, key, torch.ones_like(value), **options)
    torch.testing.assert_close(ones, torch.ones_like(value), rtol=0, atol=1e-12)
    mixed, weights = dense_performer_attention(query, key, value, **options)
    allowed = torch.ones(100, 100, dtype=torch.bool).tril() if causal else torch.ones(100, 100, dtype=torch.bool)
    assert (weights[..., allowed] > 0).all() and (weights[..., ~allowed] == 0).all()
    right = performer_weights(query, key, allowed, projection=options["projection"], kernel=kernel)
    torch.testing.assert_close(weights, right, rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed, performer_attention(query, key, value, **options), rtol=0, atol=1e-12)


def test_scale() -> None:
    query, key, value = (x.detach() for x in qkv(2, 50))
    projection = project(20)
    ours = performer_attention(2 * query, key / 2, value, projection=projection, scale=0.3)
    causal = performer_attention(query, key, value, projection=projection, scale=0.3, causal=True)
    assert ours.isfinite().all() and causal.isfinite().all()
    for scale, is_causal in ((0.3, False), (1.0, True)):
        allowed = torch.ones(50, 50, dtype=torch.bool)
        allowed = allowed.tril() if is_causal else allowed
        weights = performer_weights(query, key, allowed, projection=projection, kernel="softmax", scale=scale)
        ours = performer_attention(query, key, value, projection=projection, scale=scale, causal=is_causal)
        torch.testing.assert_close(ours, weights @ value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("form", ["cpu", "plain", "causal"])
@pytest.mark.parametrize("size", [0.01, 1.0, 3.0, 8.0])
def test_any_norm_is_stable(size: float, form: str) -> None:
    """fp32 against float64, for queries and keys of head dim 64 with entries of size 8: logits of hundreds."""
    inputs = [size * randn(1, 2, 500, 64, seed=1), size * randn(1, 2, 500, 64, seed=2), randn(1, 2, 500, 64, seed=3)]
    inputs[1][:, :, 0] *= 5.0  # a huge key before all others
    inputs = [torch.cat([x, x]) for x in inputs]
    inputs[1][1] *= 4.0  # a batch mate that is all huge
    # A projection that wants gradients takes the plain form on a CPU, too.
    options = {"projection": project(256, 64).requires_grad_(form == "plain"), "causal": form == "causal"}
    right = performer_attention(*inputs, **options).detach()[:1]
    ours = performer_attention(*(x.float() for x in inputs), **options).detach()
    assert ours.isfinite().all()
    assert (ours[:1] - right).abs().max() <= 1e-3
    assert (right.norm(dim=-1) > 0).all()


def test_an_epsilon_would_bring_an_error() -> None:
    """There is none here; adding 1e-4 to features below 1, as common code does, moves results more than rounding."""
    query, key, value = (randn(1, 1, 500, 64, seed=seed) for seed in (1, 2, 3))
    projection = project(256, 64)
    right = performer_weights(query, key, torch.ones(500, 500).bool(), projection=projection, kernel="softmax") @ value
    ours = performer_attention(*(x.float() for x in (query, key, value)), projection=projection)
    logits = [(64**-0.25) * x @ projection.T - x.square().sum(dim=-1, keepdim=True) / 16 for x in (query, key)]
    tops = (logits[0].amax(dim=-1, keepdim=True), logits[1].amax(dim=(-1, -2), keepdim=True))
    features = [(x - top).exp() + 1e-4 for x, top in zip(logits, tops, strict=True)]
    weights = features[0] @ features[1].mT
    biased = weights / weights.sum(dim=-1, keepdim=True) @ value
    error = ((ours - right).abs().max() / right.abs().max()).item()
    assert error < 2e-5
    assert (biased - right).abs().max() / right.abs().max() > 50 * error


EDITS = {
    "another": lambda key, projection: randn(HEAD_DIM, seed=9),
    "along a feature": lambda key, projection: projection[3] * HEAD_DIM**0.25,
    "large": lambda key, projection: 30 * key,
    "large along a feature": lambda key, projection: 100 * projection[3],
    "nothing": lambda key, projection: torch.zeros_like(key),
}


@KERNEL
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("size", [1.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_before_an_edited_key_moves(kernel: str, edit: str, size: float, dtype: torch.dtype) -> None:
    """Not by a bit; also where all other keys are large, beside which the edited one outweighs them by far."""
    query, key, value = (x.detach().to(dtype) for x in qkv(1, 300))
    key *= size
    projection = project(20)
    options = {"projection": projection, "kernel": kernel, "causal": True}
    right = performer_attention(query, key, value, **options)
    assert right.isfinite().all()
    for place in (0, 5, 63, 64, 150, 299):
        edited, others = key.clone(), value.clone()
        edited[0, 0, place] = EDITS[edit](key[0, 0, place], projection.to(dtype)).to(dtype)
        others[0, 0, place] *= -100
        ours = performer_attention(query, edited, others, **options)
        assert torch.equal(ours[:, :, :place], right[:, :, :place])
        assert torch.equal(ours[:, 1:], right[:, 1:]), "nor does another head"
        if "large" not in edit or kernel == "relu":  # a key of no weight changes nothing
            assert not torch.equal(ours[0, 0, place:], right[0, 0, place:])


@pytest.mark.parametrize("causal", [False, True])
def test_long_inputs_keep_their_precision(causal: bool) -> None:
    """16,384 tokens: fp32 against float64, and the last key moves no row but the last."""
    length = 16384
    query, key, value = (randn(1, 1, length, 16, seed=seed) for seed in (1, 2, 3))
    options = {"projection": project(32, 16), "causal": causal}
    right = performer_attention(query, key, value, **options)
    single = [x.float() for x in (query, key, value)]
    ours = performer_attention(*single, **options)
    assert (ours - right).abs().max() <= 1e-3
    if causal:
        single[1] = single[1].clone()
        single[1][:, :, -1] = 2 * options["projection"][7]
        moved = performer_attention(*single, **options)
        assert torch.equal(moved[:, :, :-1], ours[:, :, :-1])


@KERNEL
@pytest.mark.parametrize("sizes", [[1] * 40, [2, 1, 13, 24], [39, 1], [1, 39]], ids=str)
def test_step_by_step_is_all_at_once(kernel: str, sizes: list[int]) -> None:
    query, key, value = (x.detach() for x in qkv(3, 40))
    options = {"projection": project(20), "kernel": kernel}
    for keep in paddings(3, 40).values():
        right = performer_attention(query, key, value, keep, causal=True, **options)
        state, parts, start = None, [], 0
        for size in sizes:
            part = slice(start, start + size)
            rows = (x[:, :, part] for x in (query, key, value))
            own = None if keep is None else keep[:, part]
            before = state
            mixed, state = performer_step(*rows, own, state=state, **options)
            assert isinstance(state, PerformerState)
            assert [x.shape for x in state] == [(3, HEADS, 20, HEAD_DIM + 1), (3, HEADS)]
            rows = (x[:, :, part] for x in (query, key, value))
            dense, _ = dense_performer_attention(*rows, own, causal=True, state=before, **options)
            torch.testing.assert_close(dense, mixed, rtol=0, atol=1e-11)
            parts.append(mixed)
            start += size
        torch.testing.assert_close(torch.cat(parts, dim=2), right, rtol=0, atol=1e-11)


def test_gradients_flow_through_the_state() -> None:
    inputs, projection = qkv(2, 40), project(20)

    def in_two(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first, state = performer_step(*(x[:, :, :17] for x in (query, key, value)), projection=projection)
        rest, _ = performer_step(*(x[:, :, 17:] for x in (query, key, value)), projection=projection, state=state)
        return torch.cat([first, rest], dim=2)

    whole = with_grads(lambda q, k, v: performer_attention(q, k, v, projection=projection, causal=True), inputs)
    for a, b in zip(with_grads(in_two, inputs), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@ROW
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("size", [1, 3, 64])
def test_pieces_of_any_size(case: Case, variant: str, side: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, segments and parts of the CPU's path: always the oracle."""
    monkeypatch.setattr(favor_causal, "_CHUNK", size)
    monkeypatch.setattr(favor_causal, "_SEGMENT", 40)
    monkeypatch.setattr(favor_cpu, "CHUNK_BYTES", size * 20 * 8 // torch.get_num_threads())
    keep = paddings(3, 90)[side]
    inputs, options = qkv(3, 90), case.variants[variant].options
    right = with_grads(lambda q, k, v: case.oracle(q, k, v, keep, None, **options), inputs)
    for a, b in zip(with_grads(formula(case, variant, keep, None), inputs), right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@ROW
def test_the_form_of_other_devices_is_the_same(case: Case, variant: str) -> None:
    """It also has gradients for the projection."""
    options = dict(case.variants[variant].options)
    for keep in paddings(3, 90).values():
        inputs, projection = qkv(3, 90), options["projection"].clone().requires_grad_()
        options["projection"] = projection
        found = []
        for function in (case.formula, case.oracle):
            result = function(*inputs, keep, None, **options)
            found.append([result, *torch.autograd.grad(result.sin().sum(), (*inputs, projection))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@KERNEL
@pytest.mark.parametrize("causal", [False, True])
def test_autocast_computes_features_in_single_precision(kernel: str, causal: bool) -> None:
    inputs = [x.detach() for x in qkv(2, 60, torch.float32)]
    options = {"projection": project(20).float(), "kernel": kernel, "causal": causal}
    right = performer_attention(*inputs, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(performer_attention(*inputs, **options), right)
        dense, _ = dense_performer_attention(*inputs, **options)
        torch.testing.assert_close(dense, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_drops_whole_keys(causal: bool) -> None:
    """The same for all queries, from the numerator only; every form drops the same ones."""
    query, key, value = (x.detach() for x in qkv(1, 40))
    options = {"projection": project(20), "causal": causal, "dropout_p": 0.4}
    identity = torch.eye(40, dtype=torch.float64)[:, :HEAD_DIM].expand(1, HEADS, 40, HEAD_DIM)
    torch.manual_seed(0)
    found = performer_attention(query, key, identity, **options)
    weights = dense_performer_attention(query, key, value, projection=options["projection"], causal=causal)[1]
    factor = found / weights[..., :HEAD_DIM].clamp(min=1e-300)
    for column in range(HEAD_DIM):
        for head in range(HEADS):
            seen = factor[0, head, column:, column] if causal else factor[0, head, :, column]
            torch.testing.assert_close(seen, seen[:1].expand_as(seen), rtol=1e-9, atol=0)
            assert min(abs(seen[0]), abs(seen[0] - 1 / 0.6)) < 1e-9
    torch.manual_seed(0)
    torch.testing.assert_close(dense_performer_attention(query, key, identity, **options)[0], found, rtol=0, atol=1e-12)
    pairs = [torch.cat([x, x]) for x in (query, key, identity)]
    dropped = (performer_attention(*pairs, **options) == 0).all(dim=2).flatten(0, 1)
    assert len({tuple(x.tolist()) for x in dropped}) > 1 + HEADS, "each head of each example drops its own"


def test_wrong_arguments_are_named() -> None:
    inputs = [x.detach() for x in qkv(1, 5)]
    refused = {
        "kernel = 'gelu': choose one of softmax, relu": {"kernel": "gelu", "projection": project(4)},
        r"projection must be .*\[any, 8\], got \[4, 7\].*orthogonal_features": {"projection": torch.zeros(4, 7)},
        "scale = -1.0.*positive": {"scale": -1.0, "projection": project(4)},
    }
    for message, options in refused.items():
        for function in (performer_attention, performer_step, dense_performer_attention):
            with pytest.raises(ValueError, match=message):
                function(*inputs, **options)
