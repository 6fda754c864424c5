"""What is BigBird's own: random blocks, the extended form, and options that are refused."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers import mask_of, model_class, no_warnings, random_ids, randomise_, tiny_config
from oracles import random_choice
from torch.testing import assert_close

from hf_efficient_attn.attention import ATTENTIONS
from hf_efficient_attn.functional import (
    big_bird_attention,
    block_cpu,
    dense_execution,
    dropout_cpu,
    pick_random_blocks,
    plan_big_bird,
    random_draws,
)
from hf_efficient_attn.functional.big_bird import big_bird_counts


CPU = torch.device("cpu")


def build(auto: str = "AutoModel", **overrides: Any) -> Any:
    return randomise_(model_class("eff_big_bird", auto)(tiny_config("eff_big_bird", **overrides)))


@pytest.mark.parametrize("ends", [True, False])
def test_random_blocks_are_those_of_the_reference_for_every_count(ends: bool) -> None:
    draws = random_draws(3, 1, 2, 12, 4, CPU)
    counts = torch.arange(13)
    found = pick_random_blocks(draws, counts, ends_are_global=ends)
    assert found.shape == (13, 2, 12, 4)
    for blocks, head, row in itertools.product(range(13), range(2), range(12)):
        attends_all = row in (0, blocks - 1) if ends else False
        right = [] if row >= blocks or attends_all else random_choice(draws[head, row], row, blocks, ends)
        assert found[blocks, head, row].tolist() == right + [-1] * (4 - len(right))


def test_random_blocks_are_never_attended_anyway_and_differ() -> None:
    found = pick_random_blocks(random_draws(0, 0, 4, 40, 3, CPU), torch.tensor([40]), ends_are_global=True)[0]
    for head, row in itertools.product(range(4), range(1, 39)):
        picked = found[head, row].tolist()
        assert len(set(picked)) == 3 and not set(picked) & {0, row - 1, row, row + 1, 39}
    assert not torch.equal(found[0], found[1]), "each head has its own"


def test_every_free_block_is_equally_likely() -> None:
    """Chi-square over the pairs that row 5 of 12 draws, in 4,000 heads; 21 pairs of 7 free blocks."""
    found = pick_random_blocks(random_draws(7, 2, 4000, 12, 2, CPU), torch.tensor([12]), ends_are_global=True)
    pairs = Counter(tuple(sorted(x)) for x in found[0, :, 5].tolist())
    expected = 4000 / 21
    assert set(itertools.chain(*pairs)) == {1, 2, 3, 7, 8, 9, 10} and len(pairs) == 21
    # The 99.99 % point of chi-square with 20 degrees of freedom.
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 52.4


def test_draws_depend_on_seed_layer_and_place_alone() -> None:
    numbers = random_draws(5, 3, 4, 10, 3, CPU)
    assert torch.equal(random_draws(5, 3, 8, 30, 3, CPU)[:4, :10], numbers)
    assert numbers.min() >= 0 and numbers.max() < 2**32
    others = [random_draws(seed, layer, 4, 10, 3, CPU) for seed, layer in ((6, 3), (5, 4), (5 + 2**31, 3))]
    for other in others:
        assert (numbers != other).float().mean() > 0.99
    bits = random_draws(0, 0, 100, 100, 4, CPU).flatten()[:, None] >> torch.arange(32) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 0.02).all(), "every bit is 1 half of the time"


def test_no_generator_is_touched_and_train_is_eval() -> None:
    model = build()
    ids = random_ids(2, 100)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.no_grad():
        evaluated, trained = model(ids)[0], model.train()(ids)[0]
    assert torch.equal(evaluated, trained)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    with torch.no_grad():
        other = build(random_seed=1)(ids)[0]
    assert not torch.allclose(other, evaluated), "the seed chooses"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("count", [1, 7])
def test_blocks_that_are_listed_twice_count_twice(count: int, dense: bool) -> None:
    query, key, value = torch.randn(3, 1, 1, 12, 4, dtype=torch.float64)
    options = {"block_size": 2, "global_ends": False}
    lists = torch.full((1, 1, 6, count), -1)
    lists[0, 0, 0] = 4  # the first block attends blocks 0 and 1, and block 4 `count` times
    with dense_execution(dense):
        mixed = big_bird_attention(query, key, value, random_blocks=lists, **options)
    scores = query[0, 0, 0] @ key[0, 0].T / 2
    weights = scores.exp() * torch.tensor([1.0] * 4 + [0.0] * 4 + [count] * 2 + [0.0] * 2)
    assert_close(mixed[0, 0, 0], weights @ value[0, 0] / weights.sum())


@pytest.mark.parametrize("chunk", [1, 10**5, 10**9])
@pytest.mark.parametrize("module", [block_cpu, dropout_cpu])
def test_size_of_the_chunks_changes_nothing(chunk: int, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block at a time, several, or several examples; or one head at a time, some, or several examples."""
    with dense_execution(module is dropout_cpu):
        _check_chunks(chunk, module, monkeypatch)


