"""Short inputs computed as one matrix: the same function, on either side of where that ends, and the switch for it."""

from collections.abc import Callable

import pytest
import torch
from cases import ROWS, Case, paddings, qkv
from helpers import mask_of, model_class, random_ids, randomise_, tiny_config
from test_formulas import formula, is_global_of, with_grads
from torch import Tensor
from torch.testing import assert_close

from hf_efficient_attn.cpu import Scratch
from hf_efficient_attn.functional import big_bird, dense_execution, nystrom, sliding_window
from hf_efficient_attn.functional.dense_execution import dense_is_cheaper
from hf_efficient_attn.functional.group_bias import GroupBias


# Where a mechanism goes on to once it has decided for one matrix.
DENSE_WAYS = (
    (sliding_window, "biased_attention"),
    (big_bird, "cpu_group_attention"),
    (big_bird, "padded_attention"),
    (nystrom, "padded_attention"),
)
DENSE_ROWS = [(case, name[: -len(", in blocks")]) for case, name in ROWS if not case.variants[name].dense]
DENSE_ROW = pytest.mark.parametrize(
    ("case", "variant"), DENSE_ROWS, ids=[f"{case.name}: {name}" for case, name in DENSE_ROWS]
)
FAMILIES = ("eff_longformer", "eff_big_bird", "eff_nystromformer")


def longest(case: Case, variant: str) -> int:
    """The longest text that is computed densely without dropout, with the table's small windows and blocks."""
    return case.variants[variant].options["num_landmarks"] if case.name == "nystromformer" else 192


def is_dense(case: Case, variant: str, length: int) -> bool:
    """Heads of several dilations never are."""
    return length <= longest(case, variant) and not isinstance(case.variants[variant].options.get("dilation"), list)


