"""A single token behind a cache of LSH attention: from first and last tokens of buckets, as if from all of them."""

from typing import Any

import pytest
import torch
from causal_models import build
from helpers import model_class, random_ids, tiny_config
from torch import Tensor
from transformers.cache_utils import Cache

from hf_efficient_attn.attention.lsh_cache import LSHCacheLayer
from hf_efficient_attn.attention.lsh_index import BucketIndex
from hf_efficient_attn.bench.generation import cache_bytes
from hf_efficient_attn.functional import chunk_step, dense_chunk_attention


HEADS, WIDTH = 2, 4
SHAPES = [(3, 1), (4, 0), (2, 3), (1, 2)]  # chunk length, chunks before


def tensors(rounds: int, length: int, skewed: bool) -> tuple[list[Tensor], Tensor, Tensor, int]:
    """Queries, keys and values; buckets; a mask with padding in front, among and behind; room for buckets."""
    generator = torch.Generator().manual_seed(rounds * 1000 + length)
    room = 6
    qkv = [torch.randn(3, HEADS, length, WIDTH, generator=generator, dtype=torch.float64) for _ in range(3)]
    buckets = torch.randint(0, room, (3, HEADS, rounds, length), generator=generator)
    if skewed:  # nearly all in two buckets
        buckets = torch.where(torch.rand(buckets.shape, generator=generator) < 0.9, buckets % 2 * 4, buckets)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, : length // 3] = False
    mask[2, 1::4] = False
    return qkv, buckets, mask, room


@pytest.mark.parametrize("released", [True, False], ids=["released", "paper"])
@pytest.mark.parametrize(("chunk_length", "chunks_before"), SHAPES)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
def test_each_token_is_the_last_row_of_what_there_is(
    rounds: int, chunk_length: int, chunks_before: int, released: bool, skewed: bool
) -> None:
    length, start = 45, 5
    (query, key, value), buckets, mask, room = tensors(rounds, length, skewed)
    chunks = {"chunk_length": chunk_length, "chunks_before": chunks_before, "released": released}
    index = BucketIndex(buckets[..., :start], mask[:, :start], room=room, **chunks)
    for now in range(start, length):
        index.add(buckets[..., now], mask[:, : now + 1])
        found = index.candidates(buckets[..., now])
        some = [x[:, :, : now + 1] for x in (key, value)]
        step = chunk_step(query[:, :, now : now + 1], *some, mask[:, now : now + 1], *found)
        right, _ = dense_chunk_attention(
            query[:, :, now : now + 1],
            *some,
            mask[:, : now + 1],
            buckets=buckets[..., : now + 1],
            chunks_after=0,
            causal=True,
            exclude_self=True,
            **chunks,
        )
        torch.testing.assert_close(step, right, rtol=0, atol=1e-12, msg=lambda m: f"token {now}: {m}")  # noqa: B023
        assert not step[~mask[:, now]].any()


@pytest.mark.parametrize("with_mask", [True, False])
def test_an_index_made_at_once_is_the_one_that_grew(with_mask: bool) -> None:
    _, buckets, mask, room = tensors(2, 40, False)
    mask = mask if with_mask else None
    chunks = {"room": room, "chunk_length": 3, "chunks_before": 1, "released": True}
    grown = BucketIndex(buckets[..., :1], None if mask is None else mask[:, :1], **chunks)
    for now in range(1, 40):
        grown.add(buckets[..., now], None if mask is None else mask[:, : now + 1])
    whole = BucketIndex(buckets, mask, **chunks)
    assert torch.equal(grown.counts, whole.counts)
    a, b = grown.candidates(buckets[..., -1]), whole.candidates(buckets[..., -1])
    assert torch.equal(a.allowed, b.allowed)
    assert torch.equal(torch.where(a.allowed, a.tokens, -1), torch.where(b.allowed, b.tokens, -1))


def test_what_a_step_looks_at_does_not_grow() -> None:
    chunks = {"room": 4, "chunk_length": 8, "chunks_before": 1, "released": True}
    seen = set()
    for length in (64, 4096):
        buckets = torch.randint(0, 4, (1, 1, 2, length))
        index = BucketIndex(buckets, None, **chunks)
        seen.add((index.first.shape, index.last.shape, index.candidates(buckets[..., -1]).tokens.shape))
    assert len(seen) == 1


def steps(model: torch.nn.Module, ids: Tensor, cache: Cache) -> Tensor:
    logits = []
    for now in range(ids.shape[1]):
        outputs = model(input_ids=ids[:, now : now + 1], past_key_values=cache)
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def cached(model: torch.nn.Module, ids: Tensor) -> Cache:
    return model(input_ids=ids).past_key_values


@torch.no_grad()
def test_memory_grows_by_a_quarter_and_keeps_what_it_had() -> None:
    model, ids = build("eff_reformer", "plain").eval(), random_ids(2, 40)
    cache = cached(model, ids[:, :9])
    (layer,) = (x for x in cache.layers if isinstance(x, LSHCacheLayer))
    places = set()
    for now in range(9, 40):
        before = layer.keys.clone()
        model(input_ids=ids[:, now : now + 1], past_key_values=cache)
        assert layer.keys.shape[2] == now + 1 and torch.equal(layer.keys[:, :, :now], before)
        places.add(layer.keys.data_ptr())
    assert len(places) < 12, "not every token copies the cache"
    assert layer.keys.untyped_storage().nbytes() <= 1.3 * layer.keys.numel() * 4


