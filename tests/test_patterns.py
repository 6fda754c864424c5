"""Attention patterns: what is drawn is what the mechanisms compute and the references allow, family by family."""

import copy
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from cases import CASES, HEAD_DIM, HEADS, ROW_IDS, ROWS, Case, paddings, slots
from helpers import (
    config_class,
    layers_of,
    mask_of,
    model_class,
    random_ids,
    random_images,
    randomise_,
    tiny_config,
)
from torch import Tensor

from hf_efficient_attn import (
    ATTENTIONS,
    FAMILIES,
    EffElectraForJointPreTraining,
    EffElectraJointConfig,
    EffLongformerForSequenceClassification,
    EffViTModel,
    attention_pattern,
)
from hf_efficient_attn.auto import TEXT_FAMILIES, VISION_FAMILIES
from hf_efficient_attn.patterns import MAX_TOKENS
from hf_efficient_attn.patterns.capture import Given, random_inputs
from hf_efficient_attn.patterns.drawing import equal_heads
from hf_efficient_attn.patterns.kinds import attended_pairs, eager_weights, even_weights, pair_kinds


LENGTH = 40
WIDTH = HEADS * HEAD_DIM
FAMILY = pytest.mark.parametrize("family", FAMILIES)
ATTENTION = pytest.mark.parametrize("attention", ATTENTIONS)
CAUSAL = [family for family in TEXT_FAMILIES if config_class(family).has_causal_form]


# Mechanisms, against the references.


