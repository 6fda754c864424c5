"""model_cards/MIGRATION.md says of each side what is there: classes, fields, defaults, and none is left out."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from commands import ROOT
from golden_files import defaults
from helpers import config_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_efficient_attn
from hf_efficient_attn import FAMILIES
from hf_efficient_attn.auto import TEXT_FAMILIES


PAGE = (ROOT / "model_cards" / "MIGRATION.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SHARED = "Fields of every text family"
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def rows_of(section: str, columns: int) -> list[list[str]]:
    """The rows of the tables of a section that have so many columns, without their heads."""
    rows = [line.strip("| ").split(" | ") for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == columns and row[0] not in ("transformers", "---")]


def field_of(cell: str) -> tuple[str, Any] | None:
    """Name and default in a cell."""
    if cell == "-":
        return None
    name, default = re.fullmatch(r"`(\w+)` = `(.+)`", cell).groups()
    return name, ast.literal_eval(default)


def table_of(section: str) -> list[tuple[tuple[str, Any] | None, tuple[str, Any] | None]]:
    """What each side of a section's table of fields says."""
    return [(field_of(row[0]), field_of(row[1])) for row in rows_of(section, 3)]


def their_config(family: str) -> type:
    return CONFIG_MAPPING[config_class(family).original_model_types[0]]


def their_defaults(family: str) -> dict[str, Any]:
    """The fields that transformers' class declares itself."""
    own = their_config(family).__dict__["__annotations__"]
    return {field.name: field.default for field in fields(their_config(family)) if field.name in own}


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@EVERY_FAMILY
def test_fields_and_defaults_are_right(family: str) -> None:
    theirs, ours = their_defaults(family), defaults()[FAMILIES[family].config_name]
    rows = table_of(FAMILIES[family].name)
    for there, here in rows:
        if there is not None:
            assert there[0] in theirs and plain(theirs[there[0]]) == plain(there[1]), f"transformers: {there}"
        if here is not None:
            assert here[0] in ours and plain(ours[here[0]]) == plain(here[1]), f"here: {here}"
            assert there is not None or here[0] not in theirs, f"{here[0]} is there, too"
    assert rows


@EVERY_FAMILY
def test_no_difference_is_left_out(family: str) -> None:
    theirs, ours = their_defaults(family), defaults()[FAMILIES[family].config_name]
    rows = table_of(FAMILIES[family].name)
    said = {there for there, _ in rows if there}, {here for _, here in rows if here}
    told = [{name for name, _ in side} for side in said]
    shared = dict(here for _, here in table_of(SHARED)) if family in TEXT_FAMILIES else {}
    gone = {name for name in theirs if name not in ours}
    assert gone <= told[0], f"only in transformers: {gone - told[0]}"
    added = {name for name, value in ours.items() if name not in theirs and (name, value) not in shared.items()}
    assert added <= told[1], f"only here: {added - told[1]}"
    changed = {name for name in theirs if name in ours and plain(theirs[name]) != plain(ours[name])}
    assert changed <= told[0] & told[1], f"other defaults: {changed - (told[0] & told[1])}"


def test_the_shared_fields_are_those_of_the_frame() -> None:
    from hf_efficient_attn.encoder.configuration import EffEncoderConfig

    frame = {field.name: field.default for field in fields(EffEncoderConfig)}
    for there, (name, value) in table_of(SHARED):
        assert there is None and frame[name] == value


@EVERY_FAMILY
def test_classes_are_there(family: str) -> None:
    row = FAMILIES[family]
    pairs = [[re.findall(r"`(\w+)`", cell) for cell in cells] for cells in rows_of(row.name, 2)]
    for theirs, ours in pairs:
        assert all(hasattr(transformers, name) for name in theirs), theirs
        assert all(hasattr(hf_efficient_attn, name) for name in ours), ours
    named = {name for _, ours in pairs for name in ours}
    wanted = {*row.model_names.values(), row.detector_name} - {None}
    assert wanted <= named, f"not named: {wanted - named}"
    # Each of transformers' classes that can be loaded by a head of ours, for the type that is read first.
    prefix = their_config(family).__name__.removesuffix("Config")
    told = {name for theirs, _ in pairs for name in theirs}
    heads = {
        name for name in dir(transformers) if re.fullmatch(rf"{prefix}(Model|For\w+|ModelWithLMHead|LMHeadModel)", name)
    }
    assert heads - {"BertForNextSentencePrediction", "BertForPreTraining"} <= told, heads - told


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WORDS = {"vocab_size": 64, "max_position_embeddings": 64}
MORE = {
    "longformer": {"attention_window": [4, 4]},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [8, 8], "axial_pos_shape": [8, 8]}
    | {"attention_head_size": 8, "feed_forward_size": 16, "num_buckets": 4},
    "vit": {"image_size": 8, "patch_size": 4},
}


@EVERY_FAMILY
def test_every_pair_of_classes_loads_whole(family: str, tmp_path: Path) -> None:
    """Nothing of a folder of theirs is left over, and nothing is new but what the page says."""
    pairs = [[re.findall(r"`(\w+)`", cell) for cell in cells] for cells in rows_of(FAMILIES[family].name, 2)]
    loaded = 0
    for theirs, name in ((theirs, name) for theirs_of, names in pairs for theirs in theirs_of for name in names):
        cls = getattr(transformers, theirs)
        kind = cls.config_class.model_type
        causal = {"is_decoder": True} if name.endswith("ForCausalLM") else {}
        cls(
            cls.config_class(**TINY, **({} if kind == "vit" else WORDS), **MORE.get(kind, {}), **causal)
        ).save_pretrained(tmp_path / theirs)
        ours = getattr(hf_efficient_attn, name)
        report = ours.from_pretrained(tmp_path / theirs, **causal, output_loading_info=True)[1]
        new = {key for key in report.pop("missing_keys") if not key.endswith(".self.projection")}
        assert not new and not any(report.values()), f"{theirs} in {name}: {new} {report}"
        loaded += 1
    assert loaded > 2


def test_every_family_has_a_section() -> None:
    assert {row.name for row in FAMILIES.values()} <= set(SECTIONS)
