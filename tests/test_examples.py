"""The classification example as a user runs it: on small files, interrupted and resumed, and with wrong input."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from example_runs import (
    EXAMPLES,
    ROOT,
    check_outputs,
    damage_last_checkpoint,
    error_of,
    run_example,
    run_here,
    write_jsonl,
)
from loopback_hub import LoopbackHub
from transformers import pipeline

from hf_efficient_attn import checkpoint_problems


NAME = "finetune_classification"
TEXTS = ["the red apple is sweet and round", "a blue sky over the cold sea", "green grass grows in the warm field"]
LABELS = ["fruit", "air", "plant"]
COLUMNS = ["--dataset", "rows.csv", "--text-column", "body", "--label-column", "topic", "--max-length", "32"]


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
    printed = run_example(NAME, folder, *COLUMNS, "--epochs", "2", "--output-dir", "out")
    assert "Held-out accuracy" in printed and "3 labels; the most frequent label has" in printed
    return folder


def test_a_csv_file_gives_a_classifier_with_named_labels(finetuned: Path) -> None:
    check_outputs(finetuned / "out", "loss", "accuracy")
    config = json.loads((finetuned / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "air", "1": "fruit", "2": "plant"}
    answer = pipeline("text-classification", model=str(finetuned / "out"), device="cpu")("a red apple", truncation=True)
    assert answer[0]["label"] in LABELS


def test_a_checkpoint_is_tuned_further_on_json_with_other_labels(finetuned: Path, tmp_path: Path) -> None:
    table = [{"text": row["body"], "label": index % 2 + 1} for index, row in enumerate(rows())]
    write_jsonl(tmp_path / "train.jsonl", table)
    write_jsonl(tmp_path / "test.jsonl", table[:6])
    options = ["--dataset", "train.jsonl", "--eval-dataset", "test.jsonl", "--model", finetuned / "out"]
    printed = run_here(
        NAME, tmp_path, *options, "--max-train-examples", "8", "--epochs", "1", "--gradient-checkpointing"
    )
    assert "on 6 documents, 2 labels" in printed
    assert json.loads((tmp_path / "finetuned" / "config.json").read_text())["id2label"] == {"0": "1", "1": "2"}


def test_training_goes_on_from_the_last_complete_checkpoint(finetuned: Path) -> None:
    damaged, step = damage_last_checkpoint(finetuned / "out")
    assert "out holds checkpoint-" in error_of(NAME, finetuned, *COLUMNS, "--output-dir", "out")
    other = ["--output-dir", "out", "--resume", "--family", "eff_performer"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert f"checkpoint-{step} is of another model" in error_of(NAME, finetuned, *COLUMNS, *other)
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        run_here(NAME, finetuned, *COLUMNS, "--output-dir", "out", "--epochs", "3", "--resume")
    history = json.loads((finetuned / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry][:3] == [step, 2 * step, 3 * step]


def test_a_checkpoint_without_its_tokenizer_is_passed_over(finetuned: Path, tmp_path: Path) -> None:
    """Trainer does not read it, but the example does."""
    shutil.copytree(finetuned / "out", tmp_path / "out")
    shutil.copy(finetuned / "rows.csv", tmp_path)
    for path in (tmp_path / "out").glob("checkpoint-*"):
        if checkpoint_problems(path):
            shutil.rmtree(path)
    older, newest = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-2:]
    (newest / "tokenizer.json").unlink()
    options = [*COLUMNS, "--output-dir", "out", "--epochs", "4", "--resume"]
    with pytest.warns(UserWarning, match=f"{newest.name} is passed over.*tokenizer.json: missing"):
        run_here(NAME, tmp_path, *options)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert int(older.name[11:]) in [entry["step"] for entry in history if "eval_loss" in entry]
    table = [{**row, "topic": row["topic"].replace("fruit", "food")} for row in rows()]
    write_csv(tmp_path / "rows.csv", table)
    assert "is of a model with the labels air, fruit, plant, and the data have air, food, plant" in error_of(
        NAME, tmp_path, *options
    )


def test_what_is_pushed_says_how_to_load_it(finetuned: Path, tmp_path: Path) -> None:
    """And what it was trained on, and how well it did, on the Hub and in the folder."""
    local = (finetuned / "out" / "README.md").read_text()
    assert "- Data: rows.csv\n" in local and "accuracy" in local and "- Metrics: not recorded" not in local
    command = [sys.executable, str(EXAMPLES / f"{NAME}.py"), "--cpu", *COLUMNS, "--max-steps", "2"]
    command += ["--output-dir", "out", "--push-to-hub", "--hub-model-id", "ada/classifier"]
    shutil.copy(finetuned / "rows.csv", tmp_path)
    with LoopbackHub() as hub:
        environment = {**hub.environment(tmp_path / "home", "hf_ada"), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        pushed = hub.repos["ada/classifier"].at("main")[1]
    card = pushed["README.md"].content.decode()
    assert "import hf_efficient_attn" in card and "pip install" in card and "- Data: rows.csv\n" in card
    assert "model.safetensors" in pushed and "tokenizer.json" in pushed
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = subprocess.run(
        [*command, "--output-dir", "other"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("Error: "), done.stderr
    assert "Traceback" not in done.stderr


def test_layers_further_from_the_head_learn_more_slowly(finetuned: Path, tmp_path: Path) -> None:
    data = [*COLUMNS[2:], "--dataset", finetuned / "rows.csv", "--epochs", "1", "--output-dir", "out"]
    run_here(NAME, tmp_path, *data, "--layer-decay", "0.5", "--learning-rate", "1e-3")
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    initial = {group["name"]: group["initial_lr"] for group in groups if "," not in group["name"]}
    assert initial == {"head": 1e-3, "layer 1": 5e-4, "layer 0": 2.5e-4, "embeddings": 1.25e-4}
    assert all(tuple(group["betas"]) == (0.9, 0.98) for group in groups)  # the arguments' other settings hold


def test_a_folder_of_texts_has_its_labels_in_the_subfolders(tmp_path: Path) -> None:
    for index, row in enumerate(rows(12)):
        (tmp_path / "texts" / row["topic"]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / row["topic"] / f"{index}.txt").write_text(row["body"])
    run_here(NAME, tmp_path, "--dataset", "texts", "--max-length", "16", "--epochs", "1", "--output-dir", "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["0"] == "air"


def test_a_stream_takes_its_labels_from_the_command_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": row["body"], "label": row["topic"]} for row in rows()])
    stream = ["--dataset", "rows.jsonl", "--streaming", "--max-steps", "3", "--max-eval-examples", "6"]
    stream += ["--max-length", "6", "--output-dir", "out"]  # no multiple of 8, and every text is longer
    assert "name them all with --labels" in error_of(NAME, tmp_path, *stream)
    write_csv(tmp_path / "numbers.csv", [{"text": row["body"], "label": i % 2} for i, row in enumerate(rows())])
    numbers = ["--dataset", "numbers.csv", *stream[2:-1], "numbers"]
    assert "holds whole numbers: give those" in error_of(NAME, tmp_path, *numbers, "--labels", "no", "yes")
    run_here(NAME, tmp_path, *numbers, "--labels", "1", "0")
    assert json.loads((tmp_path / "numbers" / "config.json").read_text())["id2label"] == {"0": "1", "1": "0"}
    printed = run_here(NAME, tmp_path, *stream, "--labels", *LABELS)
    assert "a stream of documents to learn, 6 held out; 3 labels" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["0"] == "fruit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "none.csv"], "there is no file none.csv"),
        (["--dataset", "rows.csv"], "no column 'text', it has body, topic: name the columns with --text-column"),
        (["--dataset", "rows.csv", "--train-split", "a", "--eval-split", "b"], "has no split 'b': it has a"),
        (["--dataset", "some/name", "--eval-dataset", "rows.csv"], "--eval-dataset goes with a file"),
        (["--dataset", "broken.csv"], "Expected 2 fields in line 3, saw 4"),
        (["--dataset", "rows.xml"], "ends in '.xml', which is not known"),
        (["--dataset", "floats.csv"], "column 'label' has to hold strings or whole numbers"),
        (["--dataset", "gaps.csv"], "column 'label' is empty in"),
        (["--dataset", "good.csv", "--resume", "--max-length", "8"], "holds no checkpoint to go on from"),
        (["--dataset", "good.csv", "--layer-decay", "2"], "argument --layer-decay: 2 is above 1"),
        (["--dataset", "good.csv", "--model", "nowhere"], "nowhere"),
        (["--dataset", "good.csv", "--max-length", "2"], "--max-length is 2, but 2 special tokens"),
        (["--dataset", "mixed"], "mixed is no file, and cannot be loaded as a data set"),
        (["--dataset", "good.csv", "--output-dir", "good.csv"], "good.csv is a file"),
    ],
)
def test_wrong_input_is_explained_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", rows())
    (tmp_path / "rows.xml").write_text("<a/>")
    (tmp_path / "broken.csv").write_text("text,label\na,x\nb,y,z,z\n")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "train.json").write_text('{"text": ')
    write_csv(tmp_path / "floats.csv", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}] * 5)
    write_csv(tmp_path / "gaps.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": None}] * 9)
    write_csv(tmp_path / "good.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 9)
    assert message in error_of(NAME, tmp_path, *options)
    assert not (tmp_path / "finetuned").exists()


def test_an_unknown_name_is_explained_without_a_traceback(tmp_path: Path) -> None:
    line = error_of(NAME, tmp_path, "--dataset", "no/such-name")
    assert "Error: no/such-name is no file, and cannot be loaded as a data set" in line
