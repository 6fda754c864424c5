"""The masked and the causal language model's examples as a user runs them, and with wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from example_runs import check_outputs, damage_last_checkpoint, error_of, run_example, run_here, write_jsonl
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

import hf_efficient_attn  # noqa: F401  (the pipelines are to know its models)


MASKED, CAUSAL = "pretrain_masked_lm", "train_causal_lm"
WORDS = "the quick brown fox jumps over a lazy dog and reads about attention in long texts".split()
SMALL = ["--batch-size", "4", "--max-length", "32", "--output-dir", "out"]


def documents(count: int = 40) -> list[str]:
    """Texts of 3 to 60 words, some longer than an input."""
    return [" ".join((WORDS * 5)[i % 15 : i % 15 + 3 + (7 * i) % 58]) for i in range(count)]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts.txt` and the small masked language model in `out`."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "texts.txt").write_text("\n\n".join(documents()))
    options = ["--dataset", "texts.txt", *SMALL, "--vocab-size", "120", "--epochs", "3", "--learning-rate", "1e-2"]
    printed = run_example(MASKED, folder, *options)
    model, frequencies = (float(x) for x in re.findall(r"(?:model|frequencies) +([\d.]+)%", printed))
    assert model > frequencies, printed
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts.jsonl` and the small causal language model in `out`."""
    folder = tmp_path_factory.mktemp("causal")
    write_jsonl(folder / "texts.jsonl", [{"body": text} for text in documents()])
    data = ["--dataset", "texts.jsonl", "--text-column", "body"]
    printed = run_example(CAUSAL, folder, *data, *SMALL, "--epochs", "2", "--learning-rate", "1e-2")
    model, frequencies, bzip2 = (float(x) for x in re.findall(r"(?:model|frequencies|bzip2) +([\d.]+)\n", printed))
    assert model < frequencies < 5.0 and bzip2 < frequencies, printed
    assert "-->" in printed
    return folder


def test_a_text_file_gives_a_model_that_fills_masks(masked: Path) -> None:
    found = check_outputs(masked / "out", "loss", "accuracy")
    assert found["eval_tokens"] > 10 and 0 < found["eval_accuracy"] < 1
    fill = pipeline("fill-mask", model=str(masked / "out"), device="cpu")
    assert len(fill("the quick [MASK] fox", top_k=3)) == 3


def test_documents_give_a_model_that_goes_on(causal: Path) -> None:
    check_outputs(causal / "out", "loss", "bits_per_byte")
    go_on = pipeline("text-generation", model=str(causal / "out"), device="cpu")
    assert go_on("the qu", max_new_tokens=5, add_special_tokens=False)[0]["generated_text"].startswith("the qu")


@pytest.mark.parametrize("name", [MASKED, CAUSAL])
def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    name: str, masked: Path, causal: Path, tmp_path: Path
) -> None:
    """Masks and the order of the rows are those of the undisturbed run, from the middle of an epoch on."""
    folder = masked if name == MASKED else causal
    data = {MASKED: ["--dataset", masked / "texts.txt"], CAUSAL: ["--dataset", causal / "texts.jsonl"]}[name]
    data += ["--text-column", "text" if name == MASKED else "body", "--model", folder / "out"]
    options = [*data, "--batch-size", "8", "--max-length", "28", "--max-steps", "24"]  # 28 is no multiple of 8
    run_here(name, tmp_path, *options, "--output-dir", "whole")
    # What is left of a run that was killed: two checkpoints, the newer one half written.
    (tmp_path / "whole").rename(tmp_path / "killed")
    damaged, step = damage_last_checkpoint(tmp_path / "killed")
    wanted = load_file(damaged / "model.safetensors")
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        run_here(name, tmp_path, *options, "--output-dir", "killed", "--resume")
    found = load_file(damaged / "model.safetensors")
    assert step < 24 and found.keys() == wanted.keys() and all(found[key].equal(wanted[key]) for key in wanted)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """On packed rows, whose number differs from process to process, with a tokenizer that one of them trains."""
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in documents()])
    options = ["--dataset", "texts.jsonl", "--vocab-size", "300", "--max-steps", "6", "--pack"]
    printed = run_example(CAUSAL, tmp_path, *options, *SMALL, processes=2)
    assert printed.count("bits per byte, held out") == printed.count("held out; 300 tokens") == 1
    check_outputs(tmp_path / "out", "loss", "bits_per_byte")
    assert (tmp_path / "out" / "checkpoint-6" / "rng_state_1.pth").is_file()
    # The figures are of each held-out text once, however they were shared out.
    run_here(CAUSAL, tmp_path, *options, "--model", "out", "--learning-rate", "1e-30", *SMALL[:-1], "again")
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("out", "again")]
    assert results[0]["eval_tokens"] == results[1]["eval_tokens"]
    assert results[0]["eval_bits_per_byte"] == pytest.approx(results[1]["eval_bits_per_byte"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (MASKED, ["--family", "eff_reformer", "--vocab-size", "120", "--whole-word"]),
        (CAUSAL, ["--family", "eff_performer", "--vocab-size", "300"]),
    ],
)
def test_other_families_on_packed_streams(name: str, options: list[str], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in documents()])
    stream = ["--dataset", "texts.jsonl", "--streaming", "--max-steps", "3", "--max-eval-examples", "10"]
    printed = run_here(name, tmp_path, *stream, *SMALL, *options, "--pack")
    assert "a stream of rows of at most 32 tokens to learn" in printed
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == options[1]


@pytest.mark.parametrize("name", [MASKED, CAUSAL])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "none.txt"], "there is no file none.txt"),
        (["--dataset", "texts.txt", "--text-column", "body"], "no column 'body', it has text"),
        (["--dataset", "texts.txt", "--vocab-size", "3"], "vocab_size is 3, but"),
        (["--dataset", "numbers.csv"], "column 'text' of the training side has rows that are no str"),
        (["--dataset", "texts.txt", "--family", "eff_vit"], "argument --family: invalid choice: 'eff_vit'"),
        (["--dataset", "texts.txt", "--resume"], "holds no checkpoint to go on from"),
        (["--dataset", "texts.txt", "--streaming"], "--streaming goes with --dataset and --max-steps"),
    ],
)
def test_wrong_input_is_explained_in_one_line(name: str, options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(documents(12)))
    (tmp_path / "numbers.csv").write_text("text\n1\n2\n3\n")
    assert message in error_of(name, tmp_path, *options)


def test_what_a_model_cannot_do_is_said_before_it_trains(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(documents(12)))
    options = ["--dataset", "texts.txt", "--model", masked / "out", "--max-length", "64"]
    assert "--max-length is 64, but" in error_of(MASKED, tmp_path, *options)
    write_jsonl(tmp_path / "blank.jsonl", [{"text": " "}] * 3)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in documents(12)])
    options = ["--dataset", "rows.jsonl", "--eval-dataset", "blank.jsonl", "--model", masked / "out"]
    assert "nothing is masked on the evaluation side" in error_of(MASKED, tmp_path, *options)
    options = ["--dataset", "texts.txt"]
    bert = BertConfig(vocab_size=120, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(masked / "out").save_pretrained(tmp_path / "bert")
    line = error_of(MASKED, tmp_path, *options, "--model", "bert", "--max-length", "32", "--pack")
    assert "--pack: BertForMaskedLM cannot keep documents of a row apart" in line
    assert not list(tmp_path.glob("*/checkpoint-*"))
