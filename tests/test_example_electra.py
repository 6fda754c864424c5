"""The pretraining example as a user runs it: on small files, interrupted and resumed, and with wrong input."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from helpers import no_warnings
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_efficient_attn import EffElectraForPreTraining, EffNystromformerForReplacedTokenDetection


ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "pretrain_electra.py"
SHORT = ["--max-length", "16", "--batch-size", "4", "--vocab-size", "200"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A text file in `tmp_path`."""
    words = "the quick brown fox jumps over a lazy dog and reads about attention in long texts".split()
    lines = [" ".join(words[i % 7 :: 1 + i % 3]) for i in range(200)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    return tmp_path


def example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE), "--cpu", *SHORT, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_from_a_text_file_to_two_models_and_on_after_a_break(texts: Path) -> None:
    options = ["--dataset", "texts.txt", "--output-dir", "out"]
    result = example(texts, *options, "--steps", "6")
    assert result.returncode == 0, result.stderr
    assert "held out, after 6 steps" in result.stdout and "replaced recall" in result.stdout
    out = texts / "out"
    with no_warnings():
        EffElectraForPreTraining.from_pretrained(out / "discriminator")
        AutoModelForMaskedLM.from_pretrained(out / "generator")
    model = AutoModelForSequenceClassification.from_pretrained(out / "discriminator", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(out / "discriminator")
    assert model(**tokenizer("the fox", return_tensors="pt")).logits.shape == (1, 2)
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert [row["step"] for row in rows if row["generator_loss"]] == [str(step) for step in range(1, 7)]
    assert any(row["eval_replaced_recall"] for row in rows)
    assert (out / "curves.png").stat().st_size > 1000

    more = example(texts, *options, "--steps", "8", "--resume")
    assert more.returncode == 0, more.stderr
    assert (out / "checkpoint-8").is_dir() and "after 8 steps" in more.stdout
    other = example(texts, *options, "--steps", "9", "--resume", "--family", "eff_performer")
    assert other.returncode == 1 and "checkpoint-8 is of another model" in other.stderr
    assert "Traceback" not in other.stderr and not (out / "checkpoint-9").exists()


def test_another_family_and_objective(texts: Path) -> None:
    options = ["--family", "eff_nystromformer", "--objective", "electra_15", "--sharing", "none", "--whole-word"]
    result = example(texts, "--dataset", "texts.txt", "--steps", "2", *options)
    assert result.returncode == 0, result.stderr
    EffNystromformerForReplacedTokenDetection.from_pretrained(texts / "electra" / "discriminator")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "none.txt"], "Error: there is no file none.txt"),
        (["--dataset", "texts.txt", "--text-column", "body"], "Error: there is no column 'body', only text"),
        (["--dataset", "texts.txt", "--resume"], "holds no checkpoint to go on from"),
        (["--dataset", "empty.txt"], "Error: empty.txt"),
        (["--dataset", "one.txt"], "one.txt has 1 rows, and both sides need one"),
        (["--dataset", "two.txt"], "Error: "),
        (["--dataset", "numbers.csv"], "column 'text' has rows that are no text"),
        (["--dataset", "texts.txt", "--tokenizer", "nowhere"], "Error: "),
        (["--dataset", "texts.txt", "--sharing", "all"], "give both the same size, or set sharing = 'none'"),
        (["--dataset", "texts.txt", "--family", "eff_reformer"], "eff_reformer has no such choice; leave it out"),
    ],
)
def test_wrong_input_is_explained_in_one_line(
    options: list[str], message: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(texts)
    for name, text in {"empty.txt": "", "one.txt": "a b", "two.txt": "a\nb", "numbers.csv": "text\n1\n2\n3\n"}.items():
        (texts / name).write_text(text)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(texts / "cache"))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--cpu", *SHORT, "--steps", "1", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert message in str(stop.value) and "\n" not in str(stop.value)


def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "-3"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "--steps -3: give 1 or more" in capsys.readouterr().err
