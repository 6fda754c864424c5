"""Laws of every formula, over the table of mechanisms."""

import pytest
import torch
from cases import CASES, HEAD_DIM, HEADS, LENGTHS, ROW_IDS, ROWS, Case, paddings, qkv
from torch import Tensor

from hf_efficient_attn.functional import dense_execution


ROW = pytest.mark.parametrize(("case", "variant"), ROWS, ids=ROW_IDS)


def with_grads(function: callable, inputs: tuple[Tensor, ...], seen: Tensor | None = None) -> list[Tensor]:
    """The result, and the gradients of a fixed random weighting of its rows that are `seen` `[batch, length]`."""
    result = function(*inputs)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(result.dtype)
    if seen is not None:
        weight = weight * seen[:, None, :, None]
    return [result, *torch.autograd.grad((result * weight).sum(), inputs)]


def formula(case: Case, variant: str, keep: Tensor | None, is_global: Tensor | None, **kwargs: object) -> callable:
    """The case's formula as a function of query, key and value."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with dense_execution(case.variants[variant].dense):
            return case.formula(query, key, value, keep, is_global, **case.variants[variant].options, **kwargs)

    return attend


def is_global_of(case: Case, variant: str, batch: int, length: int, keep: Tensor | None) -> Tensor | None:
    mask = case.variants[variant].is_global(batch, length)
    return mask if mask is None or keep is None else mask & keep


@ROW
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_oracle_forward_and_backward(case: Case, variant: str, length: int) -> None:
    atol = 1e-10 * case.variants[variant].rounding
    for side, keep in paddings(3, length).items():
        inputs = qkv(3, length)
        is_global = is_global_of(case, variant, 3, length, keep)
        options = case.variants[variant].options
        ours = with_grads(formula(case, variant, keep, is_global), inputs)
        right = with_grads(lambda q, k, v: case.oracle(q, k, v, keep, is_global, **options), inputs)  # noqa: B023
        for name, a, b in zip(("result", "query", "key", "value"), ours, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m: f"{side} padding, {name}: {m}")  # noqa: B023


@ROW
@pytest.mark.parametrize("poison", [1e3, float("inf"), float("nan")])
def test_what_stands_in_padding_never_matters(case: Case, variant: str, poison: float) -> None:
    for keep in (mask for mask in paddings(3, 64).values() if mask is not None):
        is_global = is_global_of(case, variant, 3, 64, keep)
        clean = qkv(3, 64)
        hole = ~keep[:, None, :, None]
        noise = torch.randn(3, HEADS, 64, HEAD_DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        dirty = tuple(torch.where(hole, poison * noise, x.detach()).requires_grad_() for x in clean)
        expected = with_grads(formula(case, variant, keep, is_global), clean)
        found = with_grads(formula(case, variant, keep, is_global), dirty)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@ROW
def test_alone_is_batched(case: Case, variant: str) -> None:
    if case.variants[variant].grid is not None:
        pytest.skip("what is left of a grid is another grid; test_grid_window.py has images of different size")
    for keep in (mask for mask in paddings(3, 100).values() if mask is not None):
        is_global = is_global_of(case, variant, 3, 100, keep)
        inputs = qkv(3, 100)
        batched = formula(case, variant, keep, is_global)(*inputs)
        for row in range(3):
            own = keep[row]
            alone_global = None if is_global is None else is_global[row : row + 1, own]
            alone = formula(case, variant, None, alone_global)(*(x[row : row + 1, :, own] for x in inputs))
            torch.testing.assert_close(alone[0], batched[row][:, own], rtol=0, atol=1e-12)
            assert (batched[row][:, ~own] == 0).all(), "rows of padding are 0"


@ROW
@pytest.mark.parametrize("queries", [1, 5, 64, 70])
def test_fewer_queries_are_the_last_ones(case: Case, variant: str, queries: int) -> None:
    """Earlier keys come from a cache, which only a causal form has."""
    query, key, value = qkv(3, 100)
    short = query[:, :, -queries:]
    if not case.variants[variant].causal:
        with pytest.raises(ValueError, match="one shape"):
            formula(case, variant, None, is_global_of(case, variant, 3, 100, None))(short, key, value)
        return
    for side, keep in paddings(3, 100).items():
        is_global = is_global_of(case, variant, 3, 100, keep)
        function, options = formula(case, variant, keep, is_global), case.variants[variant].options
        ours = with_grads(lambda q, k, v: function(q[:, :, -queries:], k, v), (query, key, value))  # noqa: B023
        right = with_grads(
            lambda q, k, v: case.oracle(q, k, v, keep, is_global, **options)[:, :, -queries:],  # noqa: B023
            (query, key, value),
        )
        for a, b in zip(ours, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m: f"{side} padding: {m}")  # noqa: B023


EXACT = [case for case in CASES if case.softmax_options is not None]


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
@pytest.mark.parametrize("length", LENGTHS)
def test_is_softmax_attention_in_the_limit(case: Case, length: int) -> None:
    for keep in paddings(2, length).values():
        inputs = qkv(2, length)
        ours = case.formula(*inputs, keep, None, **case.softmax_options)
        torch.testing.assert_close(ours, CASES[0].oracle(*inputs, keep, None), rtol=0, atol=1e-10)


@ROW
def test_eval_draws_no_random_numbers_and_changes_nothing(case: Case, variant: str) -> None:
    keep = paddings(2, 64)["left"]
    inputs = qkv(2, 64)
    copies = [x.detach().clone() for x in inputs]
    function = formula(case, variant, keep, is_global_of(case, variant, 2, 64, keep))
    state = torch.get_rng_state()
    first, second = function(*inputs), function(*inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@ROW
def test_takes_non_contiguous_input(case: Case, variant: str) -> None:
    keep = paddings(2, 64)["right"]
    inputs = qkv(2, 64)
    function = formula(case, variant, keep, is_global_of(case, variant, 2, 64, keep))
    strided = [x.detach().permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in inputs]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(function(*strided), function(*inputs), rtol=0, atol=1e-12)


@ROW
def test_a_fully_masked_example_gives_zeros(case: Case, variant: str) -> None:
    keep = torch.ones(2, 63, dtype=torch.bool)
    keep[1] = False
    inputs = qkv(2, 63)
    found = with_grads(formula(case, variant, keep, is_global_of(case, variant, 2, 63, keep)), inputs)
    for tensor in found:
        assert tensor.isfinite().all()
        assert (tensor[1] == 0).all()


@ROW
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_keeps_the_dtype_and_its_precision(case: Case, variant: str, dtype: torch.dtype, tolerance: float) -> None:
    keep = paddings(2, 100)["left"]
    is_global = is_global_of(case, variant, 2, 100, keep)
    inputs = qkv(2, 100, dtype)
    ours = formula(case, variant, keep, is_global)(*inputs)
    assert ours.dtype == dtype
    right = case.oracle(*(x.double() for x in inputs), keep, is_global, **case.variants[variant].options)
    # Half precision is computed in fp32, so what fp32 loses inside bounds it, too.
    tolerance = max(tolerance, 1e-5 * case.variants[variant].rounding)
    assert (ours.double() - right).abs().max() <= tolerance * right.abs().max()


@ROW
def test_dropout_drops_without_bias(case: Case, variant: str) -> None:
    """Each copy of an example in a batch is a draw of its own."""
    copies, calls = 50, 10
    keep = paddings(2, 7)["left"]
    inputs = qkv(2, 7)
    is_global = is_global_of(case, variant, 2, 7, keep)
    plain = formula(case, variant, keep, is_global)(*inputs)
    is_global = None if is_global is None else is_global.repeat(copies, 1)
    dropped = formula(case, variant, keep.repeat(copies, 1), is_global, dropout_p=0.3)
    many = [x.repeat(copies, 1, 1, 1) for x in inputs]
    with torch.no_grad():
        torch.manual_seed(0)
        results = [dropped(*many) for _ in range(calls)]
        torch.manual_seed(0)
        assert torch.equal(dropped(*many), results[0]), "one state of torch's generator gives one result"
    assert not torch.equal(results[0], results[1])
    draws = torch.cat(results).unflatten(0, (copies * calls, 2))
    assert not torch.equal(draws[0], draws[1])
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - plain).abs() <= 5 * standard_error + 1e-12).all()


@ROW
@pytest.mark.parametrize("length", [1, 37, 200])
def test_gradients_under_dropout_are_those_of_what_was_computed(case: Case, variant: str, length: int) -> None:
    """A backward pass that computes probabilities again has to drop the same ones: against finite differences."""
    keep = paddings(2, length)["left"]
    function = formula(case, variant, keep, is_global_of(case, variant, 2, length, keep), dropout_p=0.3)
    generator = torch.Generator().manual_seed(6)
    inputs = qkv(2, length)
    weight, *directions = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (inputs[0], *inputs))

    def loss(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return (function(*tensors) * weight).sum()

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    with torch.no_grad():
        for number, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = list(inputs)
                moved[number] = moved[number] + step * direction
                ends.append(loss(*moved))
            torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


@ROW
def test_dropping_everything_gives_zeros(case: Case, variant: str) -> None:
    inputs = qkv(2, 40)
    found = with_grads(formula(case, variant, None, is_global_of(case, variant, 2, 40, None), dropout_p=1.0), inputs)
    assert all((tensor == 0).all() for tensor in found)


@ROW
def test_memory_is_linear_in_length(case: Case, variant: str) -> None:
    """Bytes that autograd keeps and their sizes, at 1,024 and 2,048 tokens; the model tests count every allocation."""
    if case.variants[variant].quadratic:
        pytest.skip("quadratic by definition")

    def saved(length: int) -> list[int]:
        sizes = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        inputs = qkv(1, length, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            formula(case, variant, None, is_global_of(case, variant, 1, length, None), dropout_p=0.1)(*inputs)
        return sizes

    short, long = saved(1024), saved(2048)
    assert sum(long) <= 2.1 * sum(short)
    assert max(long) < 2048**2


@ROW
def test_the_scale_is_that_of_queries_times_keys(case: Case, variant: str) -> None:
    query, key, value = (x.detach() for x in qkv(2, 40))
    function = formula(case, variant, None, is_global_of(case, variant, 2, 40, None), scale=2 * HEAD_DIM**-0.5)
    default = formula(case, variant, None, is_global_of(case, variant, 2, 40, None))
    scaled = default(2**0.5 * query, 2**0.5 * key, value)
    atol = 1e-12 * case.variants[variant].rounding
    torch.testing.assert_close(function(query, key, value), scaled, rtol=0, atol=atol)
    assert not torch.allclose(default(query, key, value), scaled)