def _check_chunks(chunk: int, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    ids, keep = random_ids(4, 70), mask_of([70, 33, 1, 64], 70, "left")
    right = model(ids, keep)[0]
    right.square().sum().backward()
    expected = [x.grad.clone() for x in model.parameters() if x.grad is not None]
    model.zero_grad()
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    found = model(ids, keep)[0]
    assert_close(found, right)
    found.square().sum().backward()
    for a, b in zip([x.grad for x in model.parameters() if x.grad is not None], expected, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


EXTENDED = {"num_global_tokens": 5, "global_ends": False, "num_random_blocks": 0}


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_extended_form_is_alone_as_batched(backend: str, side: str) -> None:
    model = build(**EXTENDED, attn_implementation=backend)
    lengths = [70, 33, 1]
    ids, keep = random_ids(3, 70), mask_of(lengths, 70, side)
    with torch.no_grad():
        batched = model(ids, keep, output_hidden_states=True)
        assert all(x.shape == (3, 70, 32) for x in batched.hidden_states)
        assert torch.equal(batched.hidden_states[-1], batched.last_hidden_state)
        for row in range(3):
            own = keep[row].bool()
            alone = model(ids[row : row + 1, own]).last_hidden_state[0]
            assert_close(batched.last_hidden_state[row, own], alone, rtol=1e-5, atol=2e-5)


def test_extended_form_lets_the_ends_see_each_other() -> None:
    """Through a global token in two layers, which a window alone does not reach in ten."""
    for options, reaches in ((EXTENDED, True), ({**EXTENDED, "num_global_tokens": 0}, False)):
        model = build(**options, max_position_embeddings=200)
        embedded = model.get_input_embeddings()(random_ids(1, 200)).detach().requires_grad_()
        model(inputs_embeds=embedded).last_hidden_state[0, 0].sum().backward()
        assert (embedded.grad[0, -1].abs().max() > 0) == reaches


def test_extended_form_saves_trains_compiles_and_gives_weights(tmp_path: Any) -> None:
    model = build("AutoModelForSequenceClassification", **EXTENDED)
    ids, keep = random_ids(3, 41), mask_of([41, 30, 9], 41)
    outputs = model(ids, keep, labels=torch.tensor([0, 1, 0]))
    outputs.loss.backward()
    grads = dict(model.named_parameters())
    assert all(x.grad is not None for x in grads.values())
    assert grads["bert.global_embeddings.weight"].grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    with no_warnings():
        again = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        found = again(ids, keep, output_attentions=True)
        assert_close(found.logits, outputs.logits, rtol=1e-5, atol=1e-5)
        assert all(x.shape == (3, 4, 46, 46) for x in found.attentions), "global tokens come first"
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(ids, keep).logits, outputs.logits, rtol=1e-5, atol=1e-5)
        states = model.base_model(ids, keep, return_dict=False)
        assert isinstance(states, tuple) and states[0].shape == (3, 41, 32)


def test_a_text_of_few_blocks_is_full_attention() -> None:
    sparse, full = build(), build(attention_type="original_full")
    with torch.no_grad():
        for length, equal in ((24, True), (100, False)):
            ids = random_ids(2, length)
            assert torch.allclose(sparse(ids)[0], full(ids)[0], atol=1e-5) == equal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size = 0"),
        ({"num_global": -1}, "num_global = -1"),
        ({"random_blocks": torch.zeros(1, 2, 5, 1).long()}, r"with 4 heads, got shape \[1, 2, 5, 1\]"),
        ({"random_blocks": torch.zeros(1, 4, 4, 1).long()}, "has 4 rows, but 9 tokens in blocks of 2 need 5"),
    ],
    ids=["block size", "global tokens", "heads", "rows"],
)
def test_wrong_arguments_of_the_formula_are_refused(options: dict[str, Any], message: str) -> None:
    tensors = torch.randn(3, 2, 4, 9, 8)
    good = {"block_size": 2, "random_blocks": torch.zeros(1, 4, 5, 1).long()}
    assert big_bird_attention(*tensors, **good).shape == (2, 4, 9, 8)
    with pytest.raises(ValueError, match=message):
        big_bird_attention(*tensors, **{**good, **options})


