"""EffReformer's hashing, cache and positions as its models use them; and the byte-level tokenizer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import mask_of, model_class, no_warnings, random_ids, randomise_, tiny_config
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_efficient_attn import EffReformerForMaskedLM, EffReformerForSequenceClassification, RedrawRotations
from hf_efficient_attn.attention import lsh
from hf_efficient_attn.attention.lsh import lsh_layers
from hf_efficient_attn.tokenization import BYTE_VOCAB_SIZE, byte_tokenizer


FAMILY = "eff_reformer"
CAUSAL = "AutoModelForCausalLM"
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


def build(auto: str = "AutoModel", **overrides: Any) -> PreTrainedModel:
    return randomise_(model_class(FAMILY, auto)(tiny_config(FAMILY, **overrides))).double()


# Mechanism: directions and buckets.


@torch.no_grad()
def test_directions_are_a_function_of_seed_and_redraw() -> None:
    ids = random_ids(2, 60)
    first, again, other = (build(hash_seed=seed, attn_layers=["lsh"]) for seed in (3, 3, 4))
    state = torch.get_rng_state()
    right = first(ids).last_hidden_state
    assert torch.equal(first(ids).last_hidden_state, right) and torch.equal(again(ids).last_hidden_state, right)
    assert not torch.allclose(other(ids).last_hidden_state, right)
    again.redraw_rotations_(2)
    assert not torch.allclose(again(ids).last_hidden_state, right)
    again.redraw_rotations_(0)
    assert torch.equal(again(ids).last_hidden_state, right)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_layers_and_rounds_hash_differently(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, right = [], lsh.hash_rotations
    monkeypatch.setattr(lsh, "hash_rotations", lambda *a, **k: drawn.append(right(*a, **k)) or drawn[-1])
    build(attn_layers=["lsh"], num_hidden_layers=3, is_decoder=causal)(random_ids(2, 60), use_cache=False)
    rounds = [rotations[:, :, index] for rotations in drawn for index in range(2)]
    assert len(rounds) == 6
    assert len({tuple(x.flatten().tolist()) for x in rounds}) == 6


@pytest.mark.parametrize(("layers", "given", "kinds"), [(1, None, "l"), (3, None, "lhl"), (3, ["lsh"], "hhh")])
def test_kinds_of_layers(layers: int, given: list[str] | None, kinds: str) -> None:
    options = {} if given is None else {"attn_layers": given}
    model = build(num_hidden_layers=layers, **options)
    found = [isinstance(layer, lsh.LSHSelfAttention) for layer in model.encoder.attentions()]
    assert found == [kind == "h" for kind in kinds]


LENGTHS = [1, 16, 17, 40, 130, 300]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"num_buckets": [2, 4]}, {"chunk_rule": "paper"}], ids=str)
@torch.no_grad()
def test_each_text_has_buckets_of_its_own(options: dict[str, Any], side: str, causal: bool, backend: str) -> None:
    """From one chunk to nineteen in one batch, with a bucket count that goes by the text."""
    options = {**options, "max_position_embeddings": 600, "attn_implementation": backend}
    model = build(is_decoder=causal, attn_layers=["lsh", "local"], **options)
    ids, keep = random_ids(len(LENGTHS), 300), mask_of(LENGTHS, 300, side)
    config = copy.deepcopy(model.config.to_dict())
    batched = model(ids, keep).last_hidden_state
    for row, length in enumerate(LENGTHS):
        own = keep[row].bool()
        alone = model(ids[row : row + 1, own]).last_hidden_state
        assert_close(batched[row, own], alone[0], **CLOSE, msg=lambda text, n=length: f"{n} tokens: {text}")
    assert model.config.to_dict() == config


# (tokens, chunk) -> factors with 600 positions; one has up to 32 buckets with chunks of 16, up to 34 with chunks of 2.
COUNTS = {(1, 16): [1, 1], (16, 16): [1, 1], (17, 16): [2, 1], (47, 16): [4, 1], (64, 16): [8, 1], (500, 16): [32, 1]}
COUNTS |= {(600, 16): [8, 8], (40, 2): [32, 1], (63, 2): [32, 1], (64, 2): [8, 8], (500, 2): [16, 16]}


@pytest.mark.parametrize(("tokens", "chunk"), COUNTS)
def test_bucket_counts(tokens: int, chunk: int) -> None:
    model = build(max_position_embeddings=600, lsh_attn_chunk_length=chunk)
    (layer,) = lsh_layers(model)
    factors, sizes = layer.factors(torch.tensor([tokens, 1]), 600)
    assert factors[0].tolist() == COUNTS[tokens, chunk] and factors[1].prod() == 1
    assert all(int(a) <= b for a, b in zip(factors[0], sizes, strict=True))
    fixed = build(num_buckets=[2, 6], max_position_embeddings=600)
    assert lsh_layers(fixed)[0].factors(torch.tensor([tokens, 1]), 600)[0].tolist() == [[2, 6]]


# Causal: the cache.


@torch.no_grad()
def test_a_generation_keeps_the_buckets_of_its_prompt() -> None:
    """A text grows from three chunks to seven; what it hashes with are the four buckets of the prompt."""
    model, fixed = (build(CAUSAL, num_buckets=count) for count in (None, 4))
    ids = random_ids(2, 35)
    options = {"max_new_tokens": 70, "min_new_tokens": 70, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found, right = (x.generate(ids, **options) for x in (model, fixed))
    assert torch.equal(found.sequences, right.sequences)
    assert_close(torch.stack(found.logits), torch.stack(right.logits))
    layer = found.past_key_values.layers[1]
    assert layer.factors.tolist() == [[4]] and layer.buckets.shape == (2, 4, 2, 104) and layer.buckets.max() == 3
    whole = fixed(found.sequences[:, :-1], use_cache=False).logits[:, -1]
    assert_close(found.logits[-1].to(whole.dtype), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_texts_of_one_batch_keep_their_own_counts() -> None:
    model = build(CAUSAL, attn_layers=["local", "lsh"])
    lengths = [60, 33, 5]
    ids, keep = random_ids(3, 60), mask_of(lengths, 60, "left")
    past = model(ids, keep).past_key_values
    assert past.layers[1].factors.tolist() == [[4], [4], [1]]
    more = random_ids(3, 7, seed=1)
    step = model(more, torch.cat([keep, torch.ones(3, 7).long()], dim=1), past_key_values=past).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 60 - length :]).past_key_values
        assert_close(model(more[row : row + 1], past_key_values=alone).logits[0], step[row], **CLOSE)


def caches(model: PreTrainedModel, ids: Tensor, keep: Tensor) -> Any:
    return model(ids, keep).past_key_values


@pytest.mark.parametrize("buckets", [None, 4])
@torch.no_grad()
def test_caches_are_moved_and_cut(buckets: int | None) -> None:
    model = build(CAUSAL, attn_layers=["lsh"], num_hidden_layers=1, num_buckets=buckets)
    ids, keep = random_ids(3, 60), mask_of([60, 33, 5], 60, "left")
    both = torch.cat([keep, keep.new_ones(3, 1)], dim=1)
    more = random_ids(3, 1, seed=1)
    right = model(more, both, past_key_values=caches(model, ids, keep)).logits

    def step(cache: Any, order: Tensor) -> None:
        assert_close(model(more[order], both[order], past_key_values=cache).logits, right[order], **CLOSE)

    order = torch.tensor([2, 0, 0])
    cache = caches(model, ids, keep)
    cache.reorder_cache(order)
    step(cache, order)
    cache = caches(model, ids, keep)
    cache.batch_repeat_interleave(2)
    step(cache, torch.tensor([0, 0, 1, 1, 2, 2]))
    cache = caches(model, ids, keep)
    cache.batch_select_indices(torch.tensor([1, 2]))
    step(cache, torch.tensor([1, 2]))
    # What was read and is cut off again leaves the prompt's buckets.
    cache = caches(model, ids, keep)
    model(more.expand(-1, 4), torch.cat([both, both[:, -3:]], dim=1), past_key_values=cache)
    layer = cache.layers[0]
    factors = layer.factors.clone()
    layer.crop(-4 if transformers.__version__ >= "5.23" else 60)
    assert layer.buckets.shape[3] == layer.get_seq_length() == 60 and torch.equal(layer.factors, factors)
    step(cache, torch.arange(3))
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.factors is None and layer.buckets is None
    assert_close(model(ids[1:2], past_key_values=cache).logits, model(ids[1:2]).logits, **CLOSE)


def test_caches_of_other_kinds_are_refused() -> None:
    model = build(CAUSAL)
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="DynamicCache without buckets for layer 1.*make_cache"):
        model(ids, past_key_values=transformers.DynamicCache())


# Training: fresh directions.


def make_trainer(folder: Path, *callbacks: Any, steps: int = 6, **overrides: Any) -> Trainer:
    ids = random_ids(24, 60)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()})
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        save_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    options = {"attn_layers": ["lsh"], "hidden_dropout_prob": 0.1, **overrides}
    model = EffReformerForSequenceClassification(tiny_config(FAMILY, **options))
    return Trainer(model=randomise_(model), args=arguments, train_dataset=data, callbacks=list(callbacks))


def test_fresh_directions_in_training_and_after_a_resume(tmp_path: Path) -> None:
    """Six steps in one go, or stopped after three and resumed by another process: the same to the bit."""
    seen: list[tuple[int, int]] = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            counts = {layer.redraws for layer in lsh_layers(model)}
            assert len(counts) == 1
            seen.append((state.global_step, counts.pop()))

    whole = make_trainer(tmp_path / "whole", RedrawRotations(every=2), Watch())
    config = whole.model.config.to_dict()
    whole.train()
    assert seen == [(step, step // 2) for step in range(6)]
    assert {layer.redraws for layer in lsh_layers(whole.model)} == {0}, "as it will be when it is loaded"
    written = {"architectures", "dtype"}  # by transformers when it saves
    assert all(value == config[name] for name, value in whole.model.config.to_dict().items() if name not in written)
    seen.clear()
    resumed = make_trainer(tmp_path / "resumed", RedrawRotations(every=2), Watch())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert seen == [(3, 1), (4, 2), (5, 2)]
    still = make_trainer(tmp_path / "still")
    still.train()
    states = [trainer.model.state_dict() for trainer in (whole, resumed, still)]
    assert all(torch.equal(states[1][name], x) for name, x in states[0].items())
    assert any(not torch.equal(states[2][name], x) for name, x in states[0].items())


def test_redraws_need_a_time_and_lsh_layers(tmp_path: Path) -> None:
    for wrong in (0, 1.5, True, None, "3"):
        with pytest.raises(ValueError, match=f"every = {wrong!r}.*1 or more"):
            RedrawRotations(every=wrong)
    trainer = make_trainer(tmp_path, RedrawRotations(every=1), steps=1, attn_layers=["local"])
    with pytest.raises(ValueError, match="EffReformerForSequenceClassification without LSH layers"):
        trainer.train()


# Positions.


@pytest.mark.parametrize("shape", [[4, 32], [128, 1], [1, 128], [4, 4, 8], [128], [5, 30]])
def test_axial_positions_of_any_length(shape: list[int]) -> None:
    widths = {1: [32], 2: [8, 24], 3: [8, 8, 16]}[len(shape)]
    model = build(axial_pos_shape=shape, axial_pos_embds_dim=widths).train()
    weights = [w.expand(*shape, -1) for w in model.embeddings.position_embeddings.weights]
    table = torch.cat(weights, dim=-1).flatten(0, -2)
    for length in (1, 5, 31, 33, 128):
        found = model.embeddings.position_embeddings(torch.arange(length)[None], 2)
        assert torch.equal(found, table[None, :length])
        model(random_ids(2, length)).last_hidden_state.sum().backward()


def test_axial_dropout_drops_whole_places_of_the_last_axis() -> None:
    model = build(axial_pos_shape=[8, 16], axial_pos_embds_dim=[8, 24], hidden_dropout_prob=0.5).train()
    positions = model.embeddings.position_embeddings
    whole = positions.eval()(torch.arange(128)[None], 3)
    dropped = positions.train()(torch.arange(128)[None], 3)
    ratio = (dropped / whole).view(3, 8, 16, 32)
    assert set(ratio.round(decimals=6).unique().tolist()) == {0.0, 2.0}
    assert (ratio == ratio[:, :1, :, :1]).all(), "rows of the grid and widths go together"
    assert not torch.equal(ratio[0], ratio[1]), "texts do not"
    assert not torch.equal(positions(torch.arange(128)[None], 3), dropped)
    table = build(axial_pos_embds=False, hidden_dropout_prob=0.5).train().embeddings.position_embeddings
    zeros = table(torch.arange(128)[None], 3) == 0
    assert 0.4 < zeros.double().mean() < 0.6 and not torch.equal(zeros[0], zeros[1])


# The head.


@torch.no_grad()
def test_a_resize_keeps_the_heads_bias() -> None:
    model = randomise_(EffReformerForMaskedLM(tiny_config(FAMILY)))
    ids, bias = random_ids(2, 12), model.lm_head.bias.clone()
    right = model(ids).logits
    for size in (80, 70, 66):
        model.resize_token_embeddings(size)
        assert model.lm_head.bias.shape == (size,) and model.lm_head.bias.requires_grad
        assert torch.equal(model.lm_head.bias[:64], bias) and (model.lm_head.bias[64:] == 0).all()
        assert_close(model(ids).logits[..., :64], right)
    model.resize_token_embeddings(40)
    assert torch.equal(model.lm_head.bias, bias[:40])


@torch.no_grad()
def test_logits_in_chunks() -> None:
    ids = random_ids(2, 50)
    for size in (0, 7):
        model = build(CAUSAL, chunk_size_lm_head=size)
        head, states = model.lm_head, model.reformer(ids).last_hidden_state
        assert_close(model(ids).logits, states @ head.decoder.weight.T + head.bias, **CLOSE)


# Bytes.


TEXTS = [
    "",
    "plain text",
    "tabs\tand\nlines\r\n",
    "Zürich, naïve, 東京, 🙂",
    "".join(map(chr, range(1, 300))),
    " two  spaces ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(text: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == BYTE_VOCAB_SIZE == 258
    ids = tokenizer(text).input_ids
    assert ids == [byte + 2 for byte in text.encode()]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    with no_warnings():
        again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids and again.decode(ids) == text and len(again) == 258


def test_batches_of_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(model_max_length=6)
    with no_warnings():
        batch = tokenizer(["abc", "é", "abcdefghi"], padding=True, truncation=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[99, 100, 101, 0, 0, 0], [197, 171, 0, 0, 0, 0], [99 + i for i in range(6)]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2, 6]
    assert tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) == "abc"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("a</s>").input_ids == [99, 1], "the end of a text, where it is written"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 6


def test_a_byte_model_trains_and_generates(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(model_max_length=128)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = model_class(FAMILY, CAUSAL)(tiny_config(FAMILY, vocab_size=len(tokenizer), **ids))
    data = Dataset.from_dict({"text": ["the quick brown fox " * n for n in (1, 2, 3, 5)]})
    data = data.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns=["text"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator, processing_class=tokenizer)
    with no_warnings():
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.7 * losses[0], losses
    trainer.save_model(str(tmp_path / "model"))
    generator = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu")
    (text,) = generator("the quick ", max_new_tokens=20, do_sample=False)
    assert text["generated_text"].startswith("the quick ") and len(text["generated_text"].encode()) > 10
