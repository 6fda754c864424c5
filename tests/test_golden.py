"""Stored checkpoints give their stored outputs: for every family, on every supported version of transformers.

What they were written with is older than this code; so here fail a parameter's or a field's new name, another default,
another meaning of a seed or an option, and a library that reads a file otherwise. `make_golden.py` wrote them.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from golden_files import DEFAULTS, defaults, folders, outputs_of, stored
from safetensors import safe_open

from hf_efficient_attn.auto import COMPOSITES, FAMILIES


# In float32 outputs of about 1 are 2e-6 from exact ones at most, which make_golden.py has checked for each. Another
# processor or another version of PyTorch rounds as far to the other side, and the rest is room; any of the mistakes
# that this is here for moves outputs by more than 1e-3.
TOLERANCE = 1e-5

EVERY = pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)


def load(folder: Path) -> tuple[transformers.PreTrainedModel, dict]:
    auto_name = stored(folder)[0]
    return getattr(transformers, auto_name).from_pretrained(folder, output_loading_info=True)


def test_every_family_has_its_files() -> None:
    there = {}
    for folder in folders():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        there.setdefault(config["model_type"], []).append((stored(folder)[0], folder.name.endswith("-bare")))
    assert set(there) == {*FAMILIES, *COMPOSITES}
    for family, row in FAMILIES.items():
        wanted = {"AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageClassification"} & set(row.heads)
        assert {auto for auto, _ in there[family]} == wanted, family
        assert {is_bare for _, is_bare in there[family]} == {True, False}, f"{family}: with and without its options"


@EVERY
def test_outputs_are_the_stored_ones(folder: Path) -> None:
    _, inputs, expected, select = stored(folder)
    model, info = load(folder)
    assert not any(info.values()), info
    found = outputs_of(model, inputs, select)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].float(), value.float(), rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@EVERY
def test_names_and_buffers_are_the_stored_ones(folder: Path, tmp_path: Path) -> None:
    """Saved again it has the same names. A fresh model has the same projections: they are made from the config."""
    model, _ = load(folder)
    model.save_pretrained(tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as old, safe_open(tmp_path / "model.safetensors", "pt") as new:
        assert set(new.keys()) == set(old.keys())
        assert all(torch.equal(new.get_tensor(name), old.get_tensor(name)) for name in old.keys())
        fresh = type(model)(model.config)
        for name, buffer in fresh.named_buffers():
            if name in old.keys():
                torch.testing.assert_close(buffer, old.get_tensor(name), rtol=0, atol=TOLERANCE)


@EVERY
def test_fields_are_the_stored_ones(folder: Path) -> None:
    """A name in config.json that is no field any more would become an attribute that nobody reads."""
    model, _ = load(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {field.name for field in fields(model.config)} | set(model.config.attribute_map)
    known |= {"model_type", "transformers_version", "dtype", "architectures"}
    assert not set(written) - known
    for name in set(written) & {field.name for field in fields(model.config)} - {"dtype", "transformers_version"}:
        value = getattr(model.config, name)
        assert isinstance(value, transformers.PreTrainedConfig) or json.loads(json.dumps(value)) == written[name], name


def test_defaults_are_the_stored_ones() -> None:
    """A config.json may leave out what was the default when it was written (`make_golden.py` adds new fields)."""
    assert defaults() == json.loads(DEFAULTS.read_text(encoding="utf-8"))
