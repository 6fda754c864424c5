"""The byte-level example as a user runs it, on a small text, resumed, and with wrong input."""

import json
import re
from pathlib import Path

import pytest
from example_runs import check_outputs, damage_last_checkpoint, error_of, run_example, run_here, write_jsonl
from transformers import pipeline

import hf_efficient_attn  # noqa: F401  (the pipeline is to know its models)


NAME = "train_reformer_bytes"
SMALL = ["--max-length", "128", "--hidden-size", "16", "--output-dir", "out"]


def bits(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(model|unigram|bzip2) (\d+\.\d+)", text)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder after twelve steps on a text of bytes that are no UTF-8, and what was printed."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.bin").write_bytes(b"abcabcab\xff\xfe" * 300)
    return folder, run_example(NAME, folder, *SMALL, "--text", "text.bin", "--max-steps", "12")


def test_prints_bits_per_byte_of_model_and_baselines(trained: tuple[Path, str]) -> None:
    found = bits(trained[1])
    # Frequencies 3, 3, 2, 1, 1 of ten have 2.17 bits, the smoothing a little more; a repeated text costs bzip2 little.
    assert 2.17 < found["unigram"] < 2.4
    assert found["bzip2"] < 0.5
    assert found["model"] < 7.0, "below the 8 bits of nothing known"
    assert check_outputs(trained[0] / "out", "loss", "bits_per_byte")["eval_tokens"] == 300 - 3


def test_the_folder_is_a_model_with_its_tokenizer(trained: tuple[Path, str]) -> None:
    generator = pipeline("text-generation", model=str(trained[0] / "out"))
    assert generator("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("abc")


def test_resumes_from_the_last_complete_checkpoint(trained: tuple[Path, str]) -> None:
    folder = trained[0]
    damaged, _ = damage_last_checkpoint(folder / "out")
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        printed = run_here(NAME, folder, *SMALL, "--text", "text.bin", "--max-steps", "16", "--resume")
    assert bits(printed)["model"] < 7.0
    assert (folder / "out" / "checkpoint-16").is_dir()


def test_goes_on_with_a_model_on_rows_of_a_file(trained: tuple[Path, str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"body": "abcabc"}] * 40)
    data = ["--dataset", "rows.jsonl", "--text-column", "body", "--max-length", "64", "--epochs", "1"]
    printed = run_here(NAME, tmp_path, *data, "--model", trained[0] / "out", "--output-dir", "more")
    assert "251 bytes to learn, 27 held out" in printed
    assert json.loads((tmp_path / "more" / "config.json").read_text())["hidden_size"] == 16
    too_long = error_of(NAME, tmp_path, *data, "--model", trained[0] / "out", "--max-length", "256")
    assert "takes 128 of them" in too_long


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt"], "there is no file missing.txt"),
        (["--max-steps", "0"], "0 is not a whole number above 0"),
        (["--max-length", "3"], "give 8 bytes or more"),
        (["--hidden-size", "33"], "multiple of 4"),
        (["--seed", "-1"], "-1 is not a whole number from 0"),
        (["--output-dir", "tiny.txt"], "tiny.txt is a file"),
        (["--text", "tiny.txt", "--dataset", "tiny.txt"], "--text and --dataset are two sources"),
        (["--text", "empty.txt"], "the text has 0 bytes"),
        (["--text", "tiny.txt"], "the text has 3 bytes"),
        (["--text", "long.txt", "--resume", "--output-dir", "nowhere"], "nowhere holds no checkpoint to go on from"),
    ],
)
def test_wrong_use_is_explained(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "tiny.txt").write_bytes(b"abc")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "long.txt").write_bytes(b"abc" * 100)
    assert message in error_of(NAME, tmp_path, *SMALL, *options)
