"""The byte-level example runs as a user runs it, on a small text, resumes, and explains what is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import pipeline

import hf_efficient_attn  # noqa: F401  (the pipeline is to know its models)


ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "train_reformer_bytes.py"
SMALL = ["--context", "128", "--hidden-size", "16", "--layers", "2", "--output-dir", "out"]


def example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE), *SMALL, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def bits(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(model|unigram|bzip2) (\d+\.\d+)", text)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder after twelve steps on a text of bytes that are no UTF-8, and what was printed."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "text.bin").write_bytes(b"abcabcab\xff\xfe" * 300)
    result = example(folder, "--text", "text.bin", "--steps", "12")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_prints_bits_per_byte_of_model_and_baselines(trained: tuple[Path, str]) -> None:
    found = bits(trained[1])
    # Frequencies 3, 3, 2, 1, 1 of ten have 2.17 bits, the smoothing a little more; a repeated text costs bzip2 little.
    assert 2.17 < found["unigram"] < 2.4
    assert found["bzip2"] < 0.5
    assert found["model"] < 7.0, "below the 8 bits of nothing known"


def test_the_folder_is_a_model_with_its_tokenizer(trained: tuple[Path, str]) -> None:
    generator = pipeline("text-generation", model=str(trained[0] / "out"))
    assert generator("abc", max_new_tokens=5, do_sample=False)[0]["generated_text"].startswith("abc")


def test_resumes(trained: tuple[Path, str]) -> None:
    folder = trained[0]
    result = example(folder, "--text", "text.bin", "--steps", "16", "--resume")
    assert result.returncode == 0, result.stderr
    assert bits(result.stdout)["model"] < 7.0
    assert (folder / "out" / "checkpoint-16").is_dir() or (folder / "out" / "checkpoint-15").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt"], "there is no file missing.txt"),
        (["--steps", "0"], "must be 1 or more"),
        (["--context", "3"], "give 8 bytes or more"),
        (["--hidden-size", "33"], "multiple of 4"),
        (["--seed", "-1"], "--seed from 0"),
        (["--output-dir", "tiny.txt"], "tiny.txt is a file"),
        (["--text", "empty.txt"], "the text has 0 bytes"),
        (["--text", "tiny.txt"], "the text has 3 bytes"),
        (["--text", "long.txt", "--resume", "--output-dir", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_wrong_use_is_explained(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "tiny.txt").write_bytes(b"abc")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "long.txt").write_bytes(b"abc" * 100)
    result = example(tmp_path, *options)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr
