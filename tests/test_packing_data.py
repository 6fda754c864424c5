"""The collator of packed rows: nothing is lost, nothing is too long, and Trainer trains as on rows of one text each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import model_class, no_warnings, random_ids, randomise_, tiny_config, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_efficient_attn import (
    DataCollatorForReplacedTokenDetection,
    DataCollatorWithGlobalAttention,
    DataCollatorWithPacking,
)


TOKENIZER = tiny_tokenizer()
PAD, MASK = TOKENIZER.pad_token_id, TOKENIZER.mask_token_id


def texts(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Features of so many tokens, all different, with labels that follow from the ids."""
    features = []
    for number, length in enumerate(lengths):
        ids = random_ids(1, length, vocab_size=200, seed=number)[0].tolist()
        features.append({"input_ids": ids, "labels": [2 * x for x in ids]})
    return features


def unpack(batch: dict[str, Tensor]) -> list[list[dict[str, list[int]]]]:
    """The documents of each row, in order; fails where one is in several places."""
    rows = []
    for row in range(len(batch["document_ids"])):
        ids = batch["document_ids"][row]
        numbers = ids[ids > 0].unique_consecutive().tolist()
        assert numbers == list(range(1, len(numbers) + 1))
        rows.append([{name: x[row][ids == number].tolist() for name, x in batch.items()} for number in numbers])
    return rows


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    room=st.integers(30, 100),
    side=st.sampled_from(["left", "right"]),
    fill=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_token_stands_in_one_row(lengths: list[int], room: int, side: str, fill: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    features = texts(lengths)
    collator = DataCollatorWithPacking(DataCollatorWithPadding(tokenizer), room, room if fill else None)
    batch = collator(features)
    ids = batch["document_ids"]
    assert {x.shape for x in batch.values()} == {ids.shape} and {x.dtype for x in batch.values()} == {torch.int64}
    rows = unpack(batch)
    found = [{name: document[name] for name in ("input_ids", "labels")} for row in rows for document in row]
    assert sorted(map(str, found)) == sorted(map(str, features))
    order = [[features.index({n: document[n] for n in ("input_ids", "labels")}) for document in row] for row in rows]
    if len({str(feature) for feature in features}) == len(features):
        assert all(row == sorted(row) for row in order) and order == sorted(order)
    assert torch.equal(batch["attention_mask"], (ids > 0).long())
    assert (batch["input_ids"][ids == 0] == PAD).all() and (batch["labels"][ids == 0] == -100).all()
    used = (ids > 0).sum(dim=1)
    assert ids.shape[1] == (room if fill else used.max()) and used.max() <= room
    # Padding is at one end, and no two rows would fit into one.
    edge = ids[:, -1] if side == "left" else ids[:, 0]
    assert (edge > 0).all()
    smallest = used.sort().values[:2]
    assert len(used) == 1 or int(smallest.sum()) > room


def test_rows_are_filled_up_to_a_multiple() -> None:
    batch = DataCollatorWithPacking(DataCollatorWithPadding(TOKENIZER), 32, pad_to_multiple_of=8)(texts([9, 4]))
    assert batch["input_ids"].shape == (1, 16)


def test_features_may_be_padded_and_of_any_kind() -> None:
    plain = texts([5, 3])
    padded = [
        {"input_ids": [PAD, *plain[0]["input_ids"]], "attention_mask": [0, 1, 1, 1, 1, 1]},
        {"input_ids": [*plain[1]["input_ids"], PAD], "attention_mask": [1, 1, 1, 0]},
    ]
    collator = DataCollatorWithPacking(DataCollatorWithPadding(TOKENIZER), 16)
    kinds = [
        padded,
        [{name: torch.tensor(x) for name, x in feature.items()} for feature in padded],
        [{name: torch.tensor(x).numpy() for name, x in feature.items()} for feature in padded],
    ]
    for features in kinds:
        batch = collator(features)
        assert batch["input_ids"].tolist() == [plain[0]["input_ids"] + plain[1]["input_ids"]]
        assert batch["document_ids"].tolist() == [[1] * 5 + [2] * 3]
    encoded = [TOKENIZER("the quick brown fox"), TOKENIZER("a dog")]
    (row,) = unpack(DataCollatorWithPacking(DataCollatorWithPadding(TOKENIZER), 64)(encoded))
    assert [document["input_ids"] for document in row] == [x["input_ids"] for x in encoded]


@pytest.mark.parametrize("listed", [True, False], ids=["special_tokens_mask", "by the tokenizer"])
def test_masking_comes_after_packing(listed: bool) -> None:
    """Special tokens and padding are never masked, and what is masked is predicted."""
    lines = ["the quick brown fox", "a window of attention", "dog", "lazy " * 9] * 6
    features = [dict(TOKENIZER(line, return_special_tokens_mask=listed)) for line in lines]
    inner = DataCollatorForLanguageModeling(
        TOKENIZER, mlm_probability=0.5, mask_replace_prob=1.0, random_replace_prob=0
    )
    batch = DataCollatorWithPacking(inner, 64)(features)
    chosen = batch["labels"] != -100
    original = torch.where(chosen, batch["labels"], batch["input_ids"])
    assert 0.3 < chosen.sum() / (batch["document_ids"] > 0).sum() < 0.6
    assert torch.equal(chosen, batch["input_ids"] == MASK)
    assert not (chosen & torch.isin(original, torch.tensor(TOKENIZER.all_special_ids))).any()
    found = [document["input_ids"] for row in unpack({**batch, "input_ids": original}) for document in row]
    assert sorted(found) == sorted(feature["input_ids"] for feature in features)
    assert "special_tokens_mask" not in batch


def test_other_collators_of_the_package() -> None:
    features = [dict(TOKENIZER(line)) for line in ("the quick brown fox", "a dog", "lazy " * 8)]
    for feature in features:
        feature["global_attention_mask"] = [1] + [0] * (len(feature["input_ids"]) - 1)
    inner = DataCollatorForReplacedTokenDetection(TOKENIZER, epoch=0)
    for collator in (inner, DataCollatorWithGlobalAttention(inner)):
        batch = DataCollatorWithPacking(collator, 48)(features)
        assert batch["global_attention_mask"].sum() == 3
        for row in unpack(batch):
            assert all(document["global_attention_mask"][0] == 1 for document in row)
        assert (batch["labels"][batch["document_ids"] == 0] == -100).all()
        again = DataCollatorWithPacking(collator, 48)(features)
        assert torch.equal(batch["input_ids"], again["input_ids"]), "masks of an epoch"


def test_causal_labels_leave_out_first_tokens_and_padding_but_no_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    features = [{"input_ids": [*feature["input_ids"], tokenizer.eos_token_id]} for feature in texts([5, 3, 9])]
    copies = DataCollatorWithPacking(DataCollatorForLanguageModeling(tokenizer, mlm=False), 12)
    asked = DataCollatorWithPacking(DataCollatorWithPadding(tokenizer), 12, causal=True)
    for collator in (copies, asked):
        batch = collator(features)
        for row in unpack(batch):
            for document in row:
                assert document["labels"] == [-100, *document["input_ids"][1:]]
                assert document["labels"][-1] == tokenizer.eos_token_id
        assert (batch["labels"] != -100).sum() == 17
    own = DataCollatorWithPacking(DataCollatorForTokenClassification(tokenizer), 12, causal=True)
    for feature in features:
        feature["labels"] = [7] * len(feature["input_ids"])
    assert (own(features)["labels"] == 7).sum() == 17
    kept = DataCollatorWithPacking(DataCollatorForTokenClassification(tokenizer), 12)
    assert (kept(features)["labels"] == 7).sum() == 20


def padding_collator(**options: Any) -> DataCollatorWithPacking:
    return DataCollatorWithPacking(DataCollatorWithPadding(TOKENIZER), **{"max_length": 8, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length = 0: give a number of tokens, 1 or more"),
        ({"max_length": 8.0}, "max_length = 8.0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of = 0"),
        ({"pad_to_multiple_of": 3}, "max_length = 8 is no multiple of pad_to_multiple_of = 3.*change one"),
        ({"collator": DefaultDataCollator()}, "has no tokenizer.*DataCollatorForLanguageModeling"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPacking(**{"collator": DataCollatorWithPadding(TOKENIZER), "max_length": 8, **options})


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], r"features = \[\]"),
        ([{"labels": [1]}], "feature 0 needs input_ids"),
        ([{"input_ids": [5]}, {"input_ids": []}], "feature 1 needs input_ids.*drop empty texts"),
        ([{"input_ids": [[5, 6], [7, 8]]}], "feature 0 needs input_ids"),
        ([{"input_ids": [5, 6], "attention_mask": [0, 0]}], "attention_mask 0 everywhere"),
        ([{"input_ids": [5] * 9}], "feature 0 has 9 tokens, more than a row takes.*max_length=8"),
        ([{"input_ids": [5, 6], "labels": 1}], "labels of feature 0 has not one entry for each of the 2"),
        ([{"input_ids": [5, 6], "text": "ab"}], "text of feature 0 has not one entry.*drop the column"),
        ([{"input_ids": [5, 6], "labels": [1]}], "labels of feature 0"),
        ([{"input_ids": [5], "labels": [1]}, {"input_ids": [6]}], "feature 1 has no labels while others have one"),
    ],
)
def test_features_are_checked(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padding_collator()(features)


def test_padding_is_checked() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="padded to 3 tokens.*pad_token = None; set one"):
        DataCollatorWithPacking(DataCollatorWithPadding(tokenizer), 4)(texts([3, 2]))
    inner = DataCollatorWithPadding(TOKENIZER, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match=r"makes \[1, 8\] of rows \[1, 5\]; set pad_to_multiple_of here"):
        DataCollatorWithPacking(inner, 8)(texts([3, 2]))


