"""Folders loaded in bfloat16, placed by `device_map`, or without their buffers; layers whose weights are elsewhere."""

from pathlib import Path

import pytest
import test_families as text
import test_vision_families as vision
import torch
from accelerate import cpu_offload
from helpers import layers_of, mask_of, model_class, randomise_, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_efficient_attn.auto import FAMILIES, VISION_FAMILIES


HEADS = [*text.HEADS, *vision.HEADS]
HEAD = pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{family}-{auto}" for family, auto in HEADS])


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
    # Rounding alone is 1 to 2 %; in EffReformer it may move a token to another bucket.
    assert (found - expected).norm() < 0.1 * expected.norm()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_come_when_a_module_is_called(family: str) -> None:
    """As accelerate offloads them: each layer's weights are on no device but while their own module runs."""
    model, batch = model_and_batch(family, "AutoModel")
    mask = "patch_mask" if family in VISION_FAMILIES else "attention_mask"
    batch[mask] = torch.arange(2 * 35).view(2, 5, 7) < 60 if mask == "patch_mask" else mask_of([33, 20], 33)
    if "global_attention_mask" in batch:
        batch["global_attention_mask"] = text.mark_global(batch[mask], causal=False)
    expected = result_of(family, model, batch)
    for layer in layers_of(model):
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert all(x.is_meta for x in layer.parameters())
    assert_close(result_of(family, model, batch), expected, rtol=1e-5, atol=1e-5)