@pytest.fixture
def dense_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what computed densely, a call at a time."""
    calls: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> Tensor:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for module, name in DENSE_WAYS:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


@DENSE_ROW
@pytest.mark.parametrize("beyond", [0, 1])
def test_either_side_of_the_threshold_is_the_same_function(
    case: Case, variant: str, beyond: int, dense_calls: list[str]
) -> None:
    length = longest(case, variant) + beyond
    function, options = case.formula, case.variants[variant].options
    for side, keep in paddings(3, length).items():
        inputs, is_global = qkv(3, length), is_global_of(case, variant, 3, length, keep)
        dense_calls.clear()
        ours = with_grads(formula(case, variant, keep, is_global), inputs)
        assert bool(dense_calls) is is_dense(case, variant, length)
        dense_calls.clear()
        with dense_execution(False):
            right = with_grads(lambda q, k, v: function(q, k, v, keep, is_global, **options), inputs)  # noqa: B023
        assert not dense_calls
        for name, a, b in zip(("result", "query", "key", "value"), ours, right, strict=True):
            atol = 1e-10 * case.variants[variant].rounding
            assert_close(a, b, rtol=0, atol=atol, msg=lambda m: f"{side} padding, {name}: {m}")  # noqa: B023


@DENSE_ROW
def test_alone_and_dense_is_padded_and_in_blocks(case: Case, variant: str, dense_calls: list[str]) -> None:
    counts = (2 * longest(case, variant), longest(case, variant), 7)
    for side in ("left", "right"):
        keep = mask_of(list(counts), counts[0], side).bool()
        inputs, is_global = qkv(3, counts[0]), is_global_of(case, variant, 3, counts[0], keep)
        batched = formula(case, variant, keep, is_global)(*inputs)
        for row, count in enumerate(counts):
            dense_calls.clear()
            own = keep[row]
            alone_global = None if is_global is None else is_global[row : row + 1, own]
            alone = formula(case, variant, None, alone_global)(*(x[row : row + 1, :, own] for x in inputs))
            assert_close(alone[0], batched[row][:, own], rtol=0, atol=1e-12 * case.variants[variant].rounding)
            assert bool(dense_calls) is is_dense(case, variant, count)


@DENSE_ROW
def test_never_while_compiling(
    case: Case, variant: str, dense_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    length = min(40, longest(case, variant))
    inputs, is_global = [x.detach() for x in qkv(2, length)], is_global_of(case, variant, 2, length, None)
    expected = formula(case, variant, None, is_global)(*inputs)
    dense_calls.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = formula(case, variant, None, is_global)(*inputs)
    assert not dense_calls
    assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_choice_goes_by_shapes_and_the_switch() -> None:
    assert dense_is_cheaper(768, 512, 0.0) and not dense_is_cheaper(769, 512, 0.0)
    assert dense_is_cheaper(576, 512, 0.1) and not dense_is_cheaper(577, 512, 0.1)
    assert dense_is_cheaper(192, 2, 0.0) and dense_is_cheaper(128, 2, 0.1) and not dense_is_cheaper(193, 2, 0.0)
    assert dense_is_cheaper(1024, 4096, 0.0) and not dense_is_cheaper(1025, 4096, 0.0), "no large masks"
    with dense_execution(False):
        assert not dense_is_cheaper(1, 512, 0.0)
        with dense_execution(True):
            assert dense_is_cheaper(1, 512, 0.0)
        assert not dense_is_cheaper(1, 512, 0.0)
    assert dense_is_cheaper(1, 512, 0.0)


def test_a_window_that_sees_all_needs_no_mask_at_any_length(dense_calls: list[str]) -> None:
    inputs = [x.detach() for x in qkv(1, 1100)]
    for radius, calls in ((1099, 1), (1098, 0)):
        dense_calls.clear()
        found = sliding_window.sliding_window_attention(*inputs, radius=radius)
        assert len(dense_calls) == calls
        with dense_execution(False):
            assert_close(found, sliding_window.sliding_window_attention(*inputs, radius=radius), rtol=0, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_autocast_changes_nothing_inside(autocast: bool, dropout_p: float) -> None:
    inputs = [x.detach() for x in qkv(2, 40, torch.float32)]
    for case, variant in DENSE_ROWS:
        if case.variants[variant].is_global(2, 40) is None:
            torch.manual_seed(0)
            right = formula(case, variant, None, None, dropout_p=dropout_p)(*inputs)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                torch.manual_seed(0)
                found = formula(case, variant, None, None, dropout_p=dropout_p)(*inputs)
            # The gathered form of dilated heads goes through torch as it is.
            assert torch.equal(found, right) or isinstance(case.variants[variant].options.get("dilation"), list)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_models_alone_are_models_padded_across_the_threshold(family: str, side: str) -> None:
    model = randomise_(model_class(family, "AutoModel")(tiny_config(family, max_position_embeddings=420)))
    counts = [400, 192, 193, 3]
    ids, keep = random_ids(4, 400), mask_of(counts, 400, side)
    with torch.no_grad():
        batched = model(ids, keep).last_hidden_state
        for row in range(4):
            own = keep[row].bool()
            alone = model(ids[row : row + 1, own]).last_hidden_state[0]
            assert_close(batched[row, own], alone, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_model_trains_the_same_either_way(family: str, dropout_p: float, dense_calls: list[str]) -> None:
    """Gradients of every weight; with dropout only that there are some: what is dropped differs."""
    options = {"attention_probs_dropout_prob": dropout_p, "hidden_dropout_prob": 0.0, "max_position_embeddings": 200}
    if family == "eff_nystromformer":
        options["num_landmarks"] = 70
    model = randomise_(model_class(family, "AutoModel")(tiny_config(family, **options))).train()
    ids, keep = random_ids(3, 70), mask_of([70, 40, 1], 70, "left")

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, keep).last_hidden_state.square().sum().backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    dense = gradients()
    assert len(dense_calls) == model.config.num_hidden_layers
    with dense_execution(False):
        blocks = gradients()
    assert len(dense_calls) == model.config.num_hidden_layers and dense.keys() == blocks.keys()
    for name, gradient in dense.items():
        assert gradient.isfinite().all()
        if dropout_p == 0.0:
            assert_close(gradient, blocks[name], rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_a_bias_by_groups_is_that_of_its_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 4, 6, 6, generator=generator)
    group = torch.randint(6, (3, 20), generator=generator)
    for bias in (GroupBias(table, group), GroupBias(table.expand(3, -1, -1, -1) * 2, group[:1])):
        pairs = bias.of_pairs()
        for row in range(3):
            own, token = bias.table[min(row, len(bias.table) - 1)], bias.group[min(row, len(bias.group) - 1)]
            assert_close(pairs[row], own[:, token][:, :, token])
        some = bias.part((slice(1, 3), slice(2, 4)), 2, Scratch())
        assert_close(some, pairs[1:3, 2:4])
    assert GroupBias(torch.zeros(1, 4, 6, 6), group).part((slice(0, 1), slice(0, 4)), 1, Scratch()) is None


def test_short_texts_of_big_bird_have_no_blocks_left_to_draw() -> None:
    """The module draws no more than there can be, and what it draws is the same in a batch with longer texts."""
    for ends in (True, False):
        config = tiny_config("eff_big_bird", num_random_blocks=3, global_ends=ends)
        attention = model_class("eff_big_bird", "AutoModel")(config).encoder.layer[0].attention.self
        for blocks in range(1, 12):
            own = attention.random_blocks(torch.tensor([blocks]), blocks)
            wide = attention.random_blocks(torch.tensor([blocks]), 20)[:, :, :blocks]
            assert own.shape[3] == min(3, max(0, blocks - (4 if ends else 2)))
            assert torch.equal(own, wide[..., : own.shape[3]]) and (wide[..., own.shape[3] :] == -1).all()


@pytest.mark.parametrize("watched", [False, True])
def test_idle_projections_get_a_gradient_of_zero(watched: bool) -> None:
    """Without work; but those that are more than a map, such as adapters with weights of their own, still run."""
    model = randomise_(model_class("eff_longformer", "AutoModel")(tiny_config("eff_longformer"))).train()
    attention = model.encoder.layer[0].attention.self
    seen: list[tuple[int, ...]] = []
    if watched:
        attention.query_global.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model(random_ids(2, 20)).last_hidden_state.sum().backward()
    assert seen == ([(2, 0, 32)] if watched else [])
    for name in ("query_global", "key_global", "value_global"):
        for parameter in getattr(attention, name).parameters():
            assert (parameter.grad == 0).all()
