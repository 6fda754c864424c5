"""Patterns as pictures, the command that draws them, and those of the cards."""

from dataclasses import fields
from pathlib import Path

import oracles
import pytest
import torch
from cases import CASES
from commands import ROOT, commands_of
from helpers import (
    config_class,
    model_class,
    no_warnings,
    randomise_,
    tiny_config,
)
from PIL import Image
from test_patterns import LENGTH, given_of
from typer.testing import CliRunner

from hf_efficient_attn import (
    FAMILIES,
    AttentionPattern,
    EffPerformerModel,
    attention_pattern,
    draw_pattern,
)
from hf_efficient_attn.auto import TEXT_FAMILIES
from hf_efficient_attn.cli import app
from hf_efficient_attn.patterns.command import small_config
from hf_efficient_attn.patterns.drawing import COLOURS, kind_image
from hf_efficient_attn.patterns.kinds import attended_pairs, pair_kinds


FAMILY = pytest.mark.parametrize("family", FAMILIES)


def test_colours_of_pairs() -> None:
    names = ("window", "global")
    matrix = torch.zeros(6, 6, dtype=torch.int8)
    matrix[2, 3], matrix[5, 0] = 1, 2
    keep = torch.tensor([True] * 6)
    image = kind_image(matrix, names, keep, 1)
    assert image.shape == (6, 6, 3) and image.dtype == torch.uint8
    assert image[2, 3].tolist() == list(COLOURS["window"]) and image[5, 0].tolist() == list(COLOURS["global"])
    assert (image.reshape(-1, 3) == 255).all(dim=1).sum() == 34
    coarse = kind_image(matrix, names, keep, 4)
    assert coarse.shape == (2, 2, 3)
    mean = [255 + (shade - 255) / 16 for shade in COLOURS["window"]]
    assert coarse[0, 0].tolist() == pytest.approx(mean, abs=1)
    assert coarse[1, 0].tolist() == list(COLOURS["global"]), "a global token is never mixed away"
    keep[5] = False
    assert kind_image(torch.zeros_like(matrix), names, keep, 1)[5, 5].tolist() == [226, 226, 226]


def test_every_kind_has_a_colour_of_its_own_in_a_picture() -> None:
    for case in CASES:
        for variant in case.variants:
            given, _ = given_of(case, variant, None)
            if not given.attention.is_estimate:
                kinds, _ = pair_kinds(given, attended_pairs(given))
                assert len({COLOURS[kind] for kind in kinds}) == len(kinds)


@FAMILY
def test_files_are_written_and_equal_for_equal_arguments(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for suffix, begin in begins.items():
        paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
        with no_warnings():
            written = [draw_pattern(attention_pattern(config, LENGTH), path, dpi=50) for path in paths]
        assert written == paths
        first, second = (path.read_bytes() for path in paths)
        assert first.startswith(begin) and first == second


def test_heads_stand_side_by_side_where_they_differ(tmp_path: Path) -> None:
    one, four = tiny_config("eff_big_bird", num_random_blocks=0), tiny_config("eff_big_bird")
    widths = []
    for config in (one, four):
        path = draw_pattern(attention_pattern(config, 100), tmp_path / "picture.png", dpi=50)
        image = Image.open(path).convert("RGB")
        widths.append(image.width)
        found = {colour for _, colour in image.getcolors(2**24)}
        assert {COLOURS["window"], COLOURS["global"]} <= found
        assert (COLOURS["random"] in found) is (config is four)
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("negative", [False, True])
def test_weights_below_zero_have_a_colour_of_their_own(negative: bool, tmp_path: Path) -> None:
    matrix = torch.full((1, 30, 30), 0.5)
    matrix[0, :15] = -0.5 if negative else 0.0
    drawn = AttentionPattern(matrix, (), torch.ones(30, dtype=torch.bool), "title")
    image = Image.open(draw_pattern(drawn, tmp_path / "picture.png")).convert("RGB")
    (_, top), (_, second) = sorted(image.getcolors(2**24), reverse=True)[1:3]  # the first is the paper
    blue = [colour for colour in (top, second) if colour[2] > colour[0] + 50]
    assert len(blue) == int(negative)


@pytest.mark.parametrize(
    ("name", "message"),
    [("picture.gif", "choose one of .png, .svg, .pdf"), ("picture", "what kind"), ("none/picture.png", "no folder")],
)
def test_a_picture_that_cannot_be_written(name: str, message: str, tmp_path: Path) -> None:
    drawn = AttentionPattern(torch.zeros(1, 2, 2), (), torch.ones(2, dtype=torch.bool), "")
    with pytest.raises(ValueError, match=message):
        draw_pattern(drawn, tmp_path / name)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["pattern", "eff_big_bird", "-o", str(tmp_path / "a.png")])
    assert result.exit_code == 2 and 'pip install "hf_efficient_attn[demo]"' in result.output


# The command.


