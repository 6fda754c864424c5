"""Folders loaded in bfloat16, placed by `device_map`, without their buffers, and with layers left on the disk."""

from pathlib import Path

import pytest
import test_families as text
import test_vision_families as vision
import torch
from helpers import model_class, randomise_, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_efficient_attn.auto import VISION_FAMILIES


HEADS = [*text.HEADS, *vision.HEADS]
HEAD = pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{family}-{auto}" for family, auto in HEADS])

LAYERS = ("EncoderLayer", "ReversibleLayer", "VisionLayer")


def model_and_batch(family: str, auto: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model with random weights, and inputs."""
    if family in VISION_FAMILIES:
        return vision.build(family, auto), vision.batch_of(auto, 2, 20, 28)
    model = text.build(family, auto)
    return model, text.batch_of(model, auto, 2, 33)


def result_of(family: str, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return (vision if family in VISION_FAMILIES else text).result_of(model.eval(), batch)


@HEAD
def test_bfloat16_and_an_automatic_device_map(family: str, auto: str, tmp_path: Path) -> None:
    """Weights and buffers are those of the folder to the bit, rounded once; results differ by rounding."""
    model, batch = model_and_batch(family, auto)
    model.save_pretrained(tmp_path)
    expected = result_of(family, model, batch)
    whole = type(model).from_pretrained(tmp_path, device_map="auto")
    half = type(model).from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        rounded = x.to(torch.bfloat16) if x.is_floating_point() else x
        assert torch.equal(whole.state_dict()[name], x), name
        assert torch.equal(half.state_dict()[name], rounded), name
    assert_close(result_of(family, whole, batch), expected, rtol=1e-6, atol=1e-6)
    if family in VISION_FAMILIES:
        batch = {name: x.to(torch.bfloat16) if name == "pixel_values" else x for name, x in batch.items()}
    found = result_of(family, half, batch).float()
    assert found.isfinite().all()
    print("XX", family, auto, ((found - expected).norm() / expected.norm()).item())


# Mechanisms with random projections, in every frame.
DRAWN = {
    "eff_performer": {},
    "eff_electra": {"attention": "performer", "attention_options": {"num_features": 20}},
    "eff_vit": {"attention": "performer", "attention_options": {"num_features": 20}},
}


@pytest.mark.parametrize("family", DRAWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_that_a_folder_lacks_are_drawn(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same ones as in the model that was saved, rounded once."""
    model = randomise_(model_class(family, "AutoModel")(tiny_config(family, **DRAWN[family])))
    model.save_pretrained(tmp_path)
    buffers = dict(model.named_buffers())
    assert buffers
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: x for name, x in weights.items() if name not in buffers}
    assert len(kept) == len(weights) - len(buffers)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path, device_map="auto", dtype=dtype)
    for name, x in loaded.named_buffers():
        assert torch.equal(x, buffers[name].to(dtype)), name


@HEAD
def test_layers_left_on_the_disk(family: str, auto: str, tmp_path: Path) -> None:
    """Their weights come when a module is called, in the moment of it: every weight is used through its module."""
    model, batch = model_and_batch(family, auto)
    model.save_pretrained(tmp_path / "model")
    layer = next(name for name, module in model.named_modules() if type(module).__name__ in LAYERS)
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map={"": "cpu", layer: "disk"}, offload_folder=tmp_path / "offloaded"
    )
    assert all(x.is_meta for x in loaded.get_submodule(layer).parameters())
    assert_close(result_of(family, loaded, batch), result_of(family, model, batch), rtol=1e-5, atol=1e-5)
