"""The question-answering example as a user runs it: on small files, streams, checkpoints, and with wrong input."""

from __future__ import annotations

import csv
import json
import re
import runpy
from argparse import Namespace
from pathlib import Path

import pytest
from datasets import Dataset
from example_runs import EXAMPLES, check_outputs, damage_last_checkpoint, error_of, run_example, run_here, write_jsonl
from transformers import AutoTokenizer

from hf_efficient_attn import QuestionAnswerer


NAME = "finetune_question_answering"
PLACES = {"Ada": "London", "Emmy": "Erlangen", "Sofya": "Moscow", "Grace": "New York"}
SMALL = ["--dataset", "rows.jsonl", "--max-length", "48", "--stride", "8", "--output-dir", "out"]


def rows(count: int = 40, plain: bool = False) -> list[dict]:
    """Questions of which every tenth has no answer; contexts of up to 60 words. `plain`: texts, not SQuAD's form."""
    table = []
    for i in range(count):
        name, place = list(PLACES.items())[i % 4]
        context = f"{'It was long ago. ' * (i % 14)}{name} was born in {place} and went away.{' The end.' * (i % 5)}"
        found = [] if i % 10 == 9 else [place]
        squad = {"text": found, "answer_start": [context.index(text) for text in found]}
        row = {"question": f"Where was {name} born?", "context": context}
        table.append({**row, **({"answer": "".join(found)} if plain else {"answers": squad})})
    return table


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.jsonl` and the small model in `out` that the example trained on it."""
    folder = tmp_path_factory.mktemp("answers")
    write_jsonl(folder / "rows.jsonl", rows())
    printed = run_example(NAME, folder, *SMALL, "--epochs", "6", "--learning-rate", "1e-2")
    assert "36 questions to learn, 4 held out" in printed
    scores = re.findall(r"(model|line) +([\d.]+)% +([\d.]+)%", printed)
    assert [name for name, _, _ in scores] == ["model", "line"] and " --> '" in printed
    return folder


def test_squad_s_columns_give_a_model_that_answers(answered: Path) -> None:
    check_outputs(answered / "out", "loss", "windows")
    figures = json.loads((answered / "out" / "answers_results.json").read_text())
    assert figures.keys() == {"answers_exact_match", "answers_f1"}
    context = "Ada was born in London and went away."
    answer = QuestionAnswerer(answered / "out")(question="Where was Ada born?", context=context)
    assert answer["answer"] in context


def test_training_goes_on_from_the_last_complete_checkpoint(answered: Path) -> None:
    damaged, step = damage_last_checkpoint(answered / "out")
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        run_here(NAME, answered, *SMALL, "--epochs", "7", "--resume")
    history = json.loads((answered / "out" / "trainer_state.json").read_text())["log_history"]
    assert max(entry["step"] for entry in history) > int(damaged.name.split("-")[1]) > step


def test_a_checkpoint_is_tuned_further_on_a_stream_of_plain_answers(answered: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "context", "answer"])
        writer.writeheader()
        writer.writerows(rows(plain=True)[::-1])  # the first one has no answer
    options = ["--dataset", "rows.csv", "--answers-column", "answer"]
    options += ["--streaming", "--max-eval-examples", "5", "--max-steps", "2"]
    options += ["--model", answered / "out", "--max-length", "45"]  # no multiple of 8
    printed = run_here(NAME, tmp_path, *options, "--output-dir", "out", "--bf16")
    assert "a stream of questions to learn, 5 held out" in printed and "windows of at most 45 tokens" in printed


def test_the_places_of_answers_are_theirs(answered: Path) -> None:
    """Read back from the tokens, the places are the answers, and a window without the answer has the first token."""
    example = runpy.run_path(str(EXAMPLES / f"{NAME}.py"))
    tokenizer = AutoTokenizer.from_pretrained(answered / "out")
    columns = {f"{name}_column": name for name in ("question", "context", "answers")}
    args = Namespace(max_length=32, stride=4, **columns)
    windows = example["cut_windows"](Dataset.from_list(rows()), tokenizer, args)
    found = [
        tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]).strip()
        for row in windows
        if row["end_positions"] > 0
    ]
    assert example["answers_of"](["b", "d"], "a b c d") == [(2, "b"), (6, "d")]
    assert example["answers_of"](None, "a") == example["answers_of"]([], "a") == []
    assert set(found) == set(PLACES.values()) and len(found) >= 36
    without = [row for row in windows if row["end_positions"] == 0]
    assert len(without) > 10 and all(row["start_positions"] == 0 for row in without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "other.jsonl"], "no column 'question', it has q, context, answers: name the columns with"),
        (["--dataset", "moved.jsonl"], "the answer 'London' does not stand at character 2 of its context"),
        (["--dataset", "absent.jsonl"], "the answer 'Paris' does not stand at character -1 of its context"),
        (["--dataset", "blank.jsonl"], "column 'context' is blank in 6 rows"),
        (["--dataset", "long.jsonl", "--max-length", "48"], "tokens, with which windows of 48 have room for 0 of the"),
        (["--dataset", "numbers.jsonl"], "the answer 3 is neither text, nor a list of texts, nor SQuAD's form"),
        (["--dataset", "rows.jsonl", "--answers-column", "reply"], "name the columns with --answers-column"),
        (["--dataset", "rows.jsonl", "--stride", "0"], "argument --stride: 0 is not a whole number above 0"),
        (["--dataset", "rows.jsonl", "--resume"], "holds no checkpoint to go on from"),
    ],
)
def test_wrong_input_is_explained_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(6))
    write_jsonl(tmp_path / "other.jsonl", [{"q": "a", "context": "b", "answers": "b"}] * 6)
    moved = {"text": ["London"], "answer_start": [2]}
    write_jsonl(tmp_path / "moved.jsonl", [{"question": "Where?", "context": "In London.", "answers": {**moved}}] * 6)
    write_jsonl(tmp_path / "absent.jsonl", [{"question": "Where?", "context": "In London.", "answers": "Paris"}] * 6)
    row = {"question": "Where?", "context": "In London.", "answers": "London"}
    changes = {"blank": {"context": " ", "answers": ""}, "long": {"question": "why " * 99}, "numbers": {"answers": 3}}
    for name, change in changes.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{**row, **change}] * 6)
    assert message in error_of(NAME, tmp_path, *options)
