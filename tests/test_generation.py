"""Laws of every causal model: step by step is all at once, its cache is bounded, and `generate()` does as it should."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from causal_models import AUTO, FAMILY, FORM, LENGTH, SORTS, at_once, build, in_chunks, inputs_of
from frame_family import FrameConfig
from helpers import mask_of, model_class, no_warnings, random_ids, randomise_, tiny_config, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, StaticCache, pipeline


@FORM
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "sizes", [[1] * LENGTH, [2, 1, 5, 13, 13, 6], [LENGTH], [25, 15]], ids=["1", "mixed", "all", "2"]
)
@torch.no_grad()
def test_step_by_step_is_all_at_once(family: str, form: str, backend: str, sizes: list[int]) -> None:
    """Also with padding on the left, which prefixes of global tokens and chunks straddle."""
    model = build(family, form, attn_implementation=backend)
    inputs = inputs_of(form, [LENGTH, 33, 12])
    assert model(**inputs, use_cache=False).past_key_values is None
    logits, past = in_chunks(model, inputs, sizes)
    seen = inputs["attention_mask"].bool()
    whole = at_once(model, inputs, sizes if (family, form) in SORTS else [LENGTH])
    torch.testing.assert_close(logits[seen], whole[seen], rtol=1e-4, atol=2e-4)
    assert past.get_seq_length() == LENGTH


@FORM
@torch.no_grad()
def test_long_chunks_after_a_cache(family: str, form: str) -> None:
    """More than a few rows over cached keys take another way through the formula."""
    model = build(family, form, max_position_embeddings=300)
    ids = random_ids(2, 250)
    inputs = {"input_ids": ids, "attention_mask": mask_of([250, 190], 250, "left")}
    if "prefix" in form:
        inputs["global_attention_mask"] = (inputs["attention_mask"].cumsum(1) == 1).long() * inputs["attention_mask"]
    sizes = [30, 130, 90]
    logits, _ = in_chunks(model, inputs, sizes)
    seen = inputs["attention_mask"].bool()
    whole = at_once(model, inputs, sizes if (family, form) in SORTS else [250])
    torch.testing.assert_close(logits[seen], whole[seen], rtol=1e-4, atol=2e-4)


@FORM
@torch.no_grad()
def test_without_masks_every_token_counts(family: str, form: str) -> None:
    model = build(family, form)
    ids = random_ids(2, LENGTH)
    ids[:, 11] = model.config.pad_token_id  # an id like any other
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pieces, start, past = [], 0, None
    sizes = [7, 1, 32]
    for size in sizes:
        outputs = model(ids[:, start : start + size], past_key_values=past)
        start, past = start + size, outputs.past_key_values
        pieces.append(outputs.logits)
    whole = at_once(model, inputs, sizes if (family, form) in SORTS else [LENGTH])
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(model(ids).logits, model(**inputs).logits, rtol=0, atol=1e-6)


@FORM
def test_no_token_depends_on_a_later_one(family: str, form: str) -> None:
    model = build(family, form)
    inputs = inputs_of(form, [LENGTH, 25], "right")
    other = dict(
        inputs, input_ids=torch.where(torch.arange(LENGTH) > 20, 63 - inputs["input_ids"], inputs["input_ids"])
    )
    with torch.no_grad():
        a, b = model(**inputs).logits, model(**other).logits
    if (family, form) not in SORTS:
        assert torch.equal(a[:, :21], b[:, :21])
    assert not torch.equal(a[0, 21:], b[0, 21:])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embedded, **inputs).logits[0, 20].sum().backward()
    assert (embedded.grad[0, 21:] == 0).all()
    assert (embedded.grad[0, 20] != 0).any()


@FORM
@torch.no_grad()
def test_beams_may_change_places(family: str, form: str) -> None:
    model = build(family, form)
    inputs = inputs_of(form, [LENGTH, 30, 20])
    order = torch.tensor([2, 0, 0])
    first = {name: x[:, :22] for name, x in inputs.items()}
    past, again = model(**first).past_key_values, model(**first).past_key_values
    past.reorder_cache(order)
    again.batch_repeat_interleave(2)
    again.batch_select_indices(torch.tensor([4, 1, 0]))  # the same examples, of which each is there twice
    moved = {name: x[order] for name, x in inputs.items()}
    whole = model(**moved).logits[:, 22:]
    for cache in (past, again):
        step = model(moved["input_ids"][:, 22:], moved["attention_mask"], past_key_values=cache).logits
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=2e-4)
    again.reset()
    assert again.get_seq_length() == 0
    torch.testing.assert_close(model(**first, past_key_values=again).logits, model(**first).logits, rtol=0, atol=1e-6)


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 2.0},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@FORM
@pytest.mark.parametrize("way", GENERATION)
def test_generates_the_same_with_cache_without_and_in_chunks(family: str, form: str, way: str) -> None:
    model = build(family, form)
    inputs = inputs_of(form, [LENGTH, 33, 12])
    options = {"max_new_tokens": 25, "min_new_tokens": 25, **GENERATION[way]}
    texts = []
    with no_warnings():
        for extra in ({}, {"use_cache": False}, {"prefill_chunk_size": 9}):
            torch.manual_seed(3)
            texts.append(model.generate(**inputs, **options, **extra))
    assert texts[0].shape[1] == LENGTH + 25
    assert len({tuple(row.tolist()) for row in texts[0][:, LENGTH:]}) > 1
    for other in texts[1:]:
        assert torch.equal(other, texts[0])


@FORM
@torch.no_grad()
def test_greedy_takes_the_likeliest_token_and_alone_is_batched(family: str, form: str) -> None:
    model = build(family, form)
    lengths = [LENGTH, 33, 12]
    inputs = inputs_of(form, lengths)
    found = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    for row, length in enumerate(lengths):
        own = {name: x[row : row + 1, LENGTH - length :] for name, x in inputs.items()}
        alone = own["input_ids"]
        for _ in range(20):
            extra = alone.shape[1] - length
            masks = {name: torch.nn.functional.pad(x, (0, extra)) for name, x in own.items() if "global" in name}
            scores = model(alone, **masks, use_cache=False).logits[:, -1]
            if model.config.eos_token_id is not None:
                scores[:, model.config.eos_token_id] = -torch.inf
            alone = torch.cat([alone, scores.argmax(dim=-1, keepdim=True)], dim=1)
        assert torch.equal(found[row, LENGTH - length :], alone[0])


@FAMILY
@torch.no_grad()
def test_goes_on_from_a_cache_and_from_embeddings(family: str) -> None:
    model = build(family)
    ids = random_ids(1, 20)
    whole = model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    past = model(ids[:, :12]).past_key_values
    again = model.generate(ids, past_key_values=past, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert torch.equal(again, whole)
    embedded = model.get_input_embeddings()(ids)
    from_embeddings = model.generate(inputs_embeds=embedded, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert torch.equal(from_embeddings, whole[:, 20:])


@FAMILY
def test_the_loss_is_about_the_next_token(family: str) -> None:
    model = build(family).train()
    inputs = inputs_of("plain", [LENGTH, 21], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    outputs = model(**inputs, labels=labels)
    chances = outputs.logits.log_softmax(dim=-1)
    chosen = [chances[0, i, labels[0, i + 1]] for i in range(LENGTH - 1)]
    chosen += [chances[1, i, labels[1, i + 1]] for i in range(20)]
    torch.testing.assert_close(outputs.loss, -torch.stack(chosen).mean())
    accumulated = model(**inputs, labels=labels, num_items_in_batch=100).loss
    torch.testing.assert_close(accumulated, -torch.stack(chosen).sum() / 100)
    assert outputs.past_key_values is None, "nothing goes on from a training step"
    single = model(inputs["input_ids"][:, :1], labels=labels[:, :1]).loss
    assert single == 0 and single.requires_grad


@FAMILY
@torch.no_grad()
def test_logits_to_keep(family: str) -> None:
    model = build(family)
    inputs = inputs_of("plain", [LENGTH, LENGTH])
    whole = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])


@FAMILY
def test_what_is_saved_says_that_it_is_causal(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    model = randomise_(model_class(family, AUTO)(config))
    assert model.config.is_decoder and not config.is_decoder, "the caller's config stays as it was"
    assert AutoModelForCausalLM.from_config(config).config.is_decoder
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 30)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again) is type(model)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert base.config.is_decoder
        states = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(base(ids).last_hidden_state, states, rtol=0, atol=1e-6)
        encoder = AutoModel.from_pretrained(tmp_path, is_decoder=False).eval()
        assert not torch.allclose(encoder(ids).last_hidden_state, states)
    with pytest.raises(ValueError, match="is_decoder = True.*is_decoder=False"):
        model_class(family, "AutoModelForMaskedLM").from_pretrained(tmp_path)
    model_class(family, "AutoModelForMaskedLM").from_pretrained(tmp_path, is_decoder=False)


@FAMILY
def test_text_generation_pipeline(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    build(family, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # The pipeline of 5.17 warns about what it does itself, with any model.
    with no_warnings() if transformers.__version__ >= "5.23" else nullcontext():
        generator = pipeline("text-generation", model=str(tmp_path))
        prompts = ["the quick", "a window of attention and the dog"]
        texts = generator(prompts, max_new_tokens=12, batch_size=2, add_special_tokens=False)
        sampled = generator("the quick", max_new_tokens=12, do_sample=True, num_return_sequences=2)
    assert [text[0]["generated_text"][:9] for text in texts] == ["the quick", "a window "]
    assert len(sampled) == 2


@FAMILY
def test_wrong_use_is_refused(family: str) -> None:
    model = build(family)
    ids, limit = random_ids(2, 12), model.config.max_input_length
    past = model(ids).past_key_values
    refused = {
        "make_cache": lambda: model(ids, past_key_values=((ids, ids),)),
        r"\[2, 13\]": lambda: model(ids[:, :1], ids[:, :1] * 0 + 1, past_key_values=past),
        "132 tokens, 12 of them in the cache.*max_new_tokens": lambda: model(random_ids(2, 120), past_key_values=past),
        "StaticCache.*make_cache": lambda: model(ids, past_key_values=StaticCache(model.config, max_cache_len=20)),
        f"may become 132 tokens.*{limit}.*lower max_new_tokens or max_length by {131 - limit}": lambda: model.generate(
            ids, max_new_tokens=120
        ),
        "logits_to_keep": lambda: model(ids, labels=ids, logits_to_keep=1),
        "logits_to_keep = -3": lambda: model(ids, logits_to_keep=-3),
        "past_key_values": lambda: model(ids, labels=ids, past_key_values=model(ids).past_key_values),
        "cache_implementation = 'static'": lambda: model.generate(ids, cache_implementation="static", max_new_tokens=2),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    # What is refused changes nothing: the cache still goes on.
    step = model(ids[:, :1], past_key_values=past).logits
    whole = model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=2e-4)


def test_a_family_without_causal_form_says_so() -> None:
    with pytest.raises(ValueError, match="is_decoder = True.*no causal form.*leave it False"):
        FrameConfig(is_decoder=True)