# Trainer.


def train(model: PreTrainedModel, data: Dataset, collator: Any, folder: Path, **options: Any) -> list[float]:
    """Losses of a short training."""
    options = {"max_steps": 4, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, **options}
    arguments = TrainingArguments(
        str(folder),
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)
    with no_warnings():
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return [*losses, trainer.evaluate()["eval_loss"]] if options.get("eval_strategy") else losses


@pytest.mark.parametrize(
    ("auto", "inner"),
    [
        ("AutoModelForCausalLM", DataCollatorForLanguageModeling(TOKENIZER, mlm=False)),
        ("AutoModelForTokenClassification", DataCollatorForTokenClassification(TOKENIZER)),
    ],
)
def test_trainer_reaches_the_weights_that_rows_of_one_text_give(auto: str, inner: Any, tmp_path: Path) -> None:
    """Batches of equal texts, with accumulation: the loss is of the same tokens, divided by the same number."""
    features = texts([3, 40, 17, 9, 25, 8, 30, 1, 12, 5, 36, 21, 4, 50, 2, 7])
    for feature in features:
        feature["labels"] = [x % 2 for x in feature["input_ids"]]
    data = Dataset.from_list(features)
    if auto == "AutoModelForCausalLM":
        data = data.remove_columns("labels")  # its collator makes them
    config = tiny_config("eff_longformer", vocab_size=len(TOKENIZER), pad_token_id=PAD)
    one_each = randomise_(model_class("eff_longformer", auto)(config), std=0.1)
    packed = randomise_(model_class("eff_longformer", auto)(config), std=0.1)
    before = [x.clone() for x in packed.parameters()]
    right = train(one_each, data, inner, tmp_path)
    ours = train(packed, data, DataCollatorWithPacking(inner, 64), tmp_path)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(packed.named_parameters(), one_each.parameters(), strict=True):
        # What is added to every key changes no softmax: its gradient is rounding, which AdamW takes for a direction.
        if not name.endswith(("key.bias", "key_global.bias")):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
    assert (
        sum(float((a - b).detach().abs().max()) > 1e-3 for a, b in zip(packed.parameters(), before, strict=True)) > 10
    )


def test_trainer_learns_masked_texts_in_packed_rows(tmp_path: Path) -> None:
    lines = ["the quick brown fox jumps over the lazy dog", "the lazy dog", "a window of attention"] * 8
    data = Dataset.from_list([dict(TOKENIZER(line)) for line in lines])
    config = tiny_config("eff_longformer", vocab_size=len(TOKENIZER), pad_token_id=PAD, sep_token_id=2)
    torch.manual_seed(0)
    model = model_class("eff_longformer", "AutoModelForMaskedLM")(config)
    collator = DataCollatorWithPacking(DataCollatorForLanguageModeling(TOKENIZER), 64)
    options = {"max_steps": 40, "per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    losses = train(model, data, collator, tmp_path, **options, eval_strategy="epoch")
    assert losses[-1] < 0.7 * losses[0], losses
