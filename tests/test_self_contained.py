"""Folders that carry their code: loaded by a process that has no such package, and natively."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import model_class, no_warnings, random_ids, random_images, randomise_, tiny_config
from torch import Tensor

from hf_efficient_attn import FAMILIES, EffElectraConfig, EffElectraForJointPreTraining, EffElectraJointConfig
from hf_efficient_attn.hub.code_file import class_names, code_of
from hf_efficient_attn.hub.exporting import export_folder


ROOT = Path(__file__).resolve().parents[1]
HEADS = [(family, auto) for family, row in FAMILIES.items() for auto in row.heads]

# The first test waits for the process in which all others' models are loaded.
pytestmark = pytest.mark.timeout(900)

# A process that has no package. It reads rows of (Auto class, folder) and writes what it saw.
CLEAN = """
import inspect, json, pickle, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_efficient_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import hf_efficient_attn
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported, so nothing would be shown")

import torch, transformers
from transformers import dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# Read for its imports at each load; here each file once.
get_imports, known = dynamic_module_utils.get_imports, {}
def imports_of(path):
    text = Path(path).read_bytes()
    if text not in known:
        known[text] = get_imports(path)
    return known[text]
dynamic_module_utils.get_imports = imports_of

def first(model, inputs):
    with torch.no_grad():
        found = model.eval()(**inputs)[0]
    return found[0] if isinstance(found, tuple) else found

def load(auto, folder):
    if auto == "AutoBackbone":  # which takes any local folder for a timm model
        name = json.loads((Path(folder) / "config.json").read_text())["auto_map"][auto]
        return get_class_from_dynamic_module(name, folder).from_pretrained(folder, output_loading_info=True)
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)

rows, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
seen = []
for number, (auto, folder) in enumerate(rows):
    inputs = torch.load(f"{folder}/inputs.pt")
    model, report = load(auto, folder)
    row = {"class": type(model).__name__, "module": type(model).__module__, "folder": folder}
    row["loaded"] = not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    result = first(model, inputs)
    torch.save(result, f"{folder}/result.pt")
    again = out / str(number) / Path(folder).name
    model.save_pretrained(again)
    row["again"] = str(again)
    row["saved"] = bool(torch.allclose(first(load(auto, str(again))[0], inputs), result, atol=1e-6))
    if auto == "AutoModel":
        row["pickled"] = bool(torch.allclose(first(pickle.loads(pickle.dumps(model)), inputs), result, atol=1e-6))
        row["source"] = inspect.getsource(type(model)).startswith(f"class {type(model).__name__}(")
        model.gradient_checkpointing_enable()
        model.train()(**inputs)[0].square().sum().backward()
        row["trains"] = any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    if auto == "AutoModelForImageClassification":
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        row["compiled"] = bool(torch.allclose(first(compiled, inputs), result, atol=1e-5))
    seen.append(row)
(out / "seen.json").write_text(json.dumps(seen))
"""


def inputs_of(family: str, auto: str) -> dict[str, Tensor]:
    """A small batch for a head."""
    if FAMILIES[family].image_processor is not None:
        return {"pixel_values": random_images(2)}
    ids = random_ids(2, 21)
    return {"input_ids": torch.stack([ids, ids.flip(1)], dim=1) if auto == "AutoModelForMultipleChoice" else ids}


def saved(folder: Path, family: str, auto: str, **options: Any) -> transformers.PreTrainedModel:
    """A random model, saved there with its code."""
    config = tiny_config(family, is_decoder=True) if auto == "AutoModelForCausalLM" else tiny_config(family)
    model = randomise_(model_class(family, auto)(config))
    model.save_pretrained(folder, self_contained=True, **options)
    return model


def first(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first output."""
    with torch.no_grad():
        found = model.eval()(**inputs)[0]
    return found[0] if isinstance(found, tuple) else found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """(family, Auto class) -> what the process without the package saw, and what it should have computed."""
    folder = tmp_path_factory.mktemp("clean")
    rows = []
    expected = {}
    for family, auto in HEADS:
        # One name for all folders of a family: transformers then loads its code once.
        path = folder / auto / family
        model, inputs = saved(path, family, auto), inputs_of(family, auto)
        torch.save(inputs, path / "inputs.pt")
        expected[family, auto] = first(model, inputs)
        rows.append((auto, str(path)))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "out").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONPATH"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-W", "error:::transformers_modules", "-c", CLEAN, "rows.json", "out"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    seen = json.loads((folder / "out" / "seen.json").read_text())
    for result, row in zip(expected.values(), seen, strict=True):
        row |= {"expected": result, "result": torch.load(Path(row["folder"]) / "result.pt")}
        row["again"] = folder / row["again"]
    assert "trust_remote_code" not in done.stderr and "newly initialized" not in done.stderr, done.stderr
    return dict(zip(expected, seen, strict=True))


