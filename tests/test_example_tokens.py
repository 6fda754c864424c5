"""The tagging example as a user runs it: on small files, streams, checkpoints, and with wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from example_runs import check_outputs, damage_last_checkpoint, error_of, run_example, run_here, write_jsonl
from transformers import pipeline

import hf_efficient_attn  # noqa: F401  (the pipeline is to know its models)


NAME = "finetune_token_classification"
WORDS = "Ada wrote the first program for the engine of Babbage in London".split()
TAGS = ["PER" if word in ("Ada", "Babbage") else "LOC" if word == "London" else "O" for word in WORDS]
SMALL = ["--max-length", "16", "--output-dir", "out"]


def rows(count: int = 40) -> list[dict[str, list[str]]]:
    """Texts of 5 to 29 words, some longer than an input."""
    return [
        {"words": (WORDS * 3)[i % 9 : i % 9 + 5 + i % 25], "ner": (TAGS * 3)[i % 9 : i % 9 + 5 + i % 25]}
        for i in range(count)
    ]


COLUMNS = ["--dataset", "rows.jsonl", "--tokens-column", "words", "--tags-column", "ner", *SMALL]


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.jsonl` and the small tagger in `out` that the example trained on it."""
    folder = tmp_path_factory.mktemp("tags")
    write_jsonl(folder / "rows.jsonl", rows())
    printed = run_example(NAME, folder, *COLUMNS, "--epochs", "4", "--learning-rate", "1e-2")
    assert "32 documents to learn, 8 held out; 3 labels" in printed
    # Each word of this language has one label.
    (dictionary,) = re.findall(r"dictionary +([\d.]+)%", printed)
    (model,) = re.findall(r"model +([\d.]+)%", printed)
    assert float(dictionary) == 100.0 and float(model) > 60.0, printed
    return folder


def test_a_file_of_words_gives_a_tagger(tagged: Path) -> None:
    found = check_outputs(tagged / "out", "loss", "f1")
    assert found["eval_accuracy"] > 0.8
    config = json.loads((tagged / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "LOC", "1": "O", "2": "PER"}
    tagger = pipeline("token-classification", model=str(tagged / "out"), device="cpu")
    assert {token["entity"] for token in tagger("Ada in London")} <= {"LOC", "O", "PER"}


def test_training_goes_on_from_the_last_complete_checkpoint(tagged: Path) -> None:
    damaged, _ = damage_last_checkpoint(tagged / "out")
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        run_here(NAME, tagged, *COLUMNS, "--epochs", "5", "--resume")
    assert (tagged / "out" / f"checkpoint-{int(damaged.name.split('-')[1]) // 4 * 5}").is_dir()


def test_a_checkpoint_is_tuned_further_on_a_stream_of_class_ids(tagged: Path, tmp_path: Path) -> None:
    features = Features({"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["no", "yes"]))})
    table = {
        "tokens": [row["words"] for row in rows()],
        "tags": [[i % 2 for i in range(len(r["ner"]))] for r in rows()],
    }
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "rows.parquet")
    options = ["--dataset", "rows.parquet", "--streaming", "--max-eval-examples", "5", "--max-steps", "2"]
    options += ["--max-length", "12"]  # no multiple of 8, and texts are longer
    printed = run_here(
        NAME, tmp_path, *options, "--model", tagged / "out", "--output-dir", "out", "--gradient-checkpointing"
    )
    assert "a stream of documents to learn, 5 held out; 2 labels" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "rows.jsonl"], "no column 'tokens', it has words, ner: name the columns with --tokens-column"),
        (["--dataset", "texts.jsonl"], "column 'tokens' of the training side has rows that are no list"),
        (["--dataset", "uneven.jsonl"], "a row has 2 words and 1 labels: give one label a word"),
        (["--dataset", "gaps.jsonl"], "column 'tokens' has lists with gaps (null) in 4 rows of the training side"),
        (
            ["--dataset", "gaps.jsonl", "--tokens-column", "tags", "--tags-column", "tokens"],
            "'tokens' has lists with gaps",
        ),
        (["--dataset", "numbers.jsonl", "--labels", "X", "Y"], "holds whole numbers: give those"),
        (["--dataset", "good.jsonl", "--eval-dataset", "new.jsonl"], "no label 'Z': remove the rows, or split anew"),
        (["--dataset", "good.jsonl", "--streaming", "--max-steps", "1", "--max-eval-examples", "2"], "with --labels"),
        (["--dataset", "good.jsonl", "--resume"], "holds no checkpoint to go on from"),
        (["--dataset", "good.jsonl", "--max-length", "0"], "argument --max-length: 0 is not a whole number above 0"),
    ],
)
def test_wrong_input_is_explained_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows(6))
    write_jsonl(tmp_path / "texts.jsonl", [{"tokens": "a b", "tags": "X Y"}] * 6)
    write_jsonl(tmp_path / "uneven.jsonl", [{"tokens": ["a", "b"], "tags": ["X"]}] * 6)
    write_jsonl(tmp_path / "good.jsonl", [{"tokens": ["a", "b"], "tags": ["X", "Y"]}] * 6)
    write_jsonl(tmp_path / "gaps.jsonl", [{"tokens": ["a", None], "tags": ["X", "Y"]}] * 6)
    write_jsonl(tmp_path / "numbers.jsonl", [{"tokens": ["a", "b"], "tags": [0, 1]}] * 6)
    write_jsonl(tmp_path / "new.jsonl", [{"tokens": ["a"], "tags": ["Z"]}])
    assert message in error_of(NAME, tmp_path, *options)
