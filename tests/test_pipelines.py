"""Pipelines and Trainer with every family: the tasks run as documented, without a warning."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from helpers import config_class, model_class, no_warnings, randomise_, tiny_config, tiny_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_efficient_attn import DataCollatorWithGlobalAttention
from hf_efficient_attn.auto import TEXT_FAMILIES


TEXTS = ["the fox", "a quick brown dog jumps over the window of the lazy fox, over and over", "attention of a dog"]
ENTAILMENT = ["contradiction", "neutral", "entailment"]
EVERY_FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """`(family, Auto class)` -> a folder with a random model and its tokenizer, made once."""
    made: dict[tuple[str, str], str] = {}

    def folder(family: str, auto_name: str) -> str:
        if (family, auto_name) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{auto_name}")
            tokenizer = tiny_tokenizer()
            labels = {"id2label": dict(enumerate(ENTAILMENT)), "label2id": {x: i for i, x in enumerate(ENTAILMENT)}}
            config = tiny_config(family, vocab_size=len(tokenizer), **labels)
            randomise_(model_class(family, auto_name)(config)).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family, auto_name] = str(path)
        return made[family, auto_name]

    return folder


def run_pipeline(task: str, folder: str, inputs: list[str], **options: Any) -> tuple[list[Any], list[Any]]:
    """Results one by one, and in batches of two with padding; nothing may warn."""
    with no_warnings():
        pipe = pipeline(task, model=folder, device="cpu")
        single = [pipe(text, **options) for text in inputs]
        batched = pipe(inputs, batch_size=2, **options)
    assert len(batched) == len(inputs)
    return single, list(batched)


def close(value: float) -> Any:
    return pytest.approx(value, abs=1e-5)


@EVERY_FAMILY
def test_fill_mask(family: str, folders: Callable[[str, str], str]) -> None:
    texts = [text.replace("the", "<mask>", 1).replace("a dog", "a <mask>") for text in TEXTS]
    assert all(text.count("<mask>") == 1 for text in texts)
    single, batched = run_pipeline("fill-mask", folders(family, "AutoModelForMaskedLM"), texts, top_k=3)
    for one, other in zip(single, batched, strict=True):
        assert len(one) == 3 and [set(guess) for guess in one] == 3 * [{"score", "token", "token_str", "sequence"}]
        assert all(0 < guess["score"] < 1 and isinstance(guess["token_str"], str) for guess in one)
        assert [guess["token"] for guess in other] == [guess["token"] for guess in one]
        assert [guess["score"] for guess in other] == [close(guess["score"]) for guess in one]


@EVERY_FAMILY
def test_text_classification(family: str, folders: Callable[[str, str], str]) -> None:
    folder = folders(family, "AutoModelForSequenceClassification")
    single, batched = run_pipeline("text-classification", folder, TEXTS, top_k=None)
    for one, other in zip(single, batched, strict=True):
        assert {guess["label"] for guess in one} == set(ENTAILMENT)
        assert sum(guess["score"] for guess in one) == close(1.0)
        assert other == [{"label": guess["label"], "score": close(guess["score"])} for guess in one]


@EVERY_FAMILY
def test_token_classification(family: str, folders: Callable[[str, str], str]) -> None:
    folder = folders(family, "AutoModelForTokenClassification")
    single, batched = run_pipeline("token-classification", folder, TEXTS)
    for text, one, other in zip(TEXTS, single, batched, strict=True):
        assert one and [set(token) for token in one] == len(one) * [
            {"entity", "score", "index", "word", "start", "end"}
        ]
        assert one[-1]["end"] == len(text) and {token["entity"] for token in one} <= set(ENTAILMENT)
        for token, same in zip(one, other, strict=True):
            assert same == {**token, "score": close(float(token["score"]))}


@EVERY_FAMILY
def test_feature_extraction(family: str, folders: Callable[[str, str], str]) -> None:
    single, batched = run_pipeline("feature-extraction", folders(family, "AutoModel"), TEXTS)
    lengths = [len(ids) for ids in tiny_tokenizer()(TEXTS)["input_ids"]]
    width = tiny_config(family).output_size
    assert len(set(lengths)) == 3
    for one, other, length in zip(single, batched, lengths, strict=True):
        states = np.array(one)
        assert states.shape == (1, length, width)
        np.testing.assert_allclose(np.array(other)[:, :length], states, atol=1e-5)


@EVERY_FAMILY
def test_zero_shot_classification(family: str, folders: Callable[[str, str], str]) -> None:
    labels = ["animals", "a window of attention"]
    folder = folders(family, "AutoModelForSequenceClassification")
    single, batched = run_pipeline("zero-shot-classification", folder, TEXTS, candidate_labels=labels)
    for text, one, other in zip(TEXTS, single, batched, strict=True):
        assert set(one) == {"sequence", "labels", "scores"} and one["sequence"] == text
        assert sorted(one["labels"]) == sorted(labels) and sum(one["scores"]) == close(1.0)
        assert other == {**one, "scores": [close(score) for score in one["scores"]]}


@dataclass(frozen=True)
class Training:
    """How one task is trained: its Auto class, its collator and a text's columns besides what the tokenizer gives."""

    auto_name: str
    collator: Callable[[PreTrainedTokenizerFast], Any]
    columns: Callable[[int, list[int]], dict[str, Any]]
    choices: int = 0
    causal: bool = False


