"""The demo: its corpus keeps files apart, its parts train, save and load, its command runs and explains itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from typer.testing import CliRunner

from hf_efficient_attn.bench import require_extras
from hf_efficient_attn.cli import app
from hf_efficient_attn.demo import (
    QUICK,
    Corpus,
    SourceFile,
    TimeLimit,
    cap_per_label,
    cut_documents,
    finetune,
    read_packages,
    run_demo,
    small_config,
    split_by_file,
    stdlib_corpus,
    tokenize_texts,
    train_tokenizer,
)
from hf_efficient_attn.demo.baselines import bag_of_tokens_accuracy, majority_accuracy
from hf_efficient_attn.demo.run import check_saved_model


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return stdlib_corpus(256, num_packages=3, vocab_size=512, max_per_label=6)


def test_the_standard_library_has_packages_to_tell_apart() -> None:
    packages = read_packages(10)
    assert 5 <= len(packages) <= 10 and list(packages) == sorted(packages)
    for name, files in packages.items():
        assert len(files) >= 4
        assert all(file.package == name and file.path.split("/")[0] == name for file in files)
        assert not any(folder in file.path for file in files for folder in ("/test/", "/tests/", "/idle_test/"))


def test_no_file_is_on_both_sides(corpus: Corpus) -> None:
    packages = read_packages(10)
    for seed in range(3):
        train, held_out = split_by_file(packages, 0.25, seed)
        assert not {file.path for file in train} & {file.path for file in held_out}
        assert len(train) + len(held_out) == sum(len(files) for files in packages.values())
        assert {file.package for file in train} == {file.package for file in held_out} == set(packages)
        share = sum(len(file.text) for file in held_out) / sum(len(f.text) for fs in packages.values() for f in fs)
        assert 0.15 < share < 0.35
    assert split_by_file(packages, 0.25, 1) == split_by_file(packages, 0.25, 1) != split_by_file(packages, 0.25, 2)
    assert not set(corpus.train["file"]) & set(corpus.eval["file"])


def test_documents_are_plain_text_of_their_file_with_its_label(corpus: Corpus) -> None:
    texts = {file.path: file.text for files in read_packages(10).values() for file in files}
    for side in (corpus.train, corpus.eval):
        assert side.column_names == ["text", "label", "file"] and side.features["label"].names == corpus.labels
        for row in side:
            assert corpus.labels[row["label"]] == row["file"].split("/")[0]
            assert row["text"] in texts[row["file"]]


def test_documents_of_a_file_join_to_the_file_and_fit(corpus: Corpus) -> None:
    text = "".join(f"def name_{i}(x):\n    return x + {i}\n\n" for i in range(400))
    documents = cut_documents([SourceFile("p", "p/a.py", text)], corpus.tokenizer, 256, min_length=1)
    assert len(documents) > 10 and "".join(document["text"] for document in documents) == text
    assert all(document["label"] == "p" and document["file"] == "p/a.py" for document in documents)
    lengths = [len(corpus.tokenizer(document["text"])["input_ids"]) for document in documents]
    assert max(lengths) <= 256 and min(lengths[:-1]) > 128
    # A file without line ends is cut all the same.
    line = SourceFile("p", "p/b.py", "x = 1; " * 2000)
    assert max(len(corpus.tokenizer(d["text"])["input_ids"]) for d in cut_documents([line], corpus.tokenizer, 64)) <= 66


def test_at_most_so_many_documents_a_label() -> None:
    documents = [{"label": "ab"[i % 2], "text": str(i)} for i in range(20)]
    kept = cap_per_label(documents, 3, seed=1)
    assert [document["label"] for document in kept].count("a") == 3 and len(kept) == 6
    assert kept == cap_per_label(documents, 3, seed=1) and cap_per_label(documents, 99) == documents


def test_the_tokenizer_is_built_like_roberta_s_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["import os\nprint(os.name)\n"] * 20, vocab_size=280, max_length=32)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (each.bos_token_id, each.pad_token_id, each.eos_token_id, each.mask_token_id) == (0, 1, 2, 4)
        assert (each.cls_token_id, each.sep_token_id, each.model_max_length) == (0, 2, 32)
        encoding = each("import os\n\tß")
        assert list(encoding) == ["input_ids", "attention_mask"]
        assert encoding["input_ids"][0] == 0 and encoding["input_ids"][-1] == 2
        assert each.decode(encoding["input_ids"], skip_special_tokens=True) == "import os\n\tß"
        assert each("a", "b")["input_ids"].count(2) == 3
        assert len(each("x " * 500, truncation=True)["input_ids"]) == 32


def test_finetuning_learns_saves_and_repeats(corpus: Corpus, tmp_path: Path) -> None:
    # Labels that one token gives away: a few steps are enough.
    texts = {"label": [0, 1] * 16, "text": ["red apple " * 20, "blue sky " * 20] * 16}
    side = corpus.train.from_dict(texts)
    easy = Corpus(side, side, ["fruit", "air"], train_tokenizer(texts["text"], 300, 64))
    state = torch.random.get_rng_state()
    tiny = {"hidden_size": 16, "attention_window": 8, "num_hidden_layers": 1}
    trainers = [finetune(easy, tmp_path / name, epochs=3, learning_rate=1e-2, **tiny) for name in ("a", "b")]
    torch.random.set_rng_state(state)

    predicted = [trainer.predict(trainer.eval_dataset) for trainer in trainers]
    assert predicted[0].metrics["test_accuracy"] == 1.0
    np.testing.assert_array_equal(predicted[0].predictions, predicted[1].predictions)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "a").iterdir()}

    logits = torch.as_tensor(predicted[0].predictions)
    assert check_saved_model(tmp_path / "a", side, logits) < 1e-4
    with pytest.raises(RuntimeError, match="classified differently after loading"):
        check_saved_model(tmp_path / "a", side, -logits)


def test_predictions_stay_in_the_order_of_the_documents(corpus: Corpus, tmp_path: Path) -> None:
    trainer = finetune(corpus, tmp_path, epochs=0.1, hidden_size=16, attention_window=8)
    expected = trainer.predict(trainer.eval_dataset).predictions
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    rows = tokenize_texts(corpus.eval, corpus.tokenizer, 256).remove_columns("labels")
    with torch.inference_mode():
        alone = [model(**DataCollatorWithPadding(corpus.tokenizer)([row])).logits[0].numpy() for row in rows]
    np.testing.assert_allclose(np.stack(alone), expected, atol=1e-4)


def test_training_ends_when_its_time_is_over(corpus: Corpus, tmp_path: Path) -> None:
    trainer = finetune(corpus, tmp_path, epochs=50, max_seconds=0.0, hidden_size=16, attention_window=8)
    assert trainer.state.global_step == 1
    assert [c.reached for c in trainer.callback_handler.callbacks if isinstance(c, TimeLimit)] == [True]


def test_the_small_config_takes_the_tokenizer_s_ids_and_any_field(corpus: Corpus) -> None:
    config = small_config(corpus.tokenizer, ["a", "b"], 256, num_hidden_layers=1)
    assert (config.vocab_size, config.max_input_length, config.num_labels) == (512, 256, 2)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert config.id2label == {0: "a", 1: "b"} and config.label2id == {"a": 0, "b": 1}
    assert config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="attention_windwo"):
        small_config(corpus.tokenizer, ["a", "b"], 256, attention_windwo=8)


def test_baselines() -> None:
    assert majority_accuracy([0, 1, 1, 1]) == 0.75
    ids = [[0, 5, 5, 2], [0, 6, 6, 6, 2]] * 4
    assert bag_of_tokens_accuracy(ids, [0, 1] * 4, ids[:2], [0, 1], 7) == 1.0


def test_the_whole_demo_runs_without_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", FutureWarning)
        report = run_demo(tmp_path, settings=QUICK)
    out, err = capsys.readouterr()
    assert 0.0 <= report.accuracy <= 1.0 and report.majority < 1.0 and report.bag_of_tokens > report.majority
    assert {result.case.kind for result in report.results} == {"eff_longformer", "longformer", "bert"}
    assert all(result.status == "ok" for result in report.results), report.results
    for name in ("model/model.safetensors", "benchmark.csv", "benchmark.png"):
        assert (tmp_path / name).is_file() and (tmp_path / name).stat().st_size > 100
    assert "Summary" in out and str(tmp_path / "benchmark.png") in out
    assert "warn" not in (out + err).lower()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: read_packages(1), "num_packages is 1"),
        (lambda path: read_packages(stdlib=path), "holds 0 of the standard library's packages"),
        (lambda path: split_by_file({}, 1.5), "eval_fraction is 1.5"),
        (lambda path: split_by_file({"p": [SourceFile("p", "p/a.py", "x")]}), "package 'p' has 1 file"),
        (lambda path: train_tokenizer(["x"], vocab_size=100), "vocab_size is 100.*261"),
        (lambda path: stdlib_corpus(2, num_packages=2), "max_length is 2"),
        (lambda path: require_extras("no_such_module"), r'no_such_module.*pip install "hf_efficient_attn\[demo\]"'),
    ],
)
def test_wrong_arguments_name_the_fix(call, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_the_command_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find(name, *a))
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "sklearn cannot be imported" in result.stderr and 'pip install "hf_efficient_attn[demo]"' in result.stderr


def test_the_command_lists_its_options() -> None:
    for command, option in (("demo", "--output-dir"), ("bench", "--lengths")):
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
        assert result.exit_code == 0 and option in result.output
