"""ONNX programs of every family and head: equal to the model in onnxruntime at other sizes, padded and not."""

import json
import shutil
from pathlib import Path

import numpy
import onnxruntime
import pytest
import test_vision_families as vision
import torch
from helpers import config_class, one_layer, random_images, tiny_config
from test_families import HEADS, batch_of, build
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel
from typer.testing import CliRunner

from hf_efficient_attn import (
    EffElectraForJointPreTraining,
    EffElectraJointConfig,
    EffLongformerForMaskedLM,
    export_onnx,
)
from hf_efficient_attn.attention import ATTENTIONS
from hf_efficient_attn.cli import app


SHAPES = [(1, 1), (1, 63), (3, 65), (2, 120)]
RULED_HEADS = ("AutoModelForSequenceClassification", "AutoModelForQuestionAnswering", "AutoModelForMultipleChoice")
FIRST = "eff_nystromformer"  # the family whose programs are made the quickest


def open_program(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: x.numpy() for name, x in inputs.items()})
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}


def text_inputs(model: PreTrainedModel, auto: str, batch: int, length: int, side: str | None) -> dict[str, Tensor]:
    """Ids, mask and types; padding holds other tokens than the pad token."""
    inputs = batch_of(model, auto, batch, length, seed=length)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if side is not None and length > 3:
        padding = slice(length // 3) if side == "left" else slice(length - length // 3, None)
        inputs["attention_mask"][-1, ..., padding] = 0
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = inputs["input_ids"] % 2
    return inputs


@torch.no_grad()
def check(session: onnxruntime.InferenceSession, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    asks = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    right, found = model(**inputs, **asks), run(session, inputs)
    assert set(found) == set(right.keys())
    for name, expected in right.items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-4)


def refuses_longer_texts(session: onnxruntime.InferenceSession, model: PreTrainedModel) -> None:
    """What the model refuses, the program or its runtime does not answer."""
    inputs = text_inputs(model, "AutoModel", 2, model.config.max_input_length + 1, None)
    with pytest.raises(ValueError, match="more than the"):
        model(**inputs)
    try:
        found = run(session, inputs)
    except Exception as error:  # onnxruntime has a class for each code
        assert "out of data bounds" in str(error), error
    else:
        assert all(x.isnan().all() for x in found.values())


@pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{family}-{auto}" for family, auto in HEADS])
def test_a_program_is_the_model_at_any_shape(family: str, auto: str, tmp_path: Path) -> None:
    # All kinds of layers in the base model, and one layer where the head's rules reach into it. Other heads alone.
    options = {} if auto == "AutoModel" else one_layer(family)
    if "max_global_tokens" in config_class(family).__dataclass_fields__:
        options["max_global_tokens"] = 120  # some heads' rules make all tokens but a few global
    model = build(family, auto, **options)
    has_rules = "max_global_tokens" in options and auto in RULED_HEADS
    if not (has_rules or auto in ("AutoModel", "AutoModelForCausalLM")):
        layers = "layer" if hasattr(model.base_model.encoder, "layer") else "layers"
        setattr(model.base_model.encoder, layers, nn.ModuleList())
    made = export_onnx(model, tmp_path / "model.onnx")
    assert 0 <= made.error < 1e-4
    session = open_program(made.path)
    for number, (batch, length) in enumerate(SHAPES):
        inputs = text_inputs(model, auto, batch, length, (None, "left", "right", "left")[number])
        check(session, model, inputs)
    if auto == "AutoModel":
        refuses_longer_texts(session, model)
    middle = ["choices"] if auto == "AutoModelForMultipleChoice" else []
    assert {x.name: x.shape for x in session.get_inputs()} == {name: ["batch", *middle, "length"] for name in inputs}


@pytest.mark.parametrize(
    ("family", "auto", "options"),
    [
        ("eff_big_bird", "AutoModel", {"num_global_tokens": 4, "block_size": 16}),
        (
            "eff_longformer",
            "AutoModelForSequenceClassification",
            {"global_attention": [5, 7], "max_global_tokens": 120},
        ),
    ],
)
def test_options_that_change_the_graph(family: str, auto: str, options: dict, tmp_path: Path) -> None:
    model = build(family, auto, **one_layer(family), **options)
    session = open_program(export_onnx(model, tmp_path / "model.onnx").path)
    for batch, length in SHAPES:
        check(session, model, text_inputs(model, auto, batch, length, "right"))


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM"])
def test_global_tokens_are_an_input_on_request(auto: str, tmp_path: Path) -> None:
    model = build("eff_longformer", auto, **one_layer("eff_longformer"), max_global_tokens=3)
    made = export_onnx(model, tmp_path / "model.onnx", more_inputs=["global_attention_mask", "position_ids"])
    session = open_program(made.path)
    inputs = text_inputs(model, auto, 2, 50, "right")
    inputs["position_ids"] = torch.arange(50).flip(0).expand(2, -1).clone()
    inputs["global_attention_mask"] = torch.zeros(2, 50, dtype=torch.long)
    check(session, model, inputs)
    inputs["global_attention_mask"][0, :3] = 1
    inputs["global_attention_mask"][1, :2] = 1
    check(session, model, inputs)
    inputs["global_attention_mask"][0, 3] = 1
    assert all(x.isnan().all() for x in run(session, inputs).values()), "one more than there is room for"
    if auto == "AutoModelForCausalLM":
        inputs["global_attention_mask"][0, :4] = torch.tensor([1, 0, 1, 0])
        assert all(x.isnan().all() for x in run(session, inputs).values()), "no prefix"


VISION = [(family, auto, "softmax") for family, auto in vision.HEADS]
VISION += [(family, "AutoModel", mechanism) for family in vision.VISION_FAMILIES for mechanism in ATTENTIONS]


@pytest.mark.parametrize(("family", "auto", "mechanism"), dict.fromkeys(VISION))
@torch.no_grad()
def test_a_program_of_images_is_the_model_at_any_size(family: str, auto: str, mechanism: str, tmp_path: Path) -> None:
    model = vision.build(family, auto, mechanism, **vision.one_layer_of(mechanism))
    session = open_program(export_onnx(model, tmp_path / "model.onnx").path)
    for rows, *size in [(1, 20, 28), (3, 17, 30), (2, 44, 9)]:
        inputs = {"pixel_values": random_images(rows, *size)}
        found = (
            next(reversed(run(session, inputs).values()))
            if auto != "AutoModel"
            else run(session, inputs)["last_hidden_state"]
        )
        torch.testing.assert_close(found, vision.result_of(model, inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("more", [(), ("patch_mask",)])
@torch.no_grad()
def test_images_in_whole_patches(more: tuple[str, ...], tmp_path: Path) -> None:
    model = vision.build("eff_vit", "AutoModel", num_hidden_layers=1, uneven_size="pad" if more else "refuse")
    session = open_program(export_onnx(model, tmp_path / "model.onnx", more_inputs=more).path)
    inputs = {"pixel_values": random_images(3, 24, 16)}
    keep = torch.ones(3, 2 + 24, dtype=torch.bool)
    if more:
        inputs["patch_mask"] = torch.ones(3, 6, 4, dtype=torch.long)
        inputs["patch_mask"][-1, 4:], inputs["patch_mask"][1, :, :2] = 0, 0
        keep[:, 2:] = inputs["patch_mask"].flatten(1).bool()
    right = model(**inputs)
    found = run(session, inputs)
    torch.testing.assert_close(found["last_hidden_state"][keep], right.last_hidden_state[keep], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["pooler_output"], right.pooler_output, rtol=0, atol=1e-4)
    if not more:
        with pytest.raises(Exception, match="cannot be reshaped"):  # onnxruntime has a class for each code
            run(session, {"pixel_values": random_images(3, 23, 16)})


def test_the_command_exports_a_folder(tmp_path: Path) -> None:
    model = build(FIRST, "AutoModelForMaskedLM")
    model.bfloat16().save_pretrained(tmp_path)  # read in float32
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--onnx", "--input", "labels"])
    assert result.exit_code == 2 and "Error: input 'labels': a program of" in result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--onnx", "--opset", "20"])
    assert result.exit_code == 0, result.output
    assert "inputs input_ids, attention_mask" in result.output and "operator set 20" in result.output
    check(open_program(tmp_path / "onnx" / "model.onnx"), model.float(), text_inputs(model, "AutoModel", 2, 33, "left"))
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["model.onnx"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    """Each part's mode, the random numbers; and a program says nothing of where it was made."""
    model = build(FIRST, "AutoModelForMaskedLM", **one_layer(FIRST)).train()
    frozen = model.base_model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        made = export_onnx(model, tmp_path / "model.onnx", more_inputs="position_ids")
    assert [module.training for module in model.modules()] == modes and not frozen.training
    assert torch.equal(torch.get_rng_state(), state)
    assert made.inputs == ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    data = made.path.read_bytes()
    assert b"hf_efficient_attn" not in data and b".py" not in data
    export_onnx(model, tmp_path / "model.onnx", more_inputs="position_ids")
    assert made.path.read_bytes() == data


def test_a_program_that_differs_takes_nobodys_place(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    model = build(FIRST, "AutoModel", num_hidden_layers=1).train()
    with pytest.raises(ValueError, match=r"differ from the model's by .* tolerance = 0;"):
        export_onnx(model, path, tolerance=0.0)
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]
    assert model.training, "as it was"


def test_models_that_no_program_holds_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = build(FIRST, "AutoModel")
    joint = EffElectraForJointPreTraining(
        EffElectraJointConfig(generator=tiny_config("eff_electra"), discriminator=tiny_config("eff_electra"))
    )
    flex = build("eff_longformer", "AutoModel", attn_implementation="flex_attention")
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    for source, options, message in [
        (joint, {}, "'eff_electra_joint': it draws .*at random"),
        (bert, {}, "'bert' is no family of the package"),
        (nn.Linear(2, 2), {}, "is a Linear, no model of transformers"),
        (3, {}, "source is a int"),
        (flex, {}, "'flex_attention': no operator set holds it"),
        (build(FIRST, "AutoModel").bfloat16(), {}, r"in torch.bfloat16; .*model.float\(\)"),
        (model, {"opset": 17}, "opset = 17: .* 18 to 23"),
        (model, {"opset": "18"}, "opset = '18'"),
        (model, {"opset": 24}, "opset = 24"),
        (model, {"tolerance": -1.0}, "tolerance = -1.0"),
        (model, {"tolerance": "x"}, "tolerance = 'x'"),
        (
            model,
            {"more_inputs": ["document_ids"]},
            "'document_ids': a program of EffNystromformerModel reads input_ids",
        ),
        (model, {"more_inputs": ["global_attention_mask"]}, "'global_attention_mask': a program"),
        (tmp_path, {}, "no architecture|config.json"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            export_onnx(source, path, **options)
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        export_onnx(model, tmp_path / "model.bin")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; choose another folder"):
        export_onnx(model, tmp_path / "file" / "model.onnx")
    (tmp_path / "file").unlink()
    with pytest.raises(ValueError, match="say where that of a model goes"):
        export_onnx(model)
    assert not list(tmp_path.iterdir())


def test_a_hook_that_looks_at_values_is_refused(tmp_path: Path) -> None:
    model = build(FIRST, "AutoModel", **one_layer(FIRST))
    model.encoder.layer[0].register_forward_hook(lambda module, given, made: print(float(made[0].sum())))
    with pytest.raises(ValueError, match="EffNystromformerModel is not one graph: .*hooks"):
        export_onnx(model, tmp_path / "model.onnx")


def test_an_operator_without_a_translation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_efficient_attn.onnx import operators

    monkeypatch.setattr(operators, "TRANSLATIONS", {})
    model = build("eff_reformer", "AutoModel", **one_layer("eff_reformer"))
    with pytest.raises(ValueError, match="operator set 18 has for EffReformerModel no form of aten.sort"):
        export_onnx(model, tmp_path / "model.onnx")


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no config.json"):
        export_onnx(tmp_path)
    EffLongformerForMaskedLM(tiny_config("eff_longformer")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "architectures": ["EffLongformerForTokenClassification"]}))
    with pytest.raises(ValueError, match="missing: classifier.bias, classifier.weight"):
        export_onnx(tmp_path)
    assert not (tmp_path / "onnx").exists()
    for arguments, message in [
        (["--onnx", "--push-to", "me/it"], "first export --onnx"),
        (["--opset", "18"], "--opset is an option of --onnx"),
    ]:
        result = CliRunner().invoke(app, ["export", str(tmp_path), *arguments])
        assert result.exit_code == 2 and message in result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "hf_efficient_attn\[onnx\]"'):
        export_onnx(tmp_path)
    shutil.rmtree(tmp_path)


def test_weights_over_the_limit_of_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program names its file of weights; both move together."""
    from torch.onnx import ONNXProgram

    save = ONNXProgram.save
    monkeypatch.setattr(ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    model = build(FIRST, "AutoModel", num_hidden_layers=1)
    made = export_onnx(model, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    found = run(open_program(made.path), text_inputs(model, "AutoModel", 1, 9, None))
    assert numpy.isfinite(found["last_hidden_state"].numpy()).all()
