"""Mechanisms inside decoders: no look ahead, step by step as all at once, `generate()`, and what has no causal form."""

import pytest
import torch
from helpers import mask_of, random_ids
from inside_cases import MODELS, PAIRS, SMALL, implementation
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_efficient_attn import use_efficient_attention
from hf_efficient_attn.integrations.mechanisms import MECHANISMS
from hf_efficient_attn.integrations.options import FIELD


CAUSAL = [name for name, row in MECHANISMS.items() if row.why_not_causal is None]
EVERY_DECODER = pytest.mark.parametrize(
    ("model_name", "name"), [(model, name) for model, name in PAIRS if MODELS[model].is_causal]
)


def build(model_name: str, name: str, **overrides: object) -> PreTrainedModel:
    model = MODELS[model_name].build(**overrides)
    return use_efficient_attention(model, name, **SMALL[name])


def positions(mask: Tensor) -> Tensor:
    """As `generate()` makes them."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@EVERY_DECODER
@torch.no_grad()
def test_no_token_sees_a_later_one(model_name: str, name: str) -> None:
    model = build(model_name, name)
    ids = random_ids(2, 30)
    right = model(ids).logits
    for place in (1, 13, 29):
        other = ids.clone()
        other[:, place:] = random_ids(2, 30 - place, seed=9)
        ours = model(other).logits
        torch.testing.assert_close(ours[:, :place], right[:, :place], rtol=0, atol=1e-5)
        assert not torch.allclose(ours[:, place], right[:, place], atol=1e-3)


@EVERY_DECODER
@pytest.mark.parametrize("steps", [[1] * 25, [9, 1, 1, 7, 1, 6], [20, 5]])
@torch.no_grad()
def test_step_by_step_is_all_at_once(model_name: str, name: str, steps: list[int]) -> None:
    """With padding on the left."""
    model = build(model_name, name)
    ids, mask = random_ids(2, 25), mask_of([25, 17], 25, "left")
    right = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
    cache, ours, seen = DynamicCache(config=model.config), [], 0
    for step in steps:
        end = seen + step
        inputs = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, seen:end]}
        ours.append(model(ids[:, seen:end], past_key_values=cache, **inputs).logits)
        seen = end
    rows = mask.bool()
    torch.testing.assert_close(torch.cat(ours, dim=1)[rows], right[rows], rtol=0, atol=2e-5)


@EVERY_DECODER
@torch.no_grad()
def test_generates_the_same_with_and_without_a_cache(model_name: str, name: str) -> None:
    model = build(model_name, name)
    ids, mask = random_ids(3, 14), mask_of([14, 3, 9], 14, "left")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours = model.generate(ids, **options)
    assert torch.equal(ours, model.generate(ids, use_cache=False, **options))
    alone = model.generate(ids[1:2, 11:], **{**options, "attention_mask": mask[1:2, 11:]})
    assert torch.equal(ours[1, 11:], alone[0])
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        model.generate(ids, **options, **beams), model.generate(ids, use_cache=False, **options, **beams)
    )


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_window_of_the_model_is_kept(name: str) -> None:
    """Mistral's, in one call and through its own cache, which forgets what is behind the window."""
    model = MODELS["Mistral"].build(sliding_window=6)
    ids, mask = random_ids(2, 22), mask_of([22, 15], 22, "left")
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    right, text = model(ids, attention_mask=mask).logits, model.generate(ids, **options)
    use_efficient_attention(model, name, **SMALL[name])
    ours = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], right[mask.bool()], rtol=0, atol=1e-5)
    assert torch.equal(model.generate(ids, **options), text)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_in_tree_bert_as_a_decoder(name: str) -> None:
    model = MODELS["Bert"].build(is_decoder=True)
    use_efficient_attention(model, name, **SMALL[name])
    ids = random_ids(1, 20)
    right = model(ids)[0]
    other = ids.clone()
    other[:, 15:] = 7
    torch.testing.assert_close(model(other)[0][:, :15], right[:, :15], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MECHANISMS if name not in CAUSAL])
def test_what_has_no_causal_form_raises(name: str) -> None:
    model = MODELS["Llama"].build()
    ids = random_ids(1, 9)
    before = model(ids).logits
    with pytest.raises(ValueError, match=f"{name} has no causal form, which LlamaAttention needs.*eff:sliding_window"):
        use_efficient_attention(model, name)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, FIELD)
    assert torch.equal(model(ids).logits, before)
    model.set_attn_implementation(implementation(name))
    with pytest.raises(ValueError, match="has no causal form"):
        model(ids)


@EVERY_DECODER
def test_patterns_of_the_model_raise(model_name: str, name: str) -> None:
    """Packed examples, masks of four dimensions, caches with empty places."""
    model = build(model_name, name)
    ids = random_ids(1, 12)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with pytest.raises(ValueError, match="packed examples"):
        model(ids, position_ids=packed, use_cache=False)
    model(ids, position_ids=torch.arange(12)[None], use_cache=False)
    with pytest.raises(ValueError, match=r"mask of keys \[batch, length\], got one of shape \[1, 1, 12, 12\]"):
        model(ids, attention_mask=torch.ones(1, 1, 12, 12, dtype=torch.bool))
    cache = StaticCache(config=model.config, max_cache_len=40)
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="no attention weights"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize("name", CAUSAL)
def test_training_a_decoder(name: str) -> None:
    model = build("Llama", name).train()
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key