TRAININGS = {
    "masked-lm": Training(
        "AutoModelForMaskedLM",
        # Everything masked, nothing drawn: the loader fetches a batch ahead, so a resumed run would draw other masks.
        lambda tokenizer: DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=1.0, mask_replace_prob=1.0, random_replace_prob=0.0
        ),
        lambda row, ids: {},
    ),
    "causal-lm": Training(
        "AutoModelForCausalLM",
        lambda tokenizer: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        lambda row, ids: {},
        causal=True,
    ),
    "sequence-classification": Training(
        "AutoModelForSequenceClassification", DataCollatorWithPadding, lambda row, ids: {"label": row % 3}
    ),
    "token-classification": Training(
        "AutoModelForTokenClassification",
        DataCollatorForTokenClassification,
        lambda row, ids: {"labels": [token % 3 for token in ids]},
    ),
    "question-answering": Training(
        "AutoModelForQuestionAnswering",
        DataCollatorWithPadding,
        lambda row, ids: {"start_positions": 1 + row % 2, "end_positions": len(ids) - 2},
    ),
    "multiple-choice": Training(
        "AutoModelForMultipleChoice", DataCollatorForMultipleChoice, lambda row, ids: {"label": row % 2}, choices=2
    ),
}


def has_global_tokens(family: str) -> bool:
    return "global_attention" in {field.name for field in fields(config_class(family))}


