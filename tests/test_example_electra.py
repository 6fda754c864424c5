"""The pretraining example as a user runs it: on small files, interrupted and resumed, and with wrong input."""

import csv
from pathlib import Path

import pytest
from example_runs import check_outputs, damage_last_checkpoint, error_of, run_example, run_here, write_jsonl
from helpers import no_warnings
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_efficient_attn import EffElectraForPreTraining, EffNystromformerForReplacedTokenDetection


NAME = "pretrain_electra"
SHORT = ["--max-length", "16", "--batch-size", "4", "--vocab-size", "200"]
WORDS = "the quick brown fox jumps over a lazy dog and reads about attention in long texts".split()
LINES = [" ".join(WORDS[i % 7 :: 1 + i % 3]) for i in range(200)]
DATA = ["--dataset", "texts.txt", "--output-dir", "out"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `texts.txt` and both models in `out`, after six steps."""
    folder = tmp_path_factory.mktemp("electra")
    (folder / "texts.txt").write_text("\n".join(LINES))
    printed = run_example(NAME, folder, *SHORT, *DATA, "--max-steps", "6")
    assert "held out, after 6 steps" in printed and "replaced recall" in printed
    return folder


def test_from_a_text_file_to_two_models(pretrained: Path) -> None:
    out = pretrained / "out"
    with no_warnings():
        EffElectraForPreTraining.from_pretrained(out / "discriminator")
        AutoModelForMaskedLM.from_pretrained(out / "generator")
    model = AutoModelForSequenceClassification.from_pretrained(out / "discriminator", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(out / "discriminator")
    assert model(**tokenizer("the fox", return_tensors="pt")).logits.shape == (1, 2)
    check_outputs(out, "generator_loss", "discriminator_loss", "replaced_recall")
    rows = list(csv.DictReader((out / "training.csv").open()))
    assert [row["step"] for row in rows if row["generator_loss"]] == [str(step) for step in range(1, 7)]
    assert any(row["eval_replaced_recall"] for row in rows)


def test_goes_on_after_a_break(pretrained: Path) -> None:
    out = pretrained / "out"
    damaged, _ = damage_last_checkpoint(out)
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        printed = run_here(NAME, pretrained, *SHORT, *DATA, "--max-steps", "8", "--resume")
    assert (out / "checkpoint-8").is_dir() and "after 8 steps" in printed
    other = error_of(NAME, pretrained, *SHORT, *DATA, "--max-steps", "9", "--resume", "--family", "eff_performer")
    assert "checkpoint-8 is of another model" in other and not (out / "checkpoint-9").exists()


def test_models_are_pretrained_further_on_a_stream(pretrained: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": line} for line in LINES])
    stream = ["--dataset", "rows.jsonl", "--streaming", "--max-eval-examples", "20", "--max-steps", "2"]
    printed = run_here(NAME, tmp_path, *SHORT, *stream, "--model", pretrained / "out", "--output-dir", "joint")
    assert "a stream of blocks" in printed
    pair = ["--model", pretrained / "out" / "discriminator", "--generator", pretrained / "out" / "generator"]
    run_here(NAME, tmp_path, *SHORT, *stream, *pair, "--output-dir", "pair", "--gradient-checkpointing")
    alone = error_of(NAME, tmp_path, *SHORT, *stream, *pair[:2], "--output-dir", "alone")
    assert "is a eff_electra, one of two models: name the other one with --generator" in alone


def test_another_family_and_objective(pretrained: Path, tmp_path: Path) -> None:
    options = ["--family", "eff_nystromformer", "--objective", "electra_15", "--sharing", "none", "--whole-word"]
    run_here(NAME, tmp_path, *SHORT, "--dataset", pretrained / "texts.txt", "--max-steps", "2", *options)
    EffNystromformerForReplacedTokenDetection.from_pretrained(tmp_path / "electra" / "discriminator")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "none.txt"], "Error: there is no file none.txt"),
        (["--dataset", "texts.txt", "--text-column", "body"], "no column 'body', it has text"),
        (["--dataset", "texts.txt", "--resume"], "holds no checkpoint to go on from"),
        (["--dataset", "empty.txt"], "Error: empty.txt"),
        (["--dataset", "one.txt"], "one.txt has 1 rows, and both sides need one"),
        (["--dataset", "two.txt"], "Error: "),
        (["--dataset", "numbers.csv"], "column 'text' of the training side has rows that are no str"),
        (["--dataset", "texts.txt", "--tokenizer", "nowhere"], "Error: "),
        (["--dataset", "texts.txt", "--sharing", "all"], "give both the same size, or set sharing = 'none'"),
        (["--dataset", "texts.txt", "--family", "eff_reformer"], "eff_reformer has no such choice; leave it out"),
        (["--dataset", "texts.txt", "--generator", "nowhere"], "--generator goes with --model"),
        (["--max-steps", "-3"], "argument --max-steps: -3 is not a whole number above 0"),
    ],
)
def test_wrong_input_is_explained_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    texts = {"texts.txt": "\n".join(LINES), "empty.txt": "", "one.txt": "a b", "two.txt": "a\nb"}
    for name, text in {**texts, "numbers.csv": "text\n1\n2\n3\n"}.items():
        (tmp_path / name).write_text(text)
    assert message in error_of(NAME, tmp_path, *SHORT, "--max-steps", "1", *options)
