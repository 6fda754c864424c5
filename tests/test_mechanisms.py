"""Laws of every attention module, over the table of mechanisms: weights and backends, on top of the formula's laws."""

from types import SimpleNamespace

import pytest
import torch
from cases import CASES, HEAD_DIM, HEADS, LENGTHS, ROW_IDS, ROWS, Case, paddings, slots
from oracles import masked_attention, project
from torch import Tensor

from hf_efficient_attn.attention import ATTENTIONS, SelfAttention
from hf_efficient_attn.functional import dense_execution, projected_attention


WIDTH = HEADS * HEAD_DIM
ROW = pytest.mark.parametrize(("case", "variant"), ROWS, ids=ROW_IDS)
BACKEND = pytest.mark.parametrize("backend", ["eager", "sdpa"])


def build(case: Case, variant: str, backend: str = "sdpa", dtype: torch.dtype = torch.float64) -> SelfAttention:
    """The mechanism with random weights, in eval mode."""
    config = SimpleNamespace(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_probs_dropout_prob=0.1,
        is_decoder=case.variants[variant].causal,
        _attn_implementation=backend,
    )
    mechanism = ATTENTIONS[case.name]
    options = case.variants[variant].config
    module = mechanism(config, 0, mechanism.options_class(**options) if mechanism.options_class else None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    module.grid_of, module.dense = case.variants[variant].grid, case.variants[variant].dense
    return module.to(dtype).eval()


def states_of(batch: int, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    states = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return states.to(dtype).requires_grad_()


def context_of(
    module: SelfAttention, states: Tensor, keep: Tensor | None, is_global: Tensor | None
) -> dict[str, object]:
    """What a frame prepares for the mechanism."""
    if module.grid_of is not None:
        return module.grid_of(states.shape[1])
    return {} if is_global is None else {"global_tokens": slots(is_global, keep)}


def attend(module: SelfAttention, states: Tensor, keep: Tensor | None, is_global: Tensor | None) -> Tensor:
    with dense_execution(module.dense):
        return module(states, keep, **context_of(module, states, keep, is_global))[0]


def grads(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list(torch.autograd.grad((result.double() * weight).sum(), inputs, allow_unused=True))


def test_every_mechanism_has_a_row() -> None:
    assert {case.name for case in CASES} == set(ATTENTIONS)


# The eager backend is as dense as the oracle and has no blocks to fill: fewer lengths.
@ROW
@pytest.mark.parametrize(
    ("backend", "length"), [*(("sdpa", length) for length in LENGTHS), *(("eager", length) for length in (1, 7, 100))]
)
def test_equals_the_oracle_in_result_and_every_gradient(case: Case, variant: str, backend: str, length: int) -> None:
    module = build(case, variant, backend)
    names = [name for name, _ in module.named_parameters()]
    rounding = case.variants[variant].rounding
    for side, keep in paddings(3, length).items():
        states = states_of(3, length)
        is_global = case.variants[variant].is_global(3, length)
        if is_global is not None and keep is not None:
            is_global = is_global & keep
        inputs = [states, *module.parameters()]
        ours = attend(module, states, keep, is_global)
        right = case.module_oracle(
            {**dict(module.named_parameters()), **dict(module.named_buffers())},
            states,
            keep,
            heads=HEADS,
            is_global=is_global,
            **case.variants[variant].options,
        )
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-10 * rounding, msg=lambda m: f"{side} padding: {m}")  # noqa: B023
        for name, a, b in zip(["states", *names], grads(ours, inputs), grads(right, inputs), strict=True):
            b = torch.zeros_like(a) if b is None else b
            tolerance = {"rtol": 0, "atol": 1e-9 * rounding}
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m: f"{side} padding, {name}: {m}")  # noqa: B023


@ROW
@BACKEND
def test_padding_and_batch_mates_never_matter(case: Case, variant: str, backend: str) -> None:
    module = build(case, variant, backend)
    for keep in (mask for mask in paddings(3, 100).values() if mask is not None):
        states = states_of(3, 100).detach()
        is_global = case.variants[variant].is_global(3, 100)
        is_global = None if is_global is None else is_global & keep
        batched = attend(module, states, keep, is_global)
        poisoned = torch.where(keep[:, :, None], states, 1e3 * states.flip(0) + 7)
        torch.testing.assert_close(attend(module, poisoned, keep, is_global), batched, rtol=0, atol=1e-12)
        # What is left of a grid is another grid.
        for row in range(3 if module.grid_of is None else 0):
            own = keep[row]
            alone = attend(
                module, states[row : row + 1, own], None, None if is_global is None else is_global[row : row + 1, own]
            )
            torch.testing.assert_close(alone[0], batched[row, own], rtol=0, atol=1e-11)


@ROW
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("idle", [True, False])
def test_every_parameter_gets_a_gradient(case: Case, variant: str, dtype: torch.dtype, idle: bool) -> None:
    """Idle weights get exactly 0, which DDP needs; weights in use get more (but for key biases, which shift rows)."""
    module = build(case, variant, dtype=dtype).train()
    is_global = None if idle else case.variants[variant].is_global(2, 20)
    result = attend(module, states_of(2, 20, dtype), None, is_global)
    found = dict(zip(dict(module.named_parameters()), grads(result, list(module.parameters())), strict=True))
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        in_use = is_global is not None if "_global" in name else not (is_global is not None and is_global.all())
        if not in_use:
            assert (gradient == 0).all(), f"{name} is idle"
        elif "key" not in name or "weight" in name:
            assert gradient.abs().max() > 0, f"{name} is in use"


@ROW
def test_eager_weights_never_touch_padding_and_are_probabilities(case: Case, variant: str) -> None:
    module = build(case, variant, "eager")
    keep = paddings(3, 63)["left"]
    is_global = case.variants[variant].is_global(3, 63)
    is_global = None if is_global is None else is_global & keep
    context = context_of(module, states_of(3, 63), keep, is_global)
    _, weights = module(states_of(3, 63), keep, **context)
    assert weights.shape == (3, HEADS, 63, 63)
    if case.probabilities:
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(dim=-1), keep[:, None, :].expand(-1, HEADS, -1).double())
    assert (weights[~keep[:, None, None, :].expand_as(weights)] == 0).all(), "padding gets no weight"
    assert module(states_of(3, 63), keep, **context)[0].isfinite().all()