def training_data(training: Training, tokenizer: PreTrainedTokenizerFast, with_global: bool) -> Dataset:
    """Twelve texts of different length; where asked, every token is global that is a multiple of three.

    A causal model has the first two of each text global instead.
    """
    rows = []
    for row in range(12):
        text = " ".join(TEXTS[row % 3].split()[row // 3 :]) or "fox"
        encoded: dict[str, Any] = dict(tokenizer(text))
        columns = training.columns(row, encoded["input_ids"])
        if with_global:
            ids = encoded["input_ids"]
            multiples = [int(token % 3 == 0) for token in ids]
            encoded["global_attention_mask"] = [int(at < 2) for at in range(len(ids))] if training.causal else multiples
        if training.choices:
            other = {name: [values[0], values[-1]] for name, values in encoded.items()}
            encoded = {name: [values, other[name]] for name, values in encoded.items()}
        rows.append({**encoded, **columns})
    return Dataset.from_list(rows)


def make_trainer(family: str, training: Training, output: Path, with_global: bool) -> Trainer:
    tokenizer = tiny_tokenizer()
    labels: dict[str, Any] = {} if "Question" in training.auto_name else {"num_labels": 3}
    if training.causal and with_global:
        labels["causal_global"] = "prefix"
    # Trainer warns where these are not the tokenizer's.
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = tiny_config(family, vocab_size=len(tokenizer), **ids, **labels)
    data = training_data(training, tokenizer, with_global)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(
        model=randomise_(model_class(family, training.auto_name)(config)),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithGlobalAttention(training.collator(tokenizer)),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("task", TRAININGS)
@EVERY_FAMILY
def test_training(family: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, with_global = TRAININGS[task], has_global_tokens(family)
    if training.auto_name not in TEXT_FAMILIES[family].heads:
        pytest.skip("this family has no such head")
    trainer = make_trainer(family, training, tmp_path / "whole", with_global)
    seen: list[Tensor | None] = []
    prepare = trainer.model.base_model.attention_context
    monkeypatch.setattr(
        trainer.model.base_model,
        "attention_context",
        lambda *args: seen.append(args[2]) or prepare(*args),
        raising=True,
    )
    with no_warnings():
        trainer.train()

    # The column has come through the dataset, the collator and the head into the attention.
    if with_global:
        assert seen and all(mask is not None and mask.any() and not mask.all() for mask in seen)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and all(np.isfinite(losses))

    # The best checkpoint is what the model holds now, in safetensors only.
    best = Path(trainer.state.best_model_checkpoint)
    evaluated = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert sorted(evaluated) == [2, 4] and best.name == f"checkpoint-{min(evaluated, key=evaluated.get)}"
    assert not list(tmp_path.rglob("pytorch_model*.bin"))
    state = trainer.model.state_dict()
    for name, tensor in load_file(best / "model.safetensors").items():
        assert torch.equal(state[name], tensor), name
    with no_warnings():
        reloaded = getattr(transformers, training.auto_name).from_pretrained(best)
    assert type(reloaded) is type(trainer.model)

    if task != "sequence-classification":  # the way back from a checkpoint knows no task; test_resume.py has more of it
        return
    # Stopped after two steps and resumed, it arrives where the whole run has arrived.
    monkeypatch.undo()
    resumed = make_trainer(family, training, tmp_path / "resumed", with_global)
    with no_warnings():
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    weights = load_file(tmp_path / "resumed" / "checkpoint-4" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors").items():
        torch.testing.assert_close(
            weights[name], tensor, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    early = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(weights[name], tensor) for name, tensor in early.items())


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_the_global_mask(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    rows = [tokenizer(text) for text in TEXTS]
    features = [{**row, "global_attention_mask": [1] + [0] * (len(row["input_ids"]) - 1)} for row in rows]
    collate = DataCollatorWithGlobalAttention(DataCollatorWithPadding(tokenizer))
    with no_warnings():
        batch = collate(features)
    mask = batch["global_attention_mask"]
    assert mask.shape == batch["input_ids"].shape and mask.dtype == torch.int64
    first = batch["attention_mask"].argmax(dim=1)
    assert torch.equal(mask, torch.nn.functional.one_hot(first, mask.shape[1]))
    assert "global_attention_mask" in features[0], "the features were changed"
    assert "global_attention_mask" not in collate([dict(row) for row in rows])


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_pads_the_choices(side: str) -> None:
    """For multiple choice a feature has one mask a choice, of any lengths."""
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    features = []
    for first, second in ((0, 1), (2, 0)):
        encoded = [tokenizer(TEXTS[index]) for index in (first, second)]
        ids, masks = ([row[name] for row in encoded] for name in ("input_ids", "attention_mask"))
        chosen = [[int(token == 2) for token in row] for row in ids]  # the separator at the end
        features.append({"input_ids": ids, "attention_mask": masks, "global_attention_mask": chosen, "label": 0})
    batch = DataCollatorWithGlobalAttention(DataCollatorForMultipleChoice(tokenizer))(features)
    assert batch["input_ids"].shape[:2] == (2, 2) and batch["global_attention_mask"].dtype == torch.int64
    assert torch.equal(batch["global_attention_mask"], (batch["input_ids"] == 2).long())