PATTERN = {"block_size": 2, "random_blocks": torch.zeros(1, 4, 5, 1).long()}
MASK = mask_of([9, 5], 9).bool()


@pytest.mark.parametrize("options", [{}, {"num_global": 3}, {"global_ends": False}], ids=str)
@pytest.mark.parametrize("mask", [None, MASK, MASK[1:]], ids=["whole", "padded", "one"])
def test_a_plan_given_is_as_none(mask: torch.Tensor | None, options: dict[str, Any]) -> None:
    tensors, pattern = torch.randn(3, 2 if mask is None else len(mask), 4, 9, 8), {**PATTERN, **options}
    plan = plan_big_bird(mask, 9, **pattern)
    for dense in (False, True):
        with dense_execution(dense):
            found = big_bird_attention(*tensors, mask, plan=plan, **pattern)
            assert torch.equal(found, big_bird_attention(*tensors, mask, **pattern))
    assert torch.equal(
        big_bird_counts(tensors[0], mask, plan=plan, **pattern), big_bird_counts(tensors[0], mask, **pattern)
    )


# Mask and length of the plan, what of its pattern is another, the mask of the call -> what is said to differ.
WRONG_PLANS: dict[str, tuple[torch.Tensor | None, int, dict[str, Any], torch.Tensor | None, str]] = {
    "length": (None, 10, {}, None, "length = 10, but this call has length = 9"),
    "block size": (None, 9, {"block_size": 3}, None, "block_size = 3, but this call has block_size = 2"),
    "global tokens": (None, 9, {"num_global": 3}, None, "tokens = 2, but this call has blocks of global tokens = 0"),
    "mask": (MASK, 9, {}, None, "padding = True, but this call has padding = False"),
    "no mask": (None, 9, {}, MASK, "padding = False, but this call has padding = True"),
    "batch": (MASK[[0, 1, 1]], 9, {}, MASK, "own = 3, but this call has examples with padding of their own = 2"),
    "one example": (MASK[1:], 9, {}, MASK, "own = 1, but this call has examples with padding of their own = 2"),
    "several layers": (
        None,
        9,
        {"random_blocks": torch.zeros(1, 8, 5, 1).long()},
        None,
        r"\[1, 8, 5, 1\], .* by_layer",
    ),
    "random blocks": (None, 9, {"random_blocks": torch.zeros(1, 4, 5, 2).long()}, None, r"= \[1, 4, 5, 2\], but"),
    "ends": (None, 9, {"global_ends": False}, None, "global_ends = False, but this call has global_ends = True"),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_plan_of_other_inputs_is_refused(name: str) -> None:
    mask, length, options, own, message = WRONG_PLANS[name]
    tensors, plan = torch.randn(3, 2, 4, 9, 8), plan_big_bird(mask, length, **{**PATTERN, **options})
    with pytest.raises(ValueError, match=message):
        big_bird_attention(*tensors, own, plan=plan, **PATTERN)
    with pytest.raises(ValueError, match=message):
        big_bird_counts(tensors[0], own, plan=plan, **PATTERN)


def test_global_attention_mask_is_refused() -> None:
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match="no global tokens"):
        build()(ids, global_attention_mask=torch.ones_like(ids))


