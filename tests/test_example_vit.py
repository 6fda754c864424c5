"""The image example as a user runs it, on few small images, resumed, and with wrong input."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from example_runs import EXAMPLES, check_outputs, damage_last_checkpoint, error_of, run_example, run_here
from helpers import random_images, randomise_
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_efficient_attn import EffViTConfig, EffViTForImageClassification


NAME = "train_vit"
SMALL = ["--batch-size", "8", "--output-dir", "out"]
NEW_MODEL = ["--hidden-size", "16", "--layers", "1"]


def make_photos(folder: Path, side: str = "") -> None:
    """Two labels that differ by colour, images of any size."""
    random = np.random.default_rng(0)
    for label, channel in (("red", 0), ("blue", 2)):
        (folder / side / label).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 80, (10 + number, 14, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(folder / side / label / f"{number}.png")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model in `out` that the example trained on the digits that need no download."""
    folder = tmp_path_factory.mktemp("digits")
    printed = run_example(NAME, folder, *SMALL, *NEW_MODEL, "--max-steps", "6")
    assert "1,437 images to learn and 360 held out, 10 labels" in printed and "the pipeline says" in printed
    return folder


def test_the_digits_give_a_classifier_and_a_picture(digits: Path) -> None:
    check_outputs(digits / "out", "loss", "accuracy")
    assert (digits / "out" / "preprocessor_config.json").is_file()
    with Image.open(digits / "out" / "attention.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**20)) > 20


def test_resumes_from_the_last_complete_checkpoint(digits: Path) -> None:
    """From the middle of an epoch of five steps, with the order of the images and their shifts as without the break."""
    options = [*SMALL, *NEW_MODEL, "--max-train-examples", "40", "--max-steps", "24", "--output-dir", "resumed"]
    options += ["--max-eval-examples", "24"]
    run_here(NAME, digits, *options)
    damaged, step = damage_last_checkpoint(digits / "resumed")
    wanted = load_file(damaged / "model.safetensors")
    with pytest.warns(UserWarning, match=f"{damaged.name} is passed over"):
        run_here(NAME, digits, *options, "--resume")
    found = load_file(damaged / "model.safetensors")
    assert step % 5 > 0 and all(found[name].equal(tensor) for name, tensor in wanted.items())
    other = error_of(NAME, digits, *options, "--hidden-size", "32", "--resume")
    assert "checkpoint-24 is of another model" in other


@pytest.mark.parametrize(("attention", "options"), [("softmax", "{}"), ("neighborhood", '{"radius": 1}')])
def test_learns_a_folder_of_images(attention: str, options: str, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    chosen = ["--dataset", "photos", "--attention", attention, "--attention-options", options, "--max-steps", "40"]
    printed = run_here(NAME, tmp_path, *SMALL, *NEW_MODEL, *chosen, "--learning-rate", "5e-3")
    assert "16 images to learn and 4 held out, 2 labels" in printed
    (accuracy,) = re.findall(r"held-out accuracy (\d+\.\d+)%", printed)
    assert float(accuracy) >= 75.0, printed
    assert "attention.png (rollout)" in printed
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.attention == attention and set(model.config.label2id) == {"red", "blue"}


def test_what_is_drawn_of_weights_that_are_no_probabilities() -> None:
    attention_maps = runpy.run_path(str(EXAMPLES / f"{NAME}.py"))["attention_maps"]
    size = {"image_size": 16, "patch_size": 4, "encoder_stride": 4, "hidden_size": 16, "num_hidden_layers": 2}
    for attention, options in (("softmax", {}), ("nystromformer", {"num_landmarks": 3, "conv_kernel_size": 3})):
        config = EffViTConfig(**size, num_attention_heads=4, attention=attention, attention_options=options)
        model = randomise_(EffViTForImageClassification(config), std=0.5)
        maps, title = attention_maps(model, random_images(2, 16, 16))
        assert maps.shape == (2, 4, 4) and (maps >= 0).all()
        assert title == ("rollout" if attention == "softmax" else "last weights")


def test_fine_tunes_a_checkpoint_at_another_size_on_a_stream(digits: Path, tmp_path: Path) -> None:
    for side in ("train", "test"):
        make_photos(tmp_path / "photos", side)
    options = ["--dataset", "photos", "--model", digits / "out", "--image-size", "24", "--max-steps", "2"]
    printed = run_here(NAME, tmp_path, *SMALL, *options, "--streaming", "--max-eval-examples", "6")
    assert "a stream of images to learn and 6 held out, 2 labels" in printed
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.image_size == 24 and config.num_labels == 2


def test_fine_tunes_what_is_no_vit(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    options = ["--dataset", "photos", "--model", "resnet", "--image-size", "32", "--max-steps", "2"]
    assert "attention: resnet is a resnet" in error_of(NAME, tmp_path, *SMALL, *options, "--attention", "softmax")
    printed = run_here(NAME, tmp_path, *SMALL, *options)
    assert "32 x 32 pixels" in printed and "attention.png" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "0 is not a whole number above 0"),
        (["--hidden-size", "18"], "multiple of 4"),
        (["--epochs", "0"], "0 is not above 0"),
        (["--output-dir", "file.txt"], "file.txt is a file"),
        (["--attention", "nonsense"], "invalid choice"),
        (["--image-size", "0"], "argument --image-size: 0 is not a whole number above 0"),
        (["--image-size", "18"], "is no multiple of patch_size"),
        (["--attention-options", "[3]"], "[3] is no JSON object"),
        (["--attention-options", '{"radius": 3}'], "no option of 'softmax'"),
        (["--shift", "-1"], "--shift -1: give 0 or more"),
        (["--dataset", "nowhere/at-all"], "Error: "),
        (["--model", "nowhere"], "Error: "),
        (["--model", "nowhere", "--layers", "2"], "--layers is of a new model"),
        (["--dataset", "photos", "--label-column", "kind"], "no column 'kind', it has image, label"),
        (["--resume"], "holds no checkpoint to go on from"),
    ],
)
def test_wrong_use_is_explained(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "file.txt").write_text("")
    make_photos(tmp_path / "photos")
    assert message in error_of(NAME, tmp_path, *SMALL, *options)
