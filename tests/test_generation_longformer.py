"""Generation with EffLongformer: its cache is as wide as its windows, and has a prefix of global tokens."""

import pytest
import torch
from causal_models import FORMS, LENGTH, build, in_chunks, inputs_of
from helpers import mask_of, random_ids
from transformers import DynamicCache


FAMILY = "eff_longformer"
FORM = pytest.mark.parametrize("form", FORMS[FAMILY])


@FORM
@torch.no_grad()
def test_the_cache_is_bounded_by_each_layers_window(form: str) -> None:
    model = build(FAMILY, form)
    inputs = inputs_of(form, [LENGTH, LENGTH])
    _, past = in_chunks(model, inputs, [10] + [1] * (LENGTH - 10))
    config = model.config
    for number, layer in enumerate(past.layers):
        dilation = config.dilation_of(number)
        reach = config.window_of(number) // 2 * max(dilation if isinstance(dilation, list) else [dilation])
        assert layer.keys.shape[2] == layer.values.shape[2] == reach
        held = 0 if layer.prefix is None else layer.prefix.valid.shape[2]
        assert held == (3 if "prefix" in form else 0)


@FORM
@torch.no_grad()
def test_every_part_of_the_cache_changes_places(form: str) -> None:
    model = build(FAMILY, form)
    inputs = inputs_of(form, [LENGTH, 30, 20])
    first = {name: x[:, :22] for name, x in inputs.items()}
    past, again = model(**first).past_key_values, model(**first).past_key_values
    past.reorder_cache(torch.tensor([2, 0, 0]))
    again.batch_repeat_interleave(2)
    again.batch_select_indices(torch.tensor([4, 1, 0]))
    for layer, right in zip(again.layers, past.layers, strict=True):
        assert layer.keys.shape[0] == 3
        if layer.prefix is not None:
            assert torch.equal(layer.prefix.valid, right.prefix.valid)
            torch.testing.assert_close(layer.prefix.key, right.prefix.key)


@torch.no_grad()
def test_a_smaller_model_may_draft() -> None:
    """Assisted generation rolls the cache back, beyond the window too."""
    model, draft = build(FAMILY), build(FAMILY, num_hidden_layers=1, attention_window=8)
    ids = random_ids(1, LENGTH)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), model.generate(ids, **options))


@torch.no_grad()
def test_a_cache_that_keeps_everything_gives_the_same() -> None:
    model = build(FAMILY)
    inputs = inputs_of("plain", [LENGTH, 20])
    past = DynamicCache()
    pieces = []
    for start in (0, 20):
        masks = inputs["attention_mask"][:, : start + 20]
        pieces.append(model(inputs["input_ids"][:, start : start + 20], masks, past_key_values=past).logits)
    seen = inputs["attention_mask"].bool()
    whole = model(**inputs).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1)[seen], whole[seen], rtol=1e-4, atol=2e-4)


def test_wrong_use_of_a_prefix_is_refused() -> None:
    plain, prefix = build(FAMILY), build(FAMILY, "prefix")
    ids = random_ids(2, 12)
    past = prefix(ids).past_key_values
    inner, one = torch.zeros_like(ids), torch.ones_like(ids[:, :1])
    inner[0, 3] = 1
    refused = {
        "causal_global='prefix'": lambda: plain(ids, global_attention_mask=torch.ones_like(ids)),
        "mark the first ones": lambda: prefix(ids, global_attention_mask=inner),
        "mark the first": lambda: prefix(ids[:, :1], global_attention_mask=one, past_key_values=past),
        "no place for global tokens": lambda: prefix(
            ids, global_attention_mask=(ids * 0 + 1), past_key_values=DynamicCache()
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()


@torch.no_grad()
def test_a_cache_is_cropped_down_to_its_prefix() -> None:
    """Where padding comes first, the prefix ends later."""
    model = build(FAMILY, "prefix")
    ids, keep = random_ids(2, 10), mask_of([10, 3], 10, "left")
    is_global = ((keep.cumsum(1) <= 2) & keep.bool()).long()
    caches = []
    for _ in range(2):
        caches.append(model.make_cache())
        caches[-1].activate_past_recording()
        model(ids, keep, global_attention_mask=is_global, past_key_values=caches[-1])
    with pytest.raises(ValueError, match="leaves 8 tokens, but the first 9"):
        caches[0].crop(-2)
    assert caches[0].get_seq_length() == 10, "what is refused changes nothing"
    caches[1].crop(-1)
    again = model(ids[:, 9:], keep, past_key_values=caches[1]).logits
    torch.testing.assert_close(
        again, model(ids, keep, global_attention_mask=is_global).logits[:, 9:], rtol=1e-4, atol=2e-4
    )


@torch.no_grad()
def test_compiled_steps_make_no_room_for_tokens_that_are_not_global() -> None:
    model = build(FAMILY, "prefix", global_attention="cls")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, past = random_ids(2, 12), None
    for start, stop in ((0, 9), (9, 10), (10, 11)):
        past = compiled(ids[:, start:stop], past_key_values=past).past_key_values
    assert all(layer.prefix.valid.shape[2] == 1 for layer in past.layers)
    logits = compiled(ids[:, 11:], past_key_values=past).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 11:], rtol=1e-4, atol=2e-4)


def test_wrong_use_leaves_a_cache_usable() -> None:
    prefix = build(FAMILY, "prefix")
    ids = random_ids(2, 12)
    past = prefix(ids).past_key_values
    with pytest.raises(ValueError, match="mark the first"):
        prefix(ids[:, :1], global_attention_mask=torch.ones_like(ids[:, :1]), past_key_values=past)
    # What is refused changes nothing: the cache still goes on.
    torch.testing.assert_close(
        prefix(ids[:, :1], past_key_values=past).logits,
        prefix(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:],
        rtol=1e-4,
        atol=2e-4,
    )


def test_the_first_token_as_prefix_by_rule() -> None:
    """`global_attention="cls"` in a causal model: the first token, wherever padding stands and chunks begin."""
    by_rule = build(FAMILY, "prefix", global_attention="cls")
    by_mask = build(FAMILY, "prefix")
    inputs = inputs_of("plain", [LENGTH, 20])
    first = (inputs["attention_mask"].cumsum(1) == 1).long() * inputs["attention_mask"]
    with torch.no_grad():
        right = by_mask(**inputs, global_attention_mask=first).logits
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(by_rule(**inputs).logits[seen], right[seen], rtol=1e-5, atol=1e-5)
        for sizes in ([25, 15], [10, 30], [1] * LENGTH):
            logits, past = in_chunks(by_rule, inputs, sizes)
            assert all(layer.prefix.valid.shape[2] <= 2 for layer in past.layers), "no slot for later tokens"
            torch.testing.assert_close(logits[seen], right[seen], rtol=1e-4, atol=2e-4)
        plain = build(FAMILY)(**inputs).logits
    assert not torch.allclose(plain[seen], right[seen], atol=1e-3)