def test_every_layer_has_random_blocks_of_its_own() -> None:
    first, second = (layer.attention.self for layer in build().encoder.layer)
    blocks = torch.tensor([30])
    assert not torch.equal(first.random_blocks(blocks, 30), second.random_blocks(blocks, 30))
    other = build(random_seed=1).encoder.layer[0].attention.self
    assert not torch.equal(first.random_blocks(blocks, 30), other.random_blocks(blocks, 30))


@pytest.mark.parametrize("keep", [None, mask_of([90, 47], 90, "left").bool()], ids=["whole", "padded"])
@pytest.mark.parametrize("options", [{}, EXTENDED], ids=["internal", "extended"])
def test_layers_are_planned_at_once_as_each_on_its_own(keep: torch.Tensor | None, options: dict[str, Any]) -> None:
    layers = build(num_hidden_layers=3, **options).encoder.attentions()
    together = layers[0].plan(keep, 90, CPU, 3).by_layer(3)
    for layer, plan in zip(layers, together, strict=True):
        alone = layer.plan(keep, 90, CPU)
        assert torch.equal(plan.random_blocks, alone.random_blocks) and torch.equal(plan.lists, alone.lists)


@pytest.mark.parametrize("picked", [[0, 2], [2, 1], [1, 0, 2]])
def test_layers_may_be_picked(picked: list[int]) -> None:
    """Each keeps the random blocks of its number."""
    model, ids, mask = build(num_hidden_layers=3), random_ids(2, 90), mask_of([90, 61], 90)
    model.encoder.layer = torch.nn.ModuleList(model.encoder.layer[i] for i in picked)
    with torch.no_grad():
        outputs = model(ids, mask, output_hidden_states=True)
        states = outputs.hidden_states[0]
        for layer in model.encoder.layer:
            states = layer(states, mask.bool())
    assert_close(outputs.last_hidden_state, states)


def test_a_layer_may_have_another_mechanism() -> None:
    model = build()
    other = ATTENTIONS["softmax"](model.config, 1).eval()
    model.encoder.layer[1].attention.self = other
    assert torch.isfinite(model(random_ids(2, 90)).last_hidden_state).all()


def test_extended_form_cuts_off_the_global_tokens_in_front() -> None:
    model = build(**EXTENDED)
    ids = random_ids(2, 20)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        words = model.embeddings.word_embeddings(ids)
        assert_close(states[0], model.embeddings(words, torch.arange(20)[None], None))


def test_the_question_ends_at_its_first_separator_whatever_stands_in_padding() -> None:
    model = build("AutoModelForQuestionAnswering", sep_token_id=2)
    ids, keep = random_ids(1, 20), mask_of([14], 20, "left")
    ids[0, [9, 19]] = 2  # after the question, and at the end
    with torch.no_grad():
        clean = model(ids[:, 6:]).start_logits[0]
        ids[0, :6] = 2
        padded = model(ids, keep).start_logits[0, 6:]
    assert_close(padded, clean, rtol=1e-5, atol=1e-4)
    assert (clean < -1e5).tolist() == [False, True, True, True] + [False] * 10
