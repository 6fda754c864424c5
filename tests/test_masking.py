"""The masking collator: what it chooses, what it shows, and that nothing but the example and the epoch matters."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import no_warnings, tiny_pieces, tiny_tokenizer, tiny_wordpieces
from hypothesis import given, settings
from hypothesis import strategies as st
from masking_tokenizers import KINDS, TEXTS, TOKENIZERS, WORDS, encode, original, valid, with_specials
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, Trainer, TrainingArguments

from hf_efficient_attn import DataCollatorForReplacedTokenDetection as Collator
from hf_efficient_attn import DataCollatorWithGlobalAttention


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
    options=st.fixed_dictionaries(
        {
            "mlm_probability": st.floats(0.01, 0.99),
            "mask_share": st.floats(0, 1),
            "whole_word": st.booleans(),
            "seed": st.integers(),
            "epoch": st.none() | st.integers(0, 1000),
            "pad_to_multiple_of": st.sampled_from([None, 8]),
        }
    ),
)
def test_only_tokens_that_say_something_are_chosen(
    kind: str, texts: list[str], side: str, options: dict[str, Any]
) -> None:
    tokenizer = copy.copy(TOKENIZERS[kind])
    tokenizer.padding_side = side
    features = encode(tokenizer, texts)
    batch = Collator(tokenizer, **options)(features)
    expected = tokenizer.pad(
        features, pad_to_multiple_of=options["pad_to_multiple_of"], return_tensors="pt", return_attention_mask=True
    )
    assert batch.keys() == {*expected, "labels"}
    assert all(column.dtype == torch.long for column in batch.values())
    assert torch.equal(original(batch), expected["input_ids"])
    assert all(torch.equal(batch[name], expected[name]) for name in expected if name != "input_ids")
    chosen = batch["labels"] != -100
    special = torch.isin(expected["input_ids"], torch.tensor(tokenizer.all_special_ids))
    maskable = ~special & batch["attention_mask"].bool()
    assert not (chosen & ~maskable).any()
    changed = batch["input_ids"] != expected["input_ids"]
    assert not (changed & ~chosen).any()
    assert (batch["input_ids"][changed] == tokenizer.mask_token_id).all()
    for count, total in zip(chosen.sum(1).tolist(), maskable.sum(1).tolist(), strict=True):
        wanted = min(total, max(1, round(options["mlm_probability"] * total)))
        assert (count > 0) == (total > 0)
        assert count == wanted or options["whole_word"]


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_every_token_is_chosen_equally_often(probability: float) -> None:
    epochs, total = 4000, 20
    collate = Collator(tiny_tokenizer(), mlm_probability=probability)
    counts, pairs = torch.zeros(total), torch.zeros(total, total)
    for epoch in range(epochs):
        collate.set_epoch(epoch)
        chosen = (collate([{"input_ids": list(range(10, 10 + total))}])["labels"][0] != -100).float()
        counts += chosen
        pairs += chosen[:, None] * chosen
    count = round(probability * total)
    share = count / total
    # Five standard deviations.
    assert (counts / epochs - share).abs().max() < 5 * (share * (1 - share) / epochs) ** 0.5
    share_of_pairs = share * (count - 1) / (total - 1)
    off = pairs[~torch.eye(total, dtype=torch.bool)] / epochs - share_of_pairs
    assert off.abs().max() < 5 * (share_of_pairs / epochs) ** 0.5


@pytest.mark.parametrize("whole_word", [False, True])
def test_the_example_alone_decides(tokenizer: Any, whole_word: bool) -> None:
    features = encode(tokenizer, TEXTS)
    collate = Collator(tokenizer, whole_word=whole_word, mlm_probability=0.4, mask_share=0.7, epoch=3)
    batch = collate(features)
    results = valid(batch, "labels"), valid(batch, "input_ids")
    for row, feature in enumerate(features):
        alone = collate([feature])
        assert [valid(alone, "labels")[0], valid(alone, "input_ids")[0]] == [results[0][row], results[1][row]]
    backwards = collate(features[::-1])
    assert (valid(backwards, "labels")[::-1], valid(backwards, "input_ids")[::-1]) == results

    tokenizer.padding_side = "left"
    left = collate(features)
    assert not torch.equal(left["attention_mask"], batch["attention_mask"])
    assert (valid(left, "labels"), valid(left, "input_ids")) == results

    # Padded beforehand, and as tensors or arrays.
    padded = tokenizer.pad(features, padding="max_length", max_length=90, return_tensors="pt")
    rows = [{name: column[row] for name, column in padded.items()} for row in range(len(TEXTS))]
    again = collate(rows)
    assert (valid(again, "labels"), valid(again, "input_ids")) == results
    assert_equal(collate([{name: column.numpy() for name, column in row.items()} for row in rows]), again)


def test_epochs_seeds_and_the_global_generator(tokenizer: Any) -> None:
    features = encode(tokenizer, TEXTS * 2)
    collate = Collator(tokenizer, epoch=0)
    state, numpy_state = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    first = collate(features)
    assert_equal(collate(features), first)
    assert_equal(Collator(tokenizer, epoch=0)(features), first)
    collate.set_epoch(1)
    assert collate.epoch == 1
    assert not torch.equal(collate(features)["labels"], first["labels"])
    assert not torch.equal(Collator(tokenizer, epoch=0, seed=1)(features)["labels"], first["labels"])
    collate.set_epoch(0)
    assert_equal(collate(features), first)
    assert torch.equal(torch.get_rng_state(), state)

    collate.set_epoch(None)
    assert collate.epoch is None
    torch.manual_seed(5)
    drawn = collate(features)
    assert not torch.equal(collate(features)["labels"], drawn["labels"])
    torch.manual_seed(5)
    assert_equal(collate(features), drawn)
    assert pickle.dumps(np.random.get_state()) == numpy_state


def test_the_choice_is_fixed_for_good() -> None:
    # A change here would give resumed runs other masks.
    batch = Collator(tiny_tokenizer(), epoch=2, seed=7)([{"input_ids": list(range(10, 40))}])
    assert (batch["labels"][0] != -100).nonzero()[:, 0].tolist() == [2, 4, 8, 24]


def test_mask_share() -> None:
    ids = list(range(10, 110))
    for share in (0.0, 0.85, 1.0):
        collate = Collator(tiny_tokenizer(), mlm_probability=0.5, mask_share=share)
        hidden = []
        for epoch in range(40):
            collate.set_epoch(epoch)
            batch = collate([{"input_ids": ids}])
            chosen = batch["labels"] != -100
            assert chosen.sum() == 50
            hidden.append((batch["input_ids"][chosen] == collate.tokenizer.mask_token_id).float().mean())
        deviation = (share * (1 - share) / (50 * 40)) ** 0.5
        assert abs(torch.stack(hidden).mean() - share) <= 5 * deviation


@pytest.mark.parametrize("side", ["left", "right"])
def test_other_columns(side: str) -> None:
    tokenizer = tiny_wordpieces()
    tokenizer.padding_side = side
    features = [
        {
            "input_ids": torch.tensor([2, 5, 6, 7, 3]),
            "token_type_ids": [0, 0, 0, 1, 1],
            "special_tokens_mask": [1, 0, 1, 1, 1],
            "global_attention_mask": [1, 0, 0, 0, 0],
            "position_ids": [0, 1, 2, 3, 4],
        },
        {
            "input_ids": [2, 5, 3],
            "token_type_ids": [0, 0, 0],
            "special_tokens_mask": np.zeros(3, dtype=np.int64),  # [CLS] and [SEP] are special even so
            "global_attention_mask": [1, 1, 1],
            "position_ids": [7, 8, 9],
        },
    ]
    given = copy.deepcopy(features)
    batch = Collator(tokenizer, mlm_probability=0.9, epoch=0)(features)
    assert str(given) == str(features)
    assert batch.keys() == {*features[0], "attention_mask", "labels"} - {"special_tokens_mask"}
    left = side == "left"
    for name, pad in [("input_ids", 0), ("token_type_ids", 0), ("global_attention_mask", 0), ("position_ids", 0)]:
        rows = [list(map(int, feature[name])) for feature in features]
        rows[1] = [pad, pad, *rows[1]] if left else [*rows[1], pad, pad]
        assert (original(batch) if name == "input_ids" else batch[name]).tolist() == rows
    short = [0, 0, 1, 1, 1] if left else [1, 1, 1, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5, short]
    ignored = -100
    second = [ignored] * 3 + [5, ignored] if left else [ignored, 5] + [ignored] * 3
    assert batch["labels"].tolist() == [[ignored, 5, ignored, ignored, ignored], second]
    wrapped = DataCollatorWithGlobalAttention(Collator(tokenizer, mlm_probability=0.9, epoch=0))(features)
    assert_equal(wrapped, batch)


def test_what_is_not_attended_is_not_chosen() -> None:
    feature = {"input_ids": [10, 11, 12, 13], "attention_mask": [1, 0, 1, 0]}
    batch = Collator(tiny_tokenizer(), mlm_probability=0.99)([feature])
    assert batch["labels"].tolist() == [[10, -100, 12, -100]]
    assert batch["attention_mask"].tolist() == [feature["attention_mask"]]


def test_special_tokens_only(tokenizer: Any) -> None:
    ids = [tokenizer.mask_token_id] * 3
    for whole_word in (False, True):
        batch = Collator(tokenizer, whole_word=whole_word)([{"input_ids": ids}, {"input_ids": ids[:1]}])
        assert (batch["labels"] == -100).all()
        assert original(batch)[0].tolist() == ids


def test_equal_lengths_need_no_pad_token() -> None:
    tokenizer = with_specials(tiny_pieces(), mask_token="[MASK]")
    assert tokenizer.pad_token is None
    with no_warnings():
        batch = Collator(tokenizer)([{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7, 8]}])
    assert original(batch).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1] * 3] * 2


def test_workers_choose_the_same() -> None:
    tokenizer = tiny_tokenizer()
    data = encode(tokenizer, TEXTS * 2)
    collate = Collator(tokenizer, mlm_probability=0.4, whole_word=True)
    plain = DataLoader(data, batch_size=2, collate_fn=collate)
    workers = DataLoader(data, batch_size=2, collate_fn=collate, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        collate.set_epoch(epoch)
        epochs.append(list(plain))
        for ours, theirs in zip(workers, epochs[-1], strict=True):
            assert_equal(ours, theirs)
    assert not torch.equal(epochs[0][0]["labels"], epochs[1][0]["labels"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda collator: pickle.loads(pickle.dumps(collator))])
def test_copies_are_whole(copied: Callable[[Collator], Collator]) -> None:
    collate = Collator(tiny_tokenizer(), whole_word=True, mask_share=0.5, epoch=4)
    features = encode(collate.tokenizer, TEXTS)
    expected = collate(features)
    other = copied(collate)
    assert other._epoch.is_shared()
    assert_equal(other(features), expected)
    other.set_epoch(5)
    assert collate.epoch == 4


def test_trainer(tmp_path: Path) -> None:
    tokenizer = tiny_wordpieces()
    data = [dict(tokenizer(text, return_special_tokens_mask=True)) for text in TEXTS * 2]
    config = BertForMaskedLM.config_class(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        BertForMaskedLM(config), arguments, train_dataset=data, eval_dataset=data, data_collator=Collator(tokenizer)
    )
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0


GOOD = {"input_ids": [10, 11, 12]}
OPTIONS = [
    ({"mlm_probability": 0}, "mlm_probability = 0", "above 0"),
    ({"mlm_probability": 1.0}, "mlm_probability = 1.0", "below 1"),
    ({"mlm_probability": float("nan")}, "mlm_probability = nan", "below 1"),
    ({"mask_share": 1.01}, "mask_share = 1.01", "from 0 to 1"),
    ({"mask_share": -0.1}, "mask_share = -0.1", "from 0 to 1"),
    ({"pad_to_multiple_of": 0}, "pad_to_multiple_of = 0", "1 or more"),
    ({"pad_to_multiple_of": True}, "pad_to_multiple_of = True", "1 or more"),
    ({"seed": 0.5}, "seed = 0.5", "integer"),
    ({"epoch": -1}, "epoch = -1", "0 or more"),
    ({"epoch": 1.0}, "epoch = 1.0", "0 or more"),
]
FEATURES = [
    ([], "features = []", "at least one"),
    ([GOOD | {"labels": [1, 2, 3]}], "labels", "remove_columns"),
    ([GOOD, {"input_ids": []}], "feature 1 has shape (0,)", "empty texts"),
    ([GOOD, {"attention_mask": [1]}], "feature 1 has shape None", "list"),
    ([{"input_ids": [[1, 2]]}], "feature 0 has shape (1, 2)", "list"),
    ([GOOD | {"position_ids": [0, 1, 2]}, GOOD], "feature 1 has no position_ids", "all or none"),
    ([GOOD | {"attention_mask": [1, 1]}], "attention_mask of feature 0 has shape (2,)", "one integer a token"),
    ([GOOD | {"text": "a b"}], "text of feature 0", "drop the column"),
    ([GOOD | {"weight": [0.5, 0.5, 0.5]}], "float64", "drop the column"),
]


@pytest.mark.parametrize(("options", "found", "fix"), OPTIONS, ids=[found for _, found, _ in OPTIONS])
def test_options_out_of_range(options: dict[str, Any], found: str, fix: str) -> None:
    with pytest.raises(ValueError) as error:
        Collator(tiny_tokenizer(), **options)
    assert found in str(error.value) and fix in str(error.value)


@pytest.mark.parametrize(("features", "found", "fix"), FEATURES, ids=[found for _, found, _ in FEATURES])
def test_features_that_do_not_fit(features: list[dict[str, Any]], found: str, fix: str) -> None:
    with pytest.raises(ValueError) as error:
        Collator(tiny_tokenizer())(features)
    assert found in str(error.value) and fix in str(error.value)


def test_tokenizers_that_lack_something() -> None:
    with pytest.raises(ValueError, match="mask_token = None.*add_special_tokens.*resize_token_embeddings"):
        Collator(tiny_pieces())
    collate = Collator(with_specials(tiny_pieces(), mask_token="[MASK]"), pad_to_multiple_of=4)
    for features in ([{"input_ids": [3, 4, 5]}], [{"input_ids": [3]}, {"input_ids": [3, 4]}]):
        with pytest.raises(ValueError, match="padded to 4, but this ReformerTokenizer has pad_token = None; set one"):
            collate(features)