@torch.no_grad()
def test_what_happens_to_a_cache_happens_to_its_index() -> None:
    """Beams that change places, examples repeated and chosen, tokens taken back: as without an index."""
    model = build("eff_reformer", "plain", attn_layers=["lsh"], num_hidden_layers=1).eval()
    ids = random_ids(4, 30)
    more = random_ids(4, 6, seed=1)

    def run(change: callable, texts: Tensor) -> None:
        cache = cached(model, ids[:, :20])
        steps(model, ids[:, 20:], cache)
        change(cache)
        found = steps(model, more[: texts.shape[0]], cache)
        fresh = cached(model, texts)
        torch.testing.assert_close(found, steps(model, more[: texts.shape[0]], fresh), rtol=0, atol=1e-5)

    order = torch.tensor([2, 0, 0, 3])
    run(lambda cache: cache.reorder_cache(order), ids[order])
    run(lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), ids[[3, 1]])
    run(lambda cache: cache.crop(-7), ids[:, :23])
    cache = cached(model, ids[:2, :20])
    steps(model, ids[:2, 20:], cache)
    cache.batch_repeat_interleave(2)
    again = cached(model, ids[[0, 0, 1, 1]])
    torch.testing.assert_close(steps(model, more, cache), steps(model, more, again), rtol=0, atol=1e-5)


def lsh_layer(cache: Cache) -> LSHCacheLayer:
    (layer,) = (x for x in cache.layers if isinstance(x, LSHCacheLayer))
    return layer


def eager(model: torch.nn.Module, ids: Tensor, cache: Cache) -> None:
    model.set_attn_implementation("eager")
    steps(model, ids, cache)
    model.set_attn_implementation("sdpa")


def dropping(model: torch.nn.Module, ids: Tensor, cache: Cache) -> None:
    model.train()
    for layer in model.modules():
        if hasattr(layer, "dropout_p"):
            layer.dropout_p = 0.5
    steps(model, ids, cache)
    model.eval()


def compiled(model: torch.nn.Module, ids: Tensor, cache: Cache) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        steps(model, ids, cache)


def several(model: torch.nn.Module, ids: Tensor, cache: Cache) -> None:
    model(input_ids=ids, past_key_values=cache)


@pytest.mark.parametrize("between", [eager, dropping, compiled, several])
@torch.no_grad()
def test_tokens_that_no_index_has_seen_are_found(between: callable) -> None:
    """Other ways to go on put tokens into the cache alone: an index from before does not do any more."""
    model = build("eff_reformer", "plain", attn_layers=["lsh"], num_hidden_layers=1).eval()
    ids = random_ids(2, 60)
    cache = cached(model, ids[:, :30])
    steps(model, ids[:, 30:35], cache)
    assert lsh_layer(cache)._index is not None
    between(model, ids[:, 35:45], cache)
    found = steps(model, ids[:, 45:], cache)
    # The same cache without an index from before, but for the last token.
    fresh = cached(model, ids[:, :59]) if between is not dropping else None
    if fresh is not None:
        torch.testing.assert_close(found[:, -1:], steps(model, ids[:, 59:], fresh), rtol=0, atol=1e-5)
    index = lsh_layer(cache)._index
    whole = BucketIndex(
        lsh_layer(cache).buckets, None, room=index.room, chunk_length=index.chunk_length, chunks_before=1, released=True
    )
    assert torch.equal(index.counts, whole.counts)


@torch.no_grad()
def test_a_mask_that_changes_its_mind_about_earlier_tokens_is_heard() -> None:
    model = build("eff_reformer", "plain", attn_layers=["lsh"], num_hidden_layers=1).eval()
    ids, mask = random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    cache = cached(model, ids[:, :30])
    steps(model, ids[:, 30:39], cache)
    mask[0, 33:36] = 0
    found = model(input_ids=ids[:, 39:], attention_mask=mask, past_key_values=cache).logits
    model.set_attn_implementation("eager")
    cache = cached(model, ids[:, :30])
    steps(model, ids[:, 30:39], cache)
    right = model(input_ids=ids[:, 39:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_buckets", "prompt"), [(None, 20), (None, 700), ([16, 32], 40), (64, 900)])
@torch.no_grad()
def test_an_index_takes_little_beside_keys_and_values(num_buckets: Any, prompt: int) -> None:
    """Whatever a config has room for: by the buckets of the text, or none where those are many for its length."""
    config = tiny_config(
        "eff_reformer", num_buckets=num_buckets, max_position_embeddings=65536, axial_pos_shape=[256, 256]
    )
    model = model_class("eff_reformer", "AutoModelForCausalLM")(config).eval()
    cache = cached(model, random_ids(1, prompt))
    layer = lsh_layer(cache)
    alone = cache_bytes(cache)
    steps(model, random_ids(1, 3), cache)
    index, tokens = layer._index, layer.keys.shape[2]
    assert (index is None) == (num_buckets == [16, 32])
    if index is not None:
        numbers = index.first.numel() + index.last.numel()
        assert numbers <= 8 * tokens * index.counts[..., 0].numel()
    assert cache_bytes(cache) < 1.6 * alone + 100_000


def test_a_cache_made_in_inference_mode_goes_on_outside() -> None:
    model, ids = build("eff_reformer", "plain").eval(), random_ids(2, 30)
    with torch.inference_mode():
        cache = cached(model, ids[:, :20])
        steps(model, ids[:, 20:25], cache)
    with torch.no_grad():
        found = steps(model, ids[:, 25:], cache)
        right = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(found[:, -1], right, rtol=0, atol=1e-5)


def test_gradients_flow_through_a_cache() -> None:
    model, ids = build("eff_reformer", "plain").eval(), random_ids(2, 24)
    cache = cached(model, ids[:, :20])
    steps(model, ids[:, 20:], cache)[:, -1].square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
