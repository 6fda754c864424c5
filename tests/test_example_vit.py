"""The image example runs as a user runs it, on few small images, and explains what is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageClassification

import hf_efficient_attn  # noqa: F401  (the Auto classes are to know its models)


ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "train_vit.py"
SMALL = ["--epochs", "2", "--batch-size", "8", "--output-dir", "out"]
NEW_MODEL = ["--hidden-size", "16", "--layers", "1"]


def example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    size = [] if "--checkpoint" in options else NEW_MODEL
    command = [sys.executable, str(EXAMPLE), *SMALL, *size, *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def make_photos(folder: Path) -> None:
    """Two labels that differ by colour, images of any size."""
    random = np.random.default_rng(0)
    for label, channel in (("red", 0), ("blue", 2)):
        (folder / label).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 80, (10 + number, 14, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


@pytest.mark.parametrize(
    ("attention", "options", "picture"),
    [
        ("softmax", "{}", "rollout"),
        ("neighborhood", '{"radius": 1}', "rollout"),
        ("nystromformer", '{"num_landmarks": 3, "conv_kernel_size": 3}', "last weights"),
    ],
)
def test_learns_a_folder_of_images(attention: str, options: str, picture: str, tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    chosen = ["--dataset", "photos", "--attention", attention, "--attention-options", options]
    result = example(tmp_path, *chosen, "--epochs", "20", "--learning-rate", "5e-3")
    assert result.returncode == 0, result.stderr
    assert "16 images to learn and 4 held out, 2 labels" in result.stdout
    (accuracy,) = re.findall(r"held-out accuracy (\d+\.\d+)%", result.stdout)
    assert float(accuracy) >= 75.0, result.stdout
    assert f"attention.png ({picture})" in result.stdout
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.attention == attention and set(model.config.label2id) == {"red", "blue"}
    with Image.open(tmp_path / "out" / "attention.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(maxcolors=2**20)) > 20


def test_fine_tunes_a_checkpoint_at_another_size(tmp_path: Path) -> None:
    """The digits first; then a checkpoint with other labels, on images of another size."""
    assert example(tmp_path, "--epochs", "0.1").returncode == 0
    make_photos(tmp_path / "photos")
    (tmp_path / "out").rename(tmp_path / "digits")
    result = example(tmp_path, "--dataset", "photos", "--checkpoint", "digits", "--image-size", "24")
    assert result.returncode == 0, result.stderr
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.image_size == 24 and config.num_labels == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "must be 1 or more"),
        (["--hidden-size", "18"], "multiple of 4"),
        (["--epochs", "0"], "must be above 0"),
        (["--output-dir", "file.txt"], "file.txt is a file"),
        (["--attention", "nonsense"], "invalid choice"),
        (["--image-size", "0"], "--image-size 0: give 1 or more"),
        (["--image-size", "18"], "is no multiple of patch_size"),
        (["--attention-options", "[3]"], "[3] is no JSON object"),
        (["--attention-options", '{"radius": 3}'], "no option of 'softmax'"),
        (["--dataset", "nowhere/at-all"], "Error: "),
        (["--checkpoint", "nowhere"], "Error: "),
        (["--checkpoint", "nowhere", "--layers", "2"], "--layers is of a new model"),
        (["--dataset", "photos", "--label-column", "kind"], "--label-column kind: the data has image, label"),
    ],
)
def test_wrong_use_is_explained(tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "file.txt").write_text("")
    make_photos(tmp_path / "photos")
    result = example(tmp_path, *options)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr
