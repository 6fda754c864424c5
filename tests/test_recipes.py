"""What the examples share: options, sides of data sets and streams, rows, order, figures and curves."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from example_runs import write_jsonl
from helpers import tiny_tokenizer
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_efficient_attn import byte_tokenizer
from hf_efficient_attn.demo import ROLES, label_names, load_sides, names_corpus, questions_corpus
from hf_efficient_attn.recipes import (
    CollatorOfSides,
    RecipeParser,
    answer_scores,
    check_columns,
    continue_texts,
    cut_texts,
    errors_in_one_line,
    label_f1,
    load_tokenizer,
    token_figures,
    token_sums,
    training_arguments,
)
from hf_efficient_attn.recipes.curves import save_curves
from hf_efficient_attn.recipes.order import OrderByEpoch


def parser() -> RecipeParser:
    return RecipeParser("A script.", output_dir="out", epochs=2, batch_size=4, learning_rate=1e-3, max_length=64)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: 0 is not above 0"),
        (["--learning-rate", "inf"], "argument --learning-rate: inf is not a finite number"),
        (["--epochs", "1", "--max-steps", "2"], "--epochs and --max-steps both say how long to train"),
        (["--batch-size", "-1"], "argument --batch-size: -1 is not a whole number above 0"),
        (["--seed", "4294967296"], "is not a whole number from 0 to 2 ** 32 - 1"),
        (["--streaming"], "--streaming goes with --dataset and --max-steps"),
        (["--dataset", "x.csv", "--streaming"], "--streaming goes with --dataset and --max-steps"),
        (["--output-dir", "file.txt"], "--output-dir: file.txt is a file"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--output-dir", "model", "--model", "model", "--overwrite"], "to keep the model"),
        (["--output-dir", "run", "--model", "run/checkpoint-3", "--overwrite"], "--model run/checkpoint-3 lies in"),
        (["--output-dir", "run", "--tokenizer", "run/link", "--overwrite"], "--tokenizer run/link lies in"),
        (["--output-dir", "model"], "model holds model.safetensors of an earlier run: give --resume to go on"),
        (["--output-dir", "best", "--overwrite"], "checkpoint-best is no checkpoint of Trainer, which would remove it"),
        (["--output-dir", "run"], "run holds checkpoint-3 of an earlier run"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_wrong_options_end_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_text("")
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to("checkpoint-3")
    (tmp_path / "best" / "checkpoint-best").mkdir(parents=True)
    known = parser()
    known.data.add_argument("--tokenizer")
    with pytest.raises(SystemExit) as stop:
        known.parse_args(options)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.startswith("Error: ") and line.count("\n") == 1 and message in line


def test_steps_and_epochs_take_each_other_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {}
    for options in ([], ["--max-steps", "12"], ["--epochs", "1"]):
        args = parser().parse_args([*options, "--cpu"])
        arguments[" ".join(options)] = training_arguments(args)
    assert (arguments[""].num_train_epochs, arguments[""].max_steps) == (2, -1)
    assert (arguments["--max-steps 12"].max_steps, arguments["--max-steps 12"].eval_steps) == (12, 2)
    assert arguments["--epochs 1"].num_train_epochs == 1 and arguments["--epochs 1"].eval_strategy == "epoch"
    assert all(one.train_sampling_strategy == "group_by_length" for one in arguments.values())
    stream = parser().parse_args(["--cpu", "--dataset", "x.csv", "--streaming", "--max-steps", "6"])
    assert training_arguments(stream).accelerator_config.dispatch_batches is False


def test_errors_in_one_line_is_for_what_users_can_mend() -> None:
    with pytest.raises(SystemExit, match="^Error: one two$"), errors_in_one_line():
        raise ValueError("one\n   two")
    with pytest.raises(RuntimeError), errors_in_one_line():
        raise RuntimeError("a defect")


# Data


def test_a_stream_has_its_first_rows_held_out_and_the_rest_to_learn(tmp_path: Path) -> None:
    rows = [{"text": f"row {number}", "label": number % 2} for number in range(30)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    (tmp_path / "rows.txt").write_text("\n".join(row["text"] for row in rows))
    for name in ("rows.jsonl", "rows.parquet", "rows.csv", "rows.txt"):
        train, held_out = load_sides(str(tmp_path / name), streaming=True, eval_rows=5)
        assert isinstance(train, IterableDataset) and held_out["text"] == [f"row {number}" for number in range(5)]
        learnt = [row["text"] for row in train]
        assert sorted(learnt) == sorted(row["text"] for row in rows[5:]) and learnt != [row["text"] for row in rows[5:]]
    train, held_out = load_sides(
        str(tmp_path / "rows.jsonl"), eval_source=str(tmp_path / "rows.jsonl"), streaming=True, eval_rows=7
    )
    assert len(held_out) == 7 and len(list(train)) == 30
    with pytest.raises(ValueError, match="no row to learn from besides 30 for evaluation: give more, or a smaller"):
        load_sides(str(tmp_path / "rows.jsonl"), streaming=True, eval_rows=30)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match=r"broken\.jsonl cannot be read"):
        load_sides(str(tmp_path / "broken.jsonl"), streaming=True, eval_rows=1)


def test_rows_of_a_text_file_are_lines_or_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one\ntwo\n\nthree\n\nfour\nfive\n")
    lines, paragraphs = (
        [text.strip() for side in load_sides(str(tmp_path / "book.txt"), txt_rows=rows) for text in side["text"]]
        for rows in ("line", "paragraph")
    )
    assert {"one", "two", "three", "four", "five"} <= set(lines)
    assert sorted(paragraphs) == ["four\nfive", "one\ntwo", "three"]


def test_columns_are_checked() -> None:
    sides = (Dataset.from_dict({"a": ["x", "y"], "b": ["x", None]}), Dataset.from_dict({"a": ["x"], "b": ["y"]}))
    check_columns(sides, {"--text-column": "a"})
    for column, message in (("c", "has no column 'c', it has a, b"), ("b", "column 'b' is empty in 1 rows")):
        with pytest.raises(ValueError, match=message):
            check_columns(sides, {"--text-column": column})
    numbers = (Dataset.from_dict({"a": [1]}),) * 2
    with pytest.raises(ValueError, match="rows that are no str"):
        check_columns(numbers, {"--text-column": "a"})
    check_columns([side.to_iterable_dataset() for side in sides], {"--text-column": "a"})


def test_a_tokenizer_is_made_once_or_loaded(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    made = load_tokenizer(None, tiny_tokenizer)
    loaded = load_tokenizer(tmp_path, lambda: pytest.fail("it is there already"))
    assert loaded.get_vocab() == made.get_vocab()

    def fail() -> None:
        raise ValueError("too few texts")

    with pytest.raises(ValueError, match="too few texts"):
        load_tokenizer(None, fail)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_hold_all_of_every_text(streaming: bool) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["the quick brown fox " * 5, "", "a dog"]
    side = Dataset.from_dict({"body": texts, "other": [1, 2, 3]})
    side = side.to_iterable_dataset() if streaming else side
    whole = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]

    rows = [row["input_ids"] for row in cut_texts(side, tokenizer, 10, "body")]
    assert all(row[0] == 0 and row[-1] == 2 and 2 < len(row) <= 10 for row in rows)
    assert [token for row in rows for token in row[1:-1]] == whole[0] + whole[2]

    rows = list(continue_texts(side, tokenizer, 10, "body"))
    assert all(row["labels"] == row["input_ids"] and len(row["input_ids"]) <= 10 for row in rows)
    predicted = [token for row in rows for token in row["labels"][1:]]
    assert predicted == [token for ids in whole for token in (*ids, 2)]
    with pytest.raises(ValueError, match="2 tokens or more"):
        continue_texts(side, byte_tokenizer(), 1, "body")


def test_each_side_has_its_collator() -> None:
    collator = CollatorOfSides(lambda rows: "learn", lambda rows: "hold out")
    assert collator([{"input_ids": [1]}]) == "learn" and collator([{"input_ids": [1], "labels": [1]}]) == "hold out"


# Data that ships


SOURCE = '''import os.path as p
from re import match
LIMIT = 3

class Reader(Base):
    kind = "é"; other = LIMIT

    def read(self, name, *, size=LIMIT):
        """A docstring that is longer than a string may be."""
        def inner(x):
            return size + x
        total = [match(c, name) for c in self.parts(size=size)]
        try:
            p.join(total, open)
        except OSError as error:
            raise Reader(error) from None
        global LIMIT
        LIMIT = "ééé", total  # a comment
        return inner(lambda y: y + total)
'''


def test_names_have_the_role_that_scopes_give_them() -> None:
    pairs = list(label_names(SOURCE))
    roles: dict[str, list[str]] = {}
    for token, role in pairs:
        roles.setdefault(token, []).append(role)
    assert set(roles["LIMIT"]) == {"global"} and len(roles["LIMIT"]) == 5
    assert roles["total"] == ["local"] * 4 and roles["error"] == ["local"] * 2 and roles["c"] == ["local"] * 2
    assert roles["name"] == ["parameter"] * 2 and roles["x"] == ["parameter"] * 2 == roles["y"]
    assert roles["size"] == ["parameter", "parameter", "keyword", "parameter"]
    assert set(roles["p"]) == set(roles["match"]) == {"imported"}
    assert roles["Reader"] == ["class"] * 2 and roles["inner"] == ["function"] * 2 and roles["read"] == ["function"]
    assert roles["parts"] == roles["join"] == roles["kind"] == ["attribute"]
    assert roles["open"] == roles["OSError"] == ["builtin"] and roles["Base"] == ["global"]
    assert roles["return"] == ["other"] * 2 and "# a comment" not in roles
    # The tokens are the source again, but for comments, blanks in a line and long strings.
    assert "".join(token for token, _ in pairs[:15]).startswith("importos.pathasp\nfromreimportmatch\nLIMIT=3")
    assert not any("docstring" in token for token, _ in pairs)


def test_the_standard_library_to_tag_and_to_ask(tmp_path: Path) -> None:
    train, held_out = names_corpus(num_packages=3, max_tokens=500, max_per_package=4)
    assert train.features["tags"].feature.names == list(ROLES)
    assert not set(train["file"]) & set(held_out["file"]) and len(train) > 6
    for row in train:
        assert len(row["tokens"]) == len(row["tags"]) <= 500
    train, held_out = questions_corpus(num_packages=3)
    assert not set(train["file"]) & set(held_out["file"]) and len(train) > 100
    for row in [*train, *held_out]:
        (start,), (text,) = row["answers"]["answer_start"], row["answers"]["text"]
        assert row["context"][start : start + len(text)] == text and 0 < len(text) <= 60
        assert len(row["context"]) <= 3000
    assert {question.split()[-1] for question in train["question"]} >= {"do?", "return?"}


# Figures


def test_token_sums_are_those_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 3:] = -100
    logits[1, 2, labels[1, 2]] = 50.0
    for shift in (False, True):
        sums = token_sums((logits, None), labels, shift=shift)
        scored = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        loss = torch.nn.functional.cross_entropy(scored[0].flatten(0, 1), scored[1].flatten())
        found = token_figures(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
        kept = scored[1] != -100
        assert found["tokens"] == kept.sum() and math.isclose(found["nll"], loss.item(), rel_tol=1e-5)
        assert math.isclose(found["perplexity"], math.exp(found["nll"]))
        hits = ((scored[0].argmax(-1) == scored[1]) & kept).sum()
        assert math.isclose(found["accuracy"], hits / kept.sum(), rel_tol=1e-6)


def test_f1_of_labels_and_of_answers() -> None:
    found, wanted = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    scores = label_f1(found, wanted, 3)
    assert scores[:2] == pytest.approx([0.5, 2 / 3]) and math.isnan(scores[2])
    wanted = [["the old Cat."], ["No", "yes indeed"], [], []]
    assert answer_scores(["a cat", "Yes, indeed!", "", "x"], wanted) == pytest.approx(
        {"exact_match": 0.5, "f1": (2 / 3 + 1 + 1 + 0) / 4}
    )


def test_curves_are_a_table_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = [{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "eval_f1": 0.5, "step": 2}, {"train_runtime": 3, "step": 2}]
    save_curves(history, tmp_path, ("loss", "f1", "never_logged"))
    rows = list(csv.DictReader((tmp_path / "training.csv").open()))
    assert [(row["step"], row["loss"], row["eval_f1"]) for row in rows] == [("1", "2.0", ""), ("2", "", "0.5")]
    assert (tmp_path / "training.png").stat().st_size > 2000
    (tmp_path / "training.png").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    save_curves(history, tmp_path)
    assert "matplotlib is not installed (pip install" in capsys.readouterr().out
    assert not (tmp_path / "training.png").exists()


# Order


class Order(torch.nn.Module):
    """Notes the rows it is given, and draws from torch's generator as dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        torch.rand(input_ids.shape)
        self.seen += input_ids[:, 0].tolist()
        return {"loss": self.weight**2, "logits": input_ids.float()}


def test_rows_of_like_length_come_in_an_order_of_seed_and_epoch(tmp_path: Path) -> None:
    rows = [{"input_ids": [number] * (1 + number % 7), "labels": [0]} for number in range(40)]

    def run(folder: str, seed: int = 0, resume: str | None = None, **options: object) -> list[int]:
        def collate(features: list[dict]) -> dict[str, torch.Tensor]:
            width = max(len(feature["input_ids"]) for feature in features)
            padded = [feature["input_ids"] + [-1] * (width - len(feature["input_ids"])) for feature in features]
            return {"input_ids": torch.tensor(padded), "labels": torch.zeros(len(features))}

        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            train_sampling_strategy="group_by_length",
            use_cpu=True,
            report_to="none",
            seed=seed,
            **{"max_steps": 20, "save_steps": 14, **options},
        )
        trainer = Trainer(Order(), arguments, train_dataset=rows, data_collator=collate, callbacks=[OrderByEpoch()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.seen

    whole = run("whole")
    assert sorted(whole[:40]) == sorted(whole[40:]) == list(range(40)) and whole[:40] != whole[40:]
    assert run("other", seed=1) != whole
    # From the middle of the second epoch on.
    assert run("resumed", resume=str(tmp_path / "whole" / "checkpoint-14"), save_strategy="no") == whole[56:]
    lengths = [1 + row % 7 for row in whole]
    assert np.mean([np.ptp(lengths[i : i + 4]) for i in range(0, 80, 4)]) < 3 < np.ptp(lengths)


def test_the_order_is_seeded_below_a_share_of_the_batches() -> None:
    """As accelerate wraps them for several processes."""
    from torch.utils.data import BatchSampler, DataLoader
    from transformers.trainer_pt_utils import LengthGroupedSampler

    sampler = LengthGroupedSampler(2, lengths=list(range(8)))
    inner = SimpleNamespace(batch_sampler=BatchSampler(sampler, 2, False))
    callback = OrderByEpoch()
    state, args = SimpleNamespace(epoch=1.5), SimpleNamespace(seed=3, data_seed=None)
    callback.on_train_begin(args, state, None)
    callback.on_epoch_begin(args, state, None, train_dataloader=SimpleNamespace(batch_sampler=inner))
    assert callback.epoch == 2 and sampler.generator.initial_seed() == 3 * 1_000_003 + 1
    callback.on_epoch_begin(args, state, None, train_dataloader=DataLoader([1, 2]))  # nothing to seed


def test_the_parser_tells_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for option in ("--dataset", "--model", "--max-length", "--resume", "--push-to-hub", "--streaming", "--bf16"):
        assert option in text
    assert "default: 0.001" in text and "tokens; default: 64" in text
    assert json.dumps(vars(parser().parse_args([])), default=str)