@pytest.mark.parametrize(("family", "auto"), HEADS)
def test_a_process_without_the_package_computes_the_same(family: str, auto: str, clean: dict) -> None:
    row = clean[family, auto]
    assert row["class"] == FAMILIES[family].model_names[auto]
    assert row["module"].startswith("transformers_modules.") and row["loaded"]
    assert torch.allclose(row["result"], row["expected"], atol=1e-6), (row["result"] - row["expected"]).abs().max()
    # What it saved loads there again, and has code and entries for all heads.
    assert row["saved"]
    config = json.loads((row["again"] / "config.json").read_text())
    code = code_of(family)
    assert config["auto_map"] == code.auto_map
    assert (row["again"] / code.name).read_text(encoding="utf-8") == code.text
    if auto == "AutoModel":
        assert row["pickled"] and row["source"] and row["trains"]


def test_it_compiles_without_the_package(clean: dict) -> None:
    assert [row["compiled"] for row in clean.values() if "compiled" in row] == [True]


@pytest.mark.parametrize(("family", "auto"), HEADS)
def test_the_package_loads_the_same_folders_in_its_own_classes(family: str, auto: str, clean: dict) -> None:
    cls = model_class(family, auto)
    row = clean[family, auto]
    for folder in (row["folder"], row["again"]):
        with no_warnings():
            if auto == "AutoBackbone":
                model = cls.from_pretrained(folder)
            else:
                model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=folder is row["again"])
        assert type(model) is cls
        result = first(model, inputs_of(family, auto))
        assert torch.allclose(result, row["expected"], atol=1e-6), (result - row["expected"]).abs().max()


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def plain(folder: Path, family: str = "eff_longformer") -> transformers.PreTrainedModel:
    """A model saved there without code."""
    model = randomise_(model_class(family, "AutoModelForSequenceClassification")(tiny_config(family)))
    model.save_pretrained(folder)
    return model


def test_export_adds_code_and_changes_nothing_else(tmp_path: Path) -> None:
    one = tmp_path / "model"
    plain(one)
    before = bytes_of(one)
    export_folder(one)
    after = bytes_of(one)
    assert after.keys() == {*before, "modeling_eff_longformer.py"}
    assert {name for name in before if before[name] != after[name]} == {"config.json", "README.md"}
    code = code_of("eff_longformer")
    expected = {**json.loads(before["config.json"]), "auto_map": code.auto_map}
    assert json.loads(after["config.json"]) == expected
    card = after["README.md"].decode()
    assert code.sha256 in card and "trust_remote_code=True" in card and "code_revision" in card
    export_folder(one)
    assert bytes_of(one) == after


@pytest.mark.parametrize("name", ["modeling_eff_longformer.py", "config.json", "README.md"])
def test_an_export_that_fails_leaves_a_folder_that_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(tmp_path / "one")
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    before = bytes_of(tmp_path / "one")
    with pytest.raises(OSError, match="disk full"):
        export_folder(tmp_path / "one")
    after = bytes_of(tmp_path / "one")
    assert after[name] == before[name] if name in before else name not in after
    assert "auto_map" not in json.loads(after["config.json"]) or "modeling_eff_longformer.py" in after
    assert not [file for file in after if file.endswith(".new")]
    transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")


