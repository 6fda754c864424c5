"""Conversions of folders: what they may hold, what is written, the command, and reloading in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion_cases import CASES, OPTIONS, SEPARATOR, shard
from helpers import no_warnings, random_ids, tiny_tokenizer, tiny_wordpieces
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hf_efficient_attn
from hf_efficient_attn import convert
from hf_efficient_attn.cli import app
from hf_efficient_attn.conversion import read_options, saving


ROOT = Path(__file__).resolve().parents[1]


def save(folder: Path, kind: str = "bert", head: str = "ForMaskedLM", dtype: Any = None, **options: Any) -> Any:
    """A tiny source and what `save_pretrained` made of it."""
    model = CASES[kind].model(head)
    model.to(dtype or torch.float32).save_pretrained(folder, **options)
    return model


# Name -> (kind, head, family, dtype, options of save_pretrained).
FOLDERS: dict[str, tuple[str, str, str, torch.dtype, dict[str, Any]]] = {
    "plain": ("bert", "ForMaskedLM", "eff_longformer", torch.float32, {}),
    "sharded": ("electra", "ForPreTraining", "eff_nystromformer", torch.float32, {"max_shard_size": "20KB"}),
    "bfloat16": ("roberta", "ForSequenceClassification", "eff_big_bird", torch.bfloat16, {}),
    "projections": ("distilbert", "ForMultipleChoice", "eff_performer", torch.float32, {}),
    "summary": ("bert", "ForMultipleChoice", "eff_electra", torch.float32, {}),
    "spans": ("distilbert", "ForQuestionAnswering", "eff_big_bird", torch.float32, {}),
    "images": ("deit", "ForImageClassification", "eff_vit", torch.float32, {}),
}

RELOAD = """
import json, sys, torch, hf_efficient_attn, transformers, warnings
for folder in sys.argv[1:]:
    inputs, outputs, dtype = torch.load(f"{folder}/outputs.pt", weights_only=False)
    name = json.load(open(f"{folder}/config.json"))["architectures"][0]
    model, info = getattr(hf_efficient_attn, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == dtype, model.dtype
    with torch.no_grad():
        again = model.eval()(**inputs)
    for name, value in outputs.items():
        assert torch.allclose(again[name], value, atol=1e-6, rtol=1e-6), (folder, name)
    print("equal", folder)
"""


@torch.no_grad()
def test_converted_saved_and_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """From safetensors, shards and bfloat16."""
    written = []
    for name, (kind, head, to, dtype, options) in FOLDERS.items():
        source, out = tmp_path / name, tmp_path / f"{name}-out"
        save(source, kind, head, dtype, **options)
        if name == "sharded":
            assert len(shard(source)) > 2
        fields = {} if kind == "deit" else {"max_length": 120, "sep_token_id": SEPARATOR, **OPTIONS[to]}
        conversion = convert(source, to, **fields)
        assert conversion.model.dtype == dtype and conversion.save_pretrained(out) == out
        report = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
        assert (report["source"], report["target"]) == (kind, to) and report["measured"]
        ids = random_ids(2, 100)
        inputs = {"input_ids": ids[:, None] if head == "ForMultipleChoice" else ids}
        if kind == "deit":
            inputs = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
        outputs = {key: x for key, x in conversion.model(**inputs).items() if isinstance(x, torch.Tensor)}
        torch.save((inputs, outputs, dtype), out / "outputs.pt")
        written.append(str(out))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", RELOAD, *written], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("equal") == len(FOLDERS)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    save(tmp_path / "source", head="ForQuestionAnswering")
    tiny_wordpieces(70).save_pretrained(tmp_path / "source")
    conversion = convert(tmp_path / "source", "eff_longformer", max_length=150)
    assert conversion.model.config.sep_token_id == conversion.processor.sep_token_id == 3
    assert conversion.processor.model_max_length == 150
    conversion.save_pretrained(tmp_path / "out")
    with no_warnings():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(tokenizer) is transformers.BertTokenizer and tokenizer.model_max_length == 150
    assert tokenizer("the quick fox")["input_ids"] == [2, 5, 7, 9, 3]
    own = tiny_tokenizer(33)
    model = CASES["roberta"].model("ForMaskedLM", vocab_size=len(own))
    given = convert(model, "eff_longformer", processor=own, max_length=150)
    assert own.model_max_length == 33 and given.processor.model_max_length == 150, "the caller's stays as it is"
    assert given.report.measured[0].size == "68 tokens"


def test_question_answering_needs_to_know_the_separator() -> None:
    for kind, head in (("bert", "ForQuestionAnswering"), ("distilbert", "ForMultipleChoice")):
        with pytest.raises(ValueError, match="no separator is known.*give sep_token_id"):
            convert(CASES[kind].model(head), "eff_longformer")
    assert convert(CASES["roberta"].model("ForQuestionAnswering"), "eff_longformer").model.config.sep_token_id == 2


BROKEN = {
    "missing": (lambda state: state.pop("bert.encoder.layer.1.output.dense.weight"), "missing: bert.encoder.layer.1"),
    "unknown": (lambda state: state.update(extra=torch.ones(2)), "unknown: extra"),
    "misshapen": (
        lambda state: state.update({"cls.predictions.transform.dense.bias": torch.ones(5)}),
        "transform.dense",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_half_matching_weights_are_listed(how: str, tmp_path: Path) -> None:
    save(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    BROKEN[how][0](state)
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the weights of a BertForMaskedLM") as error:
        convert(tmp_path / "source", "eff_longformer")
    assert BROKEN[how][1] in str(error.value)


@pytest.mark.parametrize("how", ["cut off", "lost", "pickle"])
def test_broken_files_are_named(how: str, tmp_path: Path) -> None:
    model = save(tmp_path / "source", max_shard_size="20KB")
    if how == "pickle":
        for path in (tmp_path / "source").glob("model*"):
            path.unlink()
        torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    path = sorted((tmp_path / "source").glob("model-*" if how != "pickle" else "*.bin"))[-1]
    if how == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    named = "its weights cannot be read" if how == "pickle" else path.name
    with pytest.raises(ValueError, match=f"source.*{named}"):
        convert(tmp_path / "source", "eff_longformer")


def test_errors_of_writing_are_not_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path / "source")
    monkeypatch.setattr(saving.tempfile, "mkdtemp", full)
    result = run(tmp_path / "source", "--to", "eff_longformer", tmp_path / "out")
    assert result.exit_code == 2 and f"{tmp_path / 'out'} cannot be written: [Errno 28]" in result.output


def test_what_a_class_leaves_out_is_reported(tmp_path: Path) -> None:
    """Published BERT folders name the masked-LM class and hold the pooler and the next-sentence classifier too."""
    save(tmp_path, head="ForPreTraining")
    report = convert(tmp_path, "eff_longformer", architecture="BertForMaskedLM").report
    assert {"bert.pooler.dense.weight", "cls.seq_relationship.bias"} <= set(report.left_out)
    assert "left out   bert.pooler.dense.bias" in str(report)


BODIES = [("bert", "ForMaskedLM"), ("roberta", "ForSequenceClassification"), ("distilbert", "ForMaskedLM")]


@pytest.mark.parametrize(("kind", "head"), [*BODIES, ("electra", "ForPreTraining")])
@torch.no_grad()
def test_the_base_model_of_a_folder_with_a_head(kind: str, head: str, tmp_path: Path) -> None:
    """A pooler that is not there is the identity, never random; a weight of the body that is not known still raises."""
    source = save(tmp_path, kind, head)
    base = type(source.base_model).__name__
    conversion = convert(tmp_path, "eff_longformer", architecture=base)
    ids = random_ids(2, 20)
    ours, right = conversion.model(ids), source.base_model(ids)
    torch.testing.assert_close(ours.last_hidden_state, right.last_hidden_state, rtol=0, atol=1e-5)
    weight = conversion.model.pooler.dense.weight
    assert torch.equal(weight, torch.eye(len(weight)))
    assert conversion.report.left_out and "identity: the source has no pooler" in str(conversion.report)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if ".layer.1." in name)
    state[name.replace(".layer.1.", ".layer.9.")] = state[name].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"does not hold the weights of a {base}.*unknown: .*layer\.9"):
        convert(tmp_path, "eff_longformer", architecture=base)


def test_the_class_of_the_weights(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for names, message in ((None, "no architecture"), (["BertModel", "BertForMaskedLM"], "BertModel and BertForM")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"names {message}.*architecture='BertForMaskedLM'"):
            convert(tmp_path, "eff_longformer")
    assert convert(tmp_path, "eff_longformer", architecture="BertForMaskedLM").report.copied > 30
    for wrong in ("RobertaForMaskedLM", "Nonsense"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no class of transformers for a 'bert' config"):
            convert(tmp_path, "eff_longformer", architecture=wrong)
    with pytest.raises(ValueError, match=r"head \(LMHeadModel\) is none that eff_longformer can take over"):
        convert(CASES["bert"].model("LMHeadModel"), "eff_longformer")
    with pytest.raises(ValueError, match="is_decoder = True in the source: only encoders"):
        convert(CASES["bert"].model("Model", is_decoder=True), "eff_longformer")
    with pytest.raises(ValueError, match="a model object has its class already"):
        convert(CASES["bert"].model("Model"), "eff_longformer", architecture="BertModel")
    with pytest.raises(ValueError, match="source is a int"):
        convert(3, "eff_longformer")
    with pytest.raises(ValueError, match="'gpt2' model, which has no row"):
        convert(transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)), "eff_longformer")
    with pytest.raises(ValueError, match="to = 'eff_longfomer': from 'bert' choose one of"):
        convert(CASES["bert"].model("Model"), "eff_longfomer")


def test_wrong_options() -> None:
    source = CASES["bert"].model("ForMaskedLM")
    with pytest.raises(ValueError, match="has no option 'attention_windows'; did you mean 'attention_window'"):
        convert(source, "eff_longformer", attention_windows=8)
    with pytest.raises(ValueError, match="hidden_size = 8: it is taken from the source; leave it out"):
        convert(source, "eff_longformer", hidden_size=8)
    with pytest.raises(ValueError, match="pad_token_id = 1: it is taken from the source"):
        convert(source, "eff_longformer", pad_token_id=1)
    with pytest.raises(ValueError, match="max_position_embeddings = 99: .* give max_length"):
        convert(source, "eff_longformer", max_position_embeddings=99)
    with pytest.raises(ValueError, match="positions = 'stretch': choose one of tile, interpolate, init"):
        convert(source, "eff_longformer", positions="stretch")
    with pytest.raises(ValueError, match="max_length = 0: give 1 token or more"):
        convert(source, "eff_longformer", max_length=0)
    for length in ("4096", 100.5, True):
        with pytest.raises(ValueError, match=f"max_length = {length!r}: give a whole number of tokens, or None"):
            convert(source, "eff_longformer", max_length=length)
    with pytest.raises(ValueError, match="sample_length = 900: source and result both read 1 to 70 tokens"):
        convert(source, "eff_longformer", sample_length=900)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_command(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "deep" / "out"
    save(source, "roberta")
    options = ("--to", "eff_longformer", "--max-length", 200, "--option", "attention_window=[8, 16]")
    result = run(source, *options, out)
    assert result.exit_code == 0, result.output
    assert "roberta (RobertaForMaskedLM) -> eff_longformer (EffLongformerForMaskedLM)" in result.output
    assert f"pretrain_masked_lm.py --model {out}" in result.output and f"written    {out}" in result.output
    model = hf_efficient_attn.EffLongformerForMaskedLM.from_pretrained(out)
    assert model.config.attention_window == [8, 16] and model.config.max_input_length == 200
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing else is left beside it"

    again = run(source, *options, out)
    assert again.exit_code == 2 and "is not empty" in again.output and "--force" in again.output
    (out / "old-shard.safetensors").write_text("old", encoding="utf-8")
    assert run(source, *options, out, "--force").exit_code == 0
    assert not (out / "old-shard.safetensors").exists()
    back = run(out, "--to", "longformer", tmp_path / "back")
    assert back.exit_code == 0, back.output
    assert (
        type(transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "back")).__name__ == "LongformerForMaskedLM"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("SOURCE", "--to", "eff_reformer", "OUT"), "bert cannot become eff_reformer: its queries are keys"),
        (("SOURCE", "--to", "eff_longformer", "--option", "attention_window=3", "OUT"), "use 4"),
        (("SOURCE", "--to", "eff_longformer", "--option", "nonsense", "OUT"), "give name=value"),
        (("SOURCE", "--to", "eff_longformer", "--option", "max_length=3", "OUT"), "max_length is no field"),
        (("no/such/folder", "--to", "eff_longformer", "OUT"), "no/such/folder"),
        (("SOURCE", "--to", "eff_longformer", "SOURCE"), "holds the source"),
        (("SOURCE", "--to", "eff_longformer", "SOURCE/..", "--force"), "is the current folder or above"),
        (("SOURCE", "--to", "eff_longformer", "SOURCE/config.json"), "is a file"),
        (("SOURCE", "--to", "eff_longformer", "SOURCE/config.json/out"), "config.json is a file"),
        (("SOURCE", "--to", "eff_longformer", "OTHER", "--force"), "no model to replace"),
        (("SOURCE", "--to", "eff_longformer", ".", "--force"), "is the current folder"),
    ],
)
def test_errors_of_the_command_leave_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in" / "SOURCE")
    (tmp_path / "in" / "OTHER").mkdir()
    (tmp_path / "in" / "OTHER" / "letter.txt").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments)
    assert result.exit_code == 2 and "Error: " in result.output
    assert message in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failing_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CASES["bert"].model("ForMaskedLM")
    conversion = convert(source, "eff_longformer")
    conversion.save_pretrained(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(saving.json, "dumps", fails)
    for folder in ("out", "new"):
        with pytest.raises(RuntimeError, match="disk full"):
            conversion.save_pretrained(tmp_path / folder, force=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_there_comes_back_whatever_stops_the_exchange(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where it cannot be put back, it is not removed either."""
    conversion = convert(CASES["bert"].model("ForMaskedLM"), "eff_longformer")
    conversion.save_pretrained(tmp_path / "out")
    assert "\n# out\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    rename, failing = Path.rename, {"new"}

    def stopped(self: Path, target: Path) -> Path:
        if self.parent.name in failing or self.name in failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(error):
        conversion.save_pretrained(tmp_path / "out", force=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    failing.add("old")
    with pytest.raises(error):
        conversion.save_pretrained(tmp_path / "out", force=True)
    (kept,) = tmp_path.glob(".out-*/old")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_what_is_not_a_models_is_never_replaced(tmp_path: Path) -> None:
    conversion, out = convert(CASES["roberta"].model("ForMaskedLM"), "eff_longformer"), tmp_path / "out"
    conversion.save_pretrained(out)
    (out / "README.md").write_text("# My own words\n", encoding="utf-8")
    (out / "checkpoint-5").mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="out holds checkpoint-5, thesis.txt, which no saved model has"):
        conversion.save_pretrained(out, force=True)
    (out / "checkpoint-5").rmdir()
    (out / "thesis.txt").unlink()
    conversion.save_pretrained(out, force=True)
    convert(conversion.model, "longformer").save_pretrained(out, force=True)
    assert (out / "README.md").read_text(encoding="utf-8") == "# My own words\n"
    for text in ("{}", "[]", "no json"):
        (out / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no config.json with a model_type, so no model to replace"):
            conversion.save_pretrained(out, force=True)


def test_a_folder_above_the_source(tmp_path: Path) -> None:
    save(tmp_path / "in" / "source")
    (tmp_path / "in" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="in holds the source"):
        saving.check_folder(tmp_path / "in", True, str(tmp_path / "in" / "source"))


def test_options_as_text() -> None:
    pairs = ["attention_window=[8, 16]", "attention=longformer", 'attention_options={"attention_window": 8}', "a=null"]
    assert read_options(pairs) == {
        "attention_window": [8, 16],
        "attention": "longformer",
        "attention_options": {"attention_window": 8},
        "a": None,
    }
    assert read_options(None) == {}
    with pytest.raises(ValueError, match="each name once"):
        read_options(["a=1", "a=2"])
    for name in ("output_dir", "source", "force", "seed", "token", "sample_text", "sample_length", "processor"):
        with pytest.raises(ValueError, match=f"{name} is no field of the config; --help lists the options"):
            read_options([f"{name}=3"])
