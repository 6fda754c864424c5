"""Generation with EffPerformer: from a state whose size does not depend on the text."""

import pytest
import torch
from causal_models import FORMS, LENGTH, build, in_chunks, inputs_of
from helpers import random_ids
from transformers import DynamicCache
from transformers.cache_utils import Cache


FAMILY = "eff_performer"
FORM = pytest.mark.parametrize("form", FORMS[FAMILY])


def bytes_of(past: Cache) -> int:
    return sum(x.untyped_storage().nbytes() for layer in past.layers for x in layer.state)


@FORM
@torch.no_grad()
def test_the_cache_does_not_grow(form: str) -> None:
    model = build(FAMILY, form)
    ids = random_ids(2, 120)
    past, sizes = None, []
    for start, stop in ((0, 10), *((step, step + 1) for step in range(10, 100)), (100, 120)):
        past = model(ids[:, start:stop], past_key_values=past).past_key_values
        sizes.append(bytes_of(past))
    assert past.get_seq_length() == 120
    assert len(set(sizes)) == 1
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    numbers = config.num_attention_heads * (config.num_features * (width + 1) + 1)
    assert sizes[0] == config.num_hidden_layers * 2 * numbers * 4


@torch.no_grad()
def test_eager_weights_with_a_cache_are_those_of_the_own_tokens() -> None:
    """What is missing to 1 went to the tokens before."""
    model = build(FAMILY, attn_implementation="eager")
    inputs = inputs_of("plain", [LENGTH, 15])
    whole = model(**inputs, output_attentions=True, use_cache=False).attentions
    _, past = in_chunks(model, {name: x[:, :22] for name, x in inputs.items()}, [22])
    parts = model(
        inputs["input_ids"][:, 22:], inputs["attention_mask"], past_key_values=past, output_attentions=True
    ).attentions
    for part, right in zip(parts, whole, strict=True):
        assert part.shape[2:] == (18, 18)
        torch.testing.assert_close(part, right[:, :, 22:, 22:], rtol=1e-4, atol=1e-5)
        assert (part[0].sum(dim=-1) < 0.999).all()


@torch.no_grad()
def test_half_precision_keeps_an_exact_state() -> None:
    model = build(FAMILY).to(torch.bfloat16)
    ids = random_ids(1, LENGTH)
    logits, past = in_chunks(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [1] * LENGTH)
    assert {x.dtype for layer in past.layers for x in layer.state} == {torch.float32}
    whole = model(ids).logits
    assert (logits - whole).abs().max() <= 0.05 * whole.abs().max()


@torch.no_grad()
def test_what_needs_tokens_back_is_refused() -> None:
    model = build(FAMILY)
    ids = random_ids(1, 12)
    past = model(ids).past_key_values
    right = model(ids[:, :1], past_key_values=model(ids).past_key_values).logits
    with pytest.raises(ValueError, match="stateful"):
        model.generate(ids, assistant_model=build(FAMILY, num_hidden_layers=1), max_new_tokens=5)
    with pytest.raises(ValueError, match=r"crop\(-2\).*state of 12 tokens.*without an assistant"):
        past.crop(-2)
    with pytest.raises(ValueError, match="cannot go back"):
        past.layers[0].crop(1)
    past.crop(0)
    with pytest.raises(ValueError, match=r"DynamicCache without room for a state.*make_cache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="no keys and values.*make_cache"):
        past.update(torch.zeros(1, 4, 1, 8), torch.zeros(1, 4, 1, 8), 0)
    assert torch.equal(model(ids[:, :1], past_key_values=past).logits, right), "what is refused changes nothing"
    other = build("eff_longformer")
    with pytest.raises(ValueError, match="stateful|cannot go back"):
        other.generate(ids, assistant_model=model, max_new_tokens=5, min_new_tokens=5)


@torch.no_grad()
def test_a_cache_of_other_examples_is_refused() -> None:
    model = build(FAMILY)
    past = model(random_ids(1, 9)).past_key_values
    with pytest.raises(ValueError, match="past_key_values is of 1 examples, the input of 2"):
        model(random_ids(2, 3), past_key_values=past)