def test_folders_of_others_are_refused(tmp_path: Path) -> None:
    rows = {
        "bert": ({"model_type": "bert"}, "model type 'bert' is no family of hf_efficient_attn"),
        "joint": ({"model_type": "eff_electra_joint"}, "save_discriminator"),
        "mine": (
            {"model_type": "eff_vit", "architectures": ["MyModel"]},
            "the class MyModel, which is not of the package",
        ),
        "list": ([], "holds no JSON object"),
        "field": ({"model_type": "eff_longformer", "attention_window": 7}, "attention_window"),
        "one": ({"model_type": "eff_vit", "architectures": "MyModel"}, "the class MyModel, which is not"),
        "none": (None, "there is no config.json"),
    }
    for name, (config, message) in rows.items():
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        before = bytes_of(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            export_folder(tmp_path / name)
        assert bytes_of(tmp_path / name) == before
    plain(tmp_path / "file")
    (tmp_path / "file" / "modeling_eff_longformer.py").write_text("mine = 1\n")
    with pytest.raises(ValueError, match="was not written by hf_efficient_attn"):
        export_folder(tmp_path / "file")
    assert (tmp_path / "file" / "modeling_eff_longformer.py").read_text() == "mine = 1\n"


def test_a_model_that_came_with_its_code_is_saved_with_it(tmp_path: Path) -> None:
    saved(tmp_path / "first", "eff_vit", "AutoModelForImageClassification")
    code = code_of("eff_vit")
    config_file = tmp_path / "first" / "config.json"
    # As it was written by another version, or loaded from a repository whose code lies elsewhere.
    data = json.loads(config_file.read_text())
    data["auto_map"] = {"AutoConfig": f"someone/theirs--{code.auto_map['AutoConfig']}", "AutoProcessor": "other.Other"}
    config_file.write_text(json.dumps(data))
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["auto_map"] == {
        **code.auto_map,
        "AutoProcessor": "other.Other",
    }
    assert (tmp_path / "second" / code.name).read_text(encoding="utf-8") == code.text
    assert code.sha256 in (tmp_path / "second" / "README.md").read_text()
    # The config alone as well.
    transformers.AutoConfig.from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "config")
    assert (tmp_path / "config" / code.name).is_file()
    # Until it is not wanted any more: code, entries and the part of the card go.
    model.save_pretrained(tmp_path / "second", self_contained=False)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["auto_map"] == {"AutoProcessor": "other.Other"}
    assert not (tmp_path / "second" / code.name).exists()
    assert "trust_remote_code=True" not in (tmp_path / "second" / "README.md").read_text()
    model.save_pretrained(tmp_path / "third")
    assert not (tmp_path / "third" / code.name).exists()


def test_what_has_no_such_form_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Mine(model_class("eff_vit", "AutoModel")):
        pass

    with pytest.raises(ValueError, match="a Mine, which is no class of the package"):
        Mine(tiny_config("eff_vit")).save_pretrained(tmp_path / "mine", self_contained=True)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "embedding_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = EffElectraConfig(**sizes, intermediate_size=16)
    joint = EffElectraForJointPreTraining(EffElectraJointConfig(generator=encoder, discriminator=encoder))
    with pytest.raises(ValueError, match="save_discriminator"):
        joint.save_pretrained(tmp_path / "joint", self_contained=True)
    with pytest.raises(ValueError, match="the stock form needs no code"):
        joint.save_discriminator(tmp_path / "stock", stock=True, self_contained=True)
    assert not list(tmp_path.iterdir())
    joint.save_discriminator(tmp_path / "own", self_contained=True)
    assert (tmp_path / "own" / "modeling_eff_electra.py").is_file()


def test_only_code_of_ones_own_registers_itself_for_auto_classes() -> None:
    ours = model_class("eff_vit", "AutoModel")
    ours.register_for_auto_class("AutoModel")
    assert ours._auto_class is None and not ours.is_remote_code()

    class Mine(ours):
        pass

    Mine.register_for_auto_class("AutoModel")
    assert Mine._auto_class == "AutoModel" and ours._auto_class is None


INSTALLED = """
import sys, transformers
folder, again, plain = sys.argv[1:]
model = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("hf_efficient_attn.models."), type(model).__module__
model.save_pretrained(again)

from hf_efficient_attn.cli import main
sys.argv[1:] = ["export", plain]
main()
"""


def test_where_the_package_is_installed_it_takes_the_place_of_the_copy(tmp_path: Path) -> None:
    saved(tmp_path / "model", "eff_performer", "AutoModelForMaskedLM")
    for name in ("here", "there"):
        plain(tmp_path / name / "plain", "eff_performer")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    folders = [str(tmp_path / name) for name in ("model", "again", "there/plain")]
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, *folders],
        env=environment | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # The command writes what this process writes, whatever its hashes are.
    code = export_folder(tmp_path / "here" / "plain")
    assert code.sha256 in done.stdout and bytes_of(tmp_path / "there" / "plain") == bytes_of(
        tmp_path / "here" / "plain"
    )
    assert (tmp_path / "again" / code.name).read_text(encoding="utf-8") == code.text
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == code.auto_map


def test_an_installed_package_takes_its_place_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one that lacks a class would mix two sets of them."""
    code = code_of("eff_performer")
    foot = code.text[code.text.rindex("# ----") :]
    names = [name.partition(".")[2] for name in code.auto_map.values()]
    for missing in (None, names[0], names[-1]):
        package = types.ModuleType("hf_efficient_attn")
        for name in class_names(FAMILIES["eff_performer"]):
            if name != missing:
                setattr(package, name, f"installed {name}")
        monkeypatch.setitem(sys.modules, "hf_efficient_attn", package)
        module = dict.fromkeys(names, "carried")
        exec(foot, module)
        expected = {name: f"installed {name}" if missing is None else "carried" for name in names}
        assert {name: module[name] for name in names} == expected