def draw(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["pattern", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_the_command_says_in_one_line_what_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "picture.png"
    folder.mkdir()
    code, output = draw("eff_big_bird", "--length", "64", "-o", folder)
    assert code == 2 and "Is a directory" in output and "Traceback" not in output


@FAMILY
def test_the_command_draws_every_family(family: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    state = torch.get_rng_state()
    code, said = draw(family, "--length", 48, "-o", path, "--dpi", 40, "--option", "num_hidden_layers=1")
    assert code == 0, said
    assert path.read_bytes().startswith(b"\x89PNG") and f"picture  {path}" in said
    assert said.startswith(f"Eff{FAMILIES[family].name}") and "% of the pairs" in said
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_command_reads_more_tokens_than_a_table_has_by_default(family: str) -> None:
    config = small_config(family, 5000, {})
    assert config.max_input_length >= 5000
    mechanism = {field.name for field in fields(config)} & {"block_size", "attention_window", "num_features"}
    defaults = config_class(family)()
    assert all(getattr(config, name) == getattr(defaults, name) for name in mechanism)
    assert config.num_hidden_layers == defaults.num_hidden_layers
    assert small_config(family, 64, {"num_attention_heads": 2, "hidden_size": 16}).hidden_size == 16


def test_options_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    code, said = draw(
        "eff_vit", "--length", 36, "-o", path, "--option", "attention=neighborhood",
        "--option", 'attention_options={"radius": [1, 2]}', "--layer", 3,
    )  # fmt: skip
    assert code == 0 and said.startswith("EffViT (neighborhood), layer 3, 37 tokens") and "radius = [1, 2]" in said
    code, said = draw("eff_longformer", "--length", 64, "-o", path, "--global", 1, "--option", "attention_window=16")
    allowed = oracles.window(64, 8, 1)
    allowed[0] = allowed[:, 0] = True
    assert code == 0 and f"{100 * allowed.double().mean():.3g} % of the pairs" in said
    code, said = draw("eff_big_bird", "--length", 64, "-o", path, "--weights", "--option", "block_size=8")
    assert code == 0 and "new weights" in said


def test_the_command_draws_a_saved_model(tmp_path: Path) -> None:
    model = randomise_(model_class("eff_longformer", "AutoModelForMaskedLM")(tiny_config("eff_longformer")))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "picture.png"
    code, said = draw(tmp_path / "model", "--length", 40, "--layer", 1, "-o", path, "--weights")
    assert code == 0, said
    assert "attention_window = 4" in said and "new weights" not in said and path.is_file()
    right = draw_pattern(attention_pattern(model, 40, layer=1, weights=True), tmp_path / "right.png")
    assert path.read_bytes() == right.read_bytes(), "with the weights of the folder"


def test_errors_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    model = EffPerformerModel(tiny_config("eff_performer"))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for words, message in [
        (["eff_bigbird"], "Did you mean 'eff_big_bird'?"),
        (["eff_performer", "--length", "0"], "length = 0"),
        (["eff_performer", "--length", "9000"], "at most 8,192"),
        (["eff_performer", "--layer", "12", "--length", "8"], "layer = 12: the model has the layers 0 to 11"),
        (["eff_performer", "--option", "num_feature=3"], "did you mean 'num_features'?"),
        (["eff_performer", "--option", "num_features"], "give name=value"),
        (["eff_performer", "--option", "num_attention_heads=0"], "num_attention_heads"),
        (["eff_performer", "--global", "2", "--length", "8"], "no global tokens"),
        (["eff_performer", "--dpi", "0"], "dpi = 0"),
        (["eff_nystromformer", "--option", "is_decoder=true"], "no causal form"),
        ([str(tmp_path / "none"), "--length", "0"], "length = 0"),  # before anything is loaded
        ([str(tmp_path / "none")], "nor a folder"),
        ([str(tmp_path / "empty")], "config.json"),
        ([str(tmp_path / "bert")], "'bert', which is no family"),
        ([str(tmp_path / "model"), "--option", "num_features=3"], "--option num_features"),
        ([str(tmp_path / "model"), "--length", "200"], "200"),
    ]:
        code, said = draw(*words, "-o", path)
        assert code == 2 and "Error: " in said and message in said.split("Error: ")[1], (words, said)
    assert not path.exists()
    code, said = draw("eff_performer", "-o", tmp_path / "picture.bmp")
    assert code == 2 and "choose one of" in said


# The pictures that the documents show.


@FAMILY
def test_a_card_shows_its_pattern_and_the_command_that_drew_it(family: str) -> None:
    picture = ROOT / "model_cards" / "images" / f"{family}.png"
    card = (ROOT / "model_cards" / f"{family}.md").read_text(encoding="utf-8")
    assert f"](images/{family}.png)" in card
    drawn = [command for command in commands_of(card) if f"-o model_cards/images/{family}.png" in command]
    assert len(drawn) == 1 and drawn[0].startswith(f"hf-efficient-attn pattern {family} ")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size <= 30 * 1024


def test_no_picture_is_left_over() -> None:
    pictures = {path.name for path in (ROOT / "model_cards" / "images").iterdir()}
    assert pictures == {f"{family}.png" for family in FAMILIES}
    assert "](model_cards/images/" in (ROOT / "README.md").read_text(encoding="utf-8")
