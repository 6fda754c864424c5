"""The examples run as a user runs them: in a process of their own, on small files, and explain what is wrong."""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import pipeline

import hf_efficient_attn  # noqa: F401  (the pipeline is to know its models)


ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "finetune_classification.py"
TEXTS = ["the red apple is sweet and round", "a blue sky over the cold sea", "green grass grows in the warm field"]
LABELS = ["fruit", "air", "plant"]


def example(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the example in `tmp_path`, with the data sets' cache there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE), "--cpu", *options]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


def rows(count: int = 30) -> list[dict[str, str]]:
    return [{"body": f"{TEXTS[i % 3]} {i}", "topic": LABELS[i % 3]} for i in range(count)]


def write_csv(path: Path, table: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `rows.csv` and the small classifier in `out` that the example trained on it."""
    folder = tmp_path_factory.mktemp("csv")
    write_csv(folder / "rows.csv", rows())
    columns = ["--text-column", "body", "--label-column", "topic"]
    result = example(
        folder, "--dataset", "rows.csv", *columns, "--max-length", "32", "--epochs", "2", "--output-dir", "out"
    )
    assert result.returncode == 0, result.stderr
    assert "Held-out accuracy" in result.stdout and "3 labels" in result.stdout
    return folder


def test_a_csv_file_gives_a_classifier_with_named_labels(finetuned: Path) -> None:
    config = json.loads((finetuned / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "air", "1": "fruit", "2": "plant"}
    assert (finetuned / "out" / "model.safetensors").is_file()
    answer = pipeline("text-classification", model=str(finetuned / "out"), device="cpu")("a red apple", truncation=True)
    assert answer[0]["label"] in LABELS


def test_a_checkpoint_is_tuned_further_on_json_with_other_labels(finetuned: Path, tmp_path: Path) -> None:
    table = [{"text": row["body"], "label": index % 2 + 1} for index, row in enumerate(rows())]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in table))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in table[:6]))
    options = ["--dataset", "train.jsonl", "--eval-dataset", "test.jsonl", "--model", str(finetuned / "out")]
    result = example(tmp_path, *options, "--epochs", "1", "--max-train-examples", "8", "--gradient-checkpointing")
    assert result.returncode == 0, result.stderr
    assert "on 6 documents, 2 labels" in result.stdout
    assert json.loads((tmp_path / "finetuned" / "config.json").read_text())["id2label"] == {"0": "1", "1": "2"}


def test_training_goes_on_from_the_last_checkpoint(finetuned: Path) -> None:
    columns = ["--text-column", "body", "--label-column", "topic", "--max-length", "32", "--output-dir", "out"]
    steps = [int(folder.name.split("-")[1]) for folder in (finetuned / "out").glob("checkpoint-*")]
    result = example(finetuned, "--dataset", "rows.csv", *columns, "--epochs", "3", "--resume")
    assert result.returncode == 0, result.stderr
    assert (finetuned / "out" / f"checkpoint-{max(steps) * 3 // 2}").is_dir()


def test_layers_further_from_the_head_learn_more_slowly(finetuned: Path, tmp_path: Path) -> None:
    columns = ["--text-column", "body", "--label-column", "topic", "--max-length", "32", "--epochs", "1"]
    data = ["--dataset", str(finetuned / "rows.csv"), *columns, "--output-dir", "out"]
    result = example(tmp_path, *data, "--layer-decay", "0.5", "--learning-rate", "1e-3")
    assert result.returncode == 0, result.stderr
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    initial = {group["name"]: group["initial_lr"] for group in groups if "," not in group["name"]}
    assert initial == {"head": 1e-3, "layer 1": 5e-4, "layer 0": 2.5e-4, "embeddings": 1.25e-4}
    assert all(tuple(group["betas"]) == (0.9, 0.98) for group in groups)  # the arguments' other settings hold


def test_a_folder_of_texts_has_its_labels_in_the_subfolders(tmp_path: Path) -> None:
    for index, row in enumerate(rows(12)):
        (tmp_path / "texts" / row["topic"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / row["topic"] / f"{index}.txt").write_text(row["body"])
    options = ["--dataset", "texts", "--max-length", "16", "--epochs", "1", "--output-dir", "out"]
    result = example(tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["0"] == "air"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "none.csv"], "there is no file none.csv"),
        (["--dataset", "rows.csv"], "no column 'text', it has body, topic: name the columns with --text-column"),
        (["--dataset", "rows.csv", "--train-split", "a", "--eval-split", "b"], "has no split 'b': it has a"),
        (["--dataset", "some/name", "--eval-dataset", "rows.csv"], "--eval-dataset goes with a file"),
        (["--dataset", "rows.xml"], "ends in '.xml', which is not known"),
        (["--dataset", "floats.csv"], "column 'label' has to hold strings or whole numbers"),
        (["--dataset", "gaps.csv"], "column 'label' is empty in"),
        (["--dataset", "good.csv", "--resume", "--max-length", "8"], "holds no checkpoint to go on from"),
    ],
)
def test_wrong_input_is_explained_in_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_csv(tmp_path / "rows.csv", rows())
    (tmp_path / "rows.xml").write_text("<a/>")
    write_csv(tmp_path / "floats.csv", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}] * 5)
    write_csv(tmp_path / "gaps.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": None}] * 9)
    write_csv(tmp_path / "good.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 9)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--cpu", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert str(stop.value).startswith("Error: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_an_unknown_name_is_explained_without_a_traceback(tmp_path: Path) -> None:
    result = example(tmp_path, "--dataset", "no/such-name")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "Error: no/such-name is no file, and cannot be loaded as a data set" in result.stderr


def test_the_help_names_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--dataset", "--text-column", "--model", "--max-length", "--resume", "--push-to-hub"):
        assert option in text