def given_of(case: Case, variant: str, keep: Tensor | None) -> tuple[Given, Tensor | None]:
    """A mechanism with random weights and what it is called with, and which tokens are global."""
    setting = case.variants[variant]
    config = SimpleNamespace(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_probs_dropout_prob=0.1,
        is_decoder=setting.causal,
        _attn_implementation="sdpa",
    )
    mechanism = ATTENTIONS[case.name]
    module = mechanism(config, 0, mechanism.options_class(**setting.config) if mechanism.options_class else None)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    states = torch.randn(1, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    is_global = setting.is_global(1, LENGTH)
    if is_global is not None and keep is not None:
        is_global = is_global & keep
    context = {} if is_global is None else {"global_tokens": slots(is_global, keep)}
    if setting.grid is not None:
        context = setting.grid(LENGTH)
    return Given(module.double().eval(), states, keep, context, None), is_global


@torch.no_grad()
def reference(case: Case, variant: str, given: Given, is_global: Tensor | None) -> Tensor:
    """The weights `[heads, n, n]` of the reference: what it makes of values that are 1 at one token and 0 elsewhere."""
    setting, module = case.variants[variant], given.attention
    query, key, _ = module.project(given.states)
    options = dict(setting.options)
    if "projection" in options:
        options["projection"] = module.projection
    ones = torch.eye(LENGTH, dtype=torch.float64)
    parts = []
    for start in range(0, LENGTH, HEAD_DIM):
        value = ones[:, start : start + HEAD_DIM].expand(1, HEADS, -1, -1)
        parts.append(case.oracle(query, key, value, given.keep, is_global, **options))
    weights = torch.cat(parts, dim=-1)[0]
    if is_global is None:
        return weights
    # The rows of Longformer's global tokens have projections of their own; which tokens they see is said in words.
    seen = torch.ones(LENGTH, LENGTH) if given.keep is None else (given.keep[0][:, None] & given.keep[0]).double()
    seen = seen.tril() * is_global[0] if setting.causal else seen
    return torch.where(is_global[0][:, None], seen.double(), weights)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize(("case", "variant"), ROWS, ids=ROW_IDS)
def test_pairs_are_those_of_the_reference(case: Case, variant: str, side: str) -> None:
    keep = paddings(2, LENGTH)[side]
    given, is_global = given_of(case, variant, None if keep is None else keep[1:])
    right = reference(case, variant, given, is_global)
    if given.attention.is_estimate:
        scale = case.variants[variant].rounding
        torch.testing.assert_close(eager_weights(given), right.float(), rtol=0, atol=1e-6 * scale)
        return
    attended = attended_pairs(given)
    assert attended.shape == (HEADS, LENGTH, LENGTH) and attended.dtype == torch.bool
    assert torch.equal(attended, right != 0)
    kinds, numbers = pair_kinds(given, attended)
    assert torch.equal(numbers != 0, attended), "every pair has a kind, and nothing else has"
    assert numbers.dtype == torch.int8 and numbers.max() <= len(kinds)


@pytest.mark.parametrize(("case", "variant"), ROWS, ids=ROW_IDS)
@torch.no_grad()
def test_what_says_that_it_estimates_does(case: Case, variant: str) -> None:
    """Where pairs are drawn, they weigh as in softmax; an estimate's pairs, which are all, would say nothing of it."""
    given, is_global = given_of(case, variant, None)
    module = given.attention
    query, key, value = module.project(given.states)
    options = {"dropout_p": 0.0, "backend": "eager", **given.context}
    weights = module.attend(given.states, query, key, value, None, **options)[1][0]
    even = even_weights(given)
    attended = even > 0
    if is_global is not None:
        attended = attended & ~is_global[0][:, None]  # their rows have projections of their own
    logarithms = (weights / even).log() - (query @ key.transpose(-1, -2))[0] * HEAD_DIM**-0.5
    lowest = logarithms.masked_fill(~attended, torch.inf).amin(dim=-1)
    highest = logarithms.masked_fill(~attended, -torch.inf).amax(dim=-1)
    spread = float((highest - lowest)[attended.any(dim=-1)].max()) if attended.any() else 0.0
    exact = "more than tokens" in variant or "exact below" in variant  # a landmark for every token; a short text
    assert (spread < 1e-9) is (not module.is_estimate or exact)


def variant_of(name: str, variant: str, keep: Tensor | None = None) -> tuple[Given, dict[str, Tensor]]:
    """A row of `CASES`, and its pairs by kind."""
    case = next(case for case in CASES if case.name == name)
    given, _ = given_of(case, variant, keep)
    kinds, numbers = pair_kinds(given, attended_pairs(given))
    return given, {kind: numbers == number for number, kind in enumerate(kinds, start=1)}


def test_kinds_of_longformer() -> None:
    given, kinds = variant_of("longformer", "dilated by head")
    is_global = given.context["global_tokens"].mask[0]
    window = torch.stack([oracles.window(LENGTH, 3, dilation) for dilation in (1, 2, 3, 2)])
    either = is_global[:, None] | is_global
    assert is_global.sum() == 1
    assert torch.equal(kinds["global"], either.expand(HEADS, -1, -1))
    assert torch.equal(kinds["window"], window & ~either)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", ["internal", "extended", "both", "window alone"])
def test_kinds_of_big_bird(variant: str, padded: bool) -> None:
    keep = mask_of([LENGTH - 7], LENGTH, "left").bool() if padded else None
    given, kinds = variant_of("big_bird", variant, keep)
    options, own = given.attention.options, list(range(7 if padded else 0, LENGTH))
    front, text = own[: options.num_global_tokens], own[options.num_global_tokens :]
    block = {token: place // options.block_size for place, token in enumerate(text)}
    last = max(block.values())
    is_global = {*front, *(t for t in text if options.global_ends and block[t] in (0, last))}
    draws = next(case for case in CASES if case.name == "big_bird").variants[variant].options["draws"]
    for query in own:
        row = block.get(query, 0)
        for key in own:
            either = query in is_global or key in is_global
            near = not either and abs(row - block[key]) <= 1
            chosen = [
                oracles.random_choice(draws[head, row], row, last + 1, options.global_ends) for head in range(HEADS)
            ]
            random = [not either and not near and block[key] in blocks for blocks in chosen]
            assert kinds["global"][:, query, key].tolist() == [either] * HEADS
            assert kinds["window"][:, query, key].tolist() == [near] * HEADS
            assert kinds["random"][:, query, key].tolist() == random
    assert bool(kinds["random"].any()) is (options.num_random_blocks > 0)


def test_kinds_of_chunks_grids_and_hashes() -> None:
    place = torch.arange(LENGTH)
    _, kinds = variant_of("local", "ahead")
    own = place[:, None] // 9 == place // 9
    assert torch.equal(kinds["own chunk"], own.expand(HEADS, -1, -1))
    assert kinds["neighbouring chunk"].any()

    given, kinds = variant_of("neighborhood", "registers")
    in_front = place < given.context["num_global"]
    either = (in_front[:, None] | in_front).expand(HEADS, -1, -1)
    assert in_front.sum() == 5 and torch.equal(kinds["global"], either)
    assert torch.equal(kinds["window"], oracles.neighbours(given.context["grid"], (1, 2), 5) & ~either)

    given, kinds = variant_of("lsh", "three rounds")
    case = next(case for case in CASES if case.name == "lsh")
    options = case.variants["three rounds"].options
    factors = oracles.bucket_factors(LENGTH, options["chunk_length"], options["limit"])
    key = given.attention.project(given.states)[1]
    buckets = oracles.angular_buckets(key[0], options["rotations"], factors, options["sizes"])
    same = (buckets[:, :, :, None] == buckets[:, :, None, :]).any(dim=1)
    other = kinds["another bucket, next in the order"]
    assert other.any() and not (other & same).any()
    assert kinds["same bucket"].any() and not (kinds["same bucket"] & ~same).any()


# Families, against their own eager weights.


def inputs_of(family: str, padded: bool) -> dict[str, Tensor]:
    if family in VISION_FAMILIES:
        mask = torch.ones(1, 7, 6, dtype=torch.long)
        mask[:, 5:] = mask[:, :, 4:] = 0
        return {"pixel_values": random_images(1, 28, 24)} | ({"patch_mask": mask} if padded else {})
    return {"input_ids": random_ids(1, LENGTH)} | ({"attention_mask": mask_of([29], LENGTH)} if padded else {})


@torch.no_grad()
def attentions_of(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What the model itself returns with the eager backend, `[heads, n, n]` a layer."""
    model.set_attn_implementation("eager")
    found = [weights[0] for weights in model(**inputs, output_attentions=True).attentions]
    model.set_attn_implementation("sdpa")
    return found


def check_against_eager(model: Any, inputs: dict[str, Tensor], padded: bool) -> None:
    for layer, right in enumerate(attentions_of(model, inputs)):
        drawn = attention_pattern(model, layer=layer, inputs=inputs)
        weighed = attention_pattern(model, layer=layer, inputs=inputs, weights=True)
        assert weighed.kinds == () and weighed.matrix.dtype == torch.float32
        torch.testing.assert_close(weighed.matrix, right, rtol=1e-5, atol=1e-6)
        assert torch.equal(drawn.attended, right != 0)
        assert (drawn.kinds == ()) is model.base_model.encoder.attentions()[layer].is_estimate
        outside = ~(drawn.keep[:, None] & drawn.keep)
        assert outside.any() == padded and not drawn.attended[:, outside].any(), "padding is in no pair"
        own = int(drawn.keep.sum())
        assert drawn.share == pytest.approx(float((right != 0).sum()) / (len(right) * own**2))
        assert f", layer {layer}, {len(drawn.keep)} tokens: {100 * drawn.share:.3g} % of the pairs" in drawn.title


@pytest.mark.parametrize("padded", [False, True])
@FAMILY
def test_a_family_is_drawn_as_its_eager_backend_weighs(family: str, padded: bool) -> None:
    model = randomise_(model_class(family, "AutoModel")(tiny_config(family)))
    check_against_eager(model, inputs_of(family, padded), padded)


@pytest.mark.parametrize("padded", [False, True])
@ATTENTION
def test_any_mechanism_in_images(attention: str, padded: bool) -> None:
    """With a mask most mechanisms get the patches in another order than the picture has."""
    options = {"longformer": {"attention_window": 8}, "big_bird": {"block_size": 4}, "neighborhood": {"radius": 1}}
    options |= {"lsh": {"lsh_attn_chunk_length": 6}, "local": {"local_attn_chunk_length": 6}}
    options |= {"nystromformer": {"num_landmarks": 6}, "performer": {"num_features": 12}}
    config = tiny_config("eff_vit", attention=attention, attention_options=options.get(attention))
    model = randomise_(EffViTModel(config))
    check_against_eager(model, inputs_of("eff_vit", padded), padded)
    assert attention_pattern(model, 12).title.startswith(f"EffViT ({attention}), layer 0, 13 tokens: ")


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_families_draw_lower_triangles(family: str) -> None:
    config = tiny_config(family, is_decoder=True)
    for layer in range(config.num_hidden_layers):
        drawn = attention_pattern(config, LENGTH, layer=layer)
        assert ", causal, layer" in drawn.title
        assert not drawn.attended.triu(1).any()
        assert drawn.attended.any(dim=-1).all() and drawn.attended.tril(-1).any()
    if family == "eff_longformer":
        prefix = tiny_config(family, is_decoder=True, causal_global="prefix")
        drawn = attention_pattern(prefix, LENGTH, num_global=2)
        assert not drawn.attended.triu(1).any() and drawn.attended[:, :, 0].all()
        assert (drawn.matrix == 1 + drawn.kinds.index("global")).any()


@FAMILY
def test_nothing_else_changes_and_the_seed_decides(family: str) -> None:
    config = tiny_config(family)
    before = copy.deepcopy(vars(config))
    state = torch.get_rng_state()
    first = attention_pattern(config, LENGTH, seed=1, weights=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again, other = (attention_pattern(config, LENGTH, seed=seed, weights=True) for seed in (1, 2))
    assert torch.equal(first.matrix, again.matrix) and first.title == again.title
    assert not torch.equal(first.matrix, other.matrix)
    same_input = [attention_pattern(config, seed=s, weights=True, inputs=inputs_of(family, False)) for s in (1, 2)]
    assert not torch.equal(same_input[0].matrix, same_input[1].matrix), "new weights go by the seed"
    assert vars(config) == before

    model = randomise_(model_class(family, "AutoModel")(tiny_config(family, hidden_dropout_prob=0.5))).train()
    layers_of(model)[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    drawn = attention_pattern(model, LENGTH, layer=1, weights=True)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state), "no dropout is drawn"
    assert torch.equal(drawn.matrix, attention_pattern(model.eval(), LENGTH, layer=1, weights=True).matrix)


def test_a_task_has_its_own_global_tokens() -> None:
    model = EffLongformerForSequenceClassification(tiny_config("eff_longformer"))
    drawn = attention_pattern(model, LENGTH)
    is_global = drawn.matrix == 1 + drawn.kinds.index("global")
    assert is_global[:, 0].all() and is_global[:, :, 0].all() and not is_global[:, 1:, 1:].any()
    more = attention_pattern(model, LENGTH, num_global=3)
    assert more.attended[:, :3].all() and not more.attended[:, 3].all()


def test_a_random_text_has_no_special_tokens() -> None:
    """One of them would be padding, or the end of a question."""
    model = model_class("eff_longformer", "AutoModel")(tiny_config("eff_longformer", vocab_size=8))
    found = random_inputs(model, 500, seed=0)["input_ids"]
    assert set(found[0].tolist()) == set(range(8)) - {0, 1, 2}
    assert attention_pattern(model, LENGTH).keep.all()


def test_added_tokens_come_first() -> None:
    config = tiny_config("eff_big_bird", num_global_tokens=5, global_ends=False, num_random_blocks=0)
    drawn = attention_pattern(config, LENGTH)
    assert drawn.matrix.shape == (4, LENGTH + 5, LENGTH + 5)
    assert (drawn.matrix[:, :5] == 1 + drawn.kinds.index("global")).all()
    assert equal_heads(drawn.matrix) == [[0, 1, 2, 3]]


def test_the_layer_and_its_options() -> None:
    config = tiny_config("eff_longformer", attention_dilation=[1, [1, 1, 2, 3]])
    first, second = (attention_pattern(config, LENGTH, layer=layer) for layer in (0, 1))
    assert "attention_window = 8, attention_dilation = 1" in first.title
    assert "attention_window = 4, attention_dilation = [1, 1, 2, 3]" in second.title
    assert equal_heads(first.matrix) == [[0, 1, 2, 3]] and equal_heads(second.matrix) == [[0, 1], [2], [3]]
    kinds = [attention_pattern(tiny_config("eff_reformer"), LENGTH, layer=layer).title for layer in (0, 1)]
    assert kinds[0].startswith("EffReformer (local), layer 0") and kinds[1].startswith("EffReformer (lsh), layer 1")
    assert "num_hashes = 2" in kinds[1] and "seed" not in kinds[1]
    seeded = attention_pattern(tiny_config("eff_big_bird", random_seed=3), LENGTH).title
    assert "block_size = 8" in seeded and "random_seed = 3" in seeded
    assert "estimated" in attention_pattern(tiny_config("eff_performer"), LENGTH).title


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: tiny_config("eff_performer"), {"length": 0}, "length = 0: there has to be 1 token or more"),
        (lambda: tiny_config("eff_performer"), {"length": MAX_TOKENS + 1}, "length = 8,193: .* at most 8,192"),
        (lambda: tiny_config("eff_performer"), {"length": LENGTH, "layer": 2}, "layer = 2: the model has the layers 0"),
        (lambda: tiny_config("eff_performer"), {"length": LENGTH, "layer": -1}, "layer = -1"),
        (lambda: tiny_config("eff_performer"), {"length": 200}, "200"),
        (lambda: tiny_config("eff_performer"), {"length": LENGTH, "num_global": 2}, "no global tokens"),
        (lambda: tiny_config("eff_longformer"), {"length": LENGTH, "num_global": 41}, "41 of 40 tokens"),
        (lambda: tiny_config("eff_vit"), {"length": 12, "num_global": 1}, "global tokens are for texts"),
        (lambda: SimpleNamespace(model_type="bert"), {}, "no config of a family"),
        (
            lambda: tiny_config("eff_performer"),
            {"inputs": {"input_ids": random_ids(2, LENGTH)}},
            "hold 2 examples; give one",
        ),
        (
            lambda: tiny_config("eff_performer"),
            {"inputs": {"input_ids": random_ids(1, 8), "document_ids": torch.ones(1, 8, dtype=torch.long)}},
            "document_ids",
        ),
    ],
)
def test_errors(build: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_pattern(build(), **arguments)


def test_a_model_of_two_is_drawn_by_its_halves() -> None:
    model = EffElectraForJointPreTraining(EffElectraJointConfig.from_size("small", vocab_size=64))
    with pytest.raises(ValueError, match="discriminator"):
        attention_pattern(model, LENGTH)
    assert attention_pattern(model.discriminator, LENGTH).attended.all()


# Pictures.