@ROW
def test_backends_draw_no_random_numbers_in_eval(case: Case, variant: str) -> None:
    states = states_of(2, 40)
    is_global = case.variants[variant].is_global(2, 40)
    for backend in ("eager", "sdpa"):
        module = build(case, variant, backend)
        before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
        assert torch.equal(
            attend(module, states, None, is_global).detach(), attend(module, states, None, is_global).detach()
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("queries", [0, 1, 3, HEAD_DIM, HEAD_DIM + 5])
@pytest.mark.parametrize("reassociate", [True, False, None])
def test_projected_attention_equals_projecting_first(queries: int, reassociate: bool | None) -> None:
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, states = randn(2, HEADS, queries, HEAD_DIM), randn(2, 37, WIDTH)
    maps = {
        "key.weight": randn(WIDTH, WIDTH),
        "key.bias": randn(WIDTH),
        "value.weight": randn(WIDTH, WIDTH),
        "value.bias": randn(WIDTH),
    }
    keep = paddings(2, 37)["left"]
    key, value = project(maps, "key", states, HEADS), project(maps, "value", states, HEADS)
    right = masked_attention(query, key, value, keep[:, None, None, :].expand(2, HEADS, queries, 37))
    named = {name.replace(".", "_"): tensor for name, tensor in maps.items()}
    ours, weights = projected_attention(query, states, keep, reassociate=reassociate, **named)
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-11)
    assert weights.shape == (2, HEADS, queries, 37)
    inputs = [query, states, *maps.values()]
    for a, b in zip(grads(ours, inputs), grads(right, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_projected_attention_drops_without_bias() -> None:
    """The bias of the values is weighed by the row sum, so dropout moves it too."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"key_weight": (WIDTH, WIDTH), "key_bias": WIDTH, "value_weight": (WIDTH, WIDTH), "value_bias": WIDTH}
    maps = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    query, states = (
        torch.randn(1, HEADS, 2, HEAD_DIM, generator=generator),
        torch.randn(1, 9, WIDTH, generator=generator),
    )
    torch.manual_seed(0)
    first = projected_attention(query, states, dropout_p=0.5, reassociate=True, **maps)[0]
    torch.manual_seed(0)
    second = projected_attention(query, states, dropout_p=0.5, reassociate=False, **maps)[0]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@ROW
@BACKEND
def test_dropout_in_training_alone_and_without_bias(case: Case, variant: str, backend: str) -> None:
    copies, calls = 50, 8
    module = build(case, variant, backend)
    module.dropout_p = 0.4
    states = states_of(2, 9).detach()
    is_global = case.variants[variant].is_global(2, 9)
    many_global = None if is_global is None else is_global.repeat(copies, 1)
    with torch.no_grad():
        plain = attend(module, states, None, is_global)
        assert torch.equal(attend(module, states, None, is_global), plain)
        module.train()
        torch.manual_seed(0)
        results = [attend(module, states.repeat(copies, 1, 1), None, many_global) for _ in range(calls)]
    draws = torch.cat(results).unflatten(0, (copies * calls, 2))
    assert not torch.equal(results[0], results[1]) and not torch.equal(draws[0], draws[1])
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - plain).abs() <= 5 * standard_error + 1e-12).all()
