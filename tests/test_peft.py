"""LoRA through PEFT, over every family and head: an adapter acts as the change of a weight that it stands for."""

import copy
from pathlib import Path

import pytest
import test_families as text
import test_vision_families as vision
import torch
from helpers import model_class
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_efficient_attn.auto import FAMILIES, VISION_FAMILIES


peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")

HEADS = [*text.HEADS, *vision.HEADS]
HEAD = pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{family}-{auto}" for family, auto in HEADS])
RANK, ALPHA = 4, 8


def model_and_batch(family: str, auto: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny model with random weights, and inputs with labels."""
    if family in VISION_FAMILIES:
        return vision.build(family, auto), vision.batch_of(auto, 2, 20, 28)
    model = text.build(family, auto)
    return model, text.batch_of(model, auto, 2, 33)


def loss_of(family: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (vision if family in VISION_FAMILIES else text).loss_of(model, batch)


def result_of(family: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return (vision if family in VISION_FAMILIES else text).result_of(model.eval(), batch)


def lora(**options: object) -> "peft.LoraConfig":
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", **options)


def train(family: str, model: nn.Module, batch: dict[str, Tensor], steps: int = 4) -> list[float]:
    """The loss before each step."""
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(family, model.train(), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@HEAD
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_an_adapter_gets_the_gradient_of_its_weight(family: str, auto: str, checkpointing: bool) -> None:
    """With `weight + 2 B A` and B = 0, the gradient of B is that of the weight times `2 A^T`."""
    model, batch = model_and_batch(family, auto)
    plain = copy.deepcopy(model).train()
    loss_of(family, plain, batch).backward()
    if checkpointing:
        new = hasattr(model, "activation_checkpointing_enable")
        model.activation_checkpointing_enable() if new else model.gradient_checkpointing_enable()
    adapted = peft.get_peft_model(model, lora()).train()
    loss_of(family, adapted, batch).backward()
    layers = {name: x for name, x in model.named_modules() if isinstance(x, peft.tuners.lora.Linear)}
    assert {name.rpartition(".")[2] for name in layers} >= {"value", "dense"}
    for name, layer in layers.items():
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight_grad = plain.get_parameter(f"{name}.weight").grad
        expected = ALPHA / RANK * weight_grad @ first.detach().T
        assert_close(second.grad, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


ATTENTION = ["query", "key", "value"]
# Family -> what README says to name.
NAMED = {name: [*ATTENTION, "dense"] for name in FAMILIES} | {
    "eff_longformer": [*ATTENTION, "query_global", "key_global", "value_global", "dense"],
    "eff_reformer": [*ATTENTION, "query_key", "dense.dense", "output.dense"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_the_readme_are_those_of_linear_layers(family: str) -> None:
    """In every layer: each projection of the attention, and both halves of the feed-forward part."""
    model, batch = model_and_batch(family, "AutoModel")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=NAMED[family]))
    found = {name for name, x in adapted.named_modules() if isinstance(x, peft.tuners.lora.Linear)}
    for name in NAMED[family]:
        assert any(layer.endswith(f".{name}") for layer in found), name
    layers = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and "lora" not in name]
    inner = [name for name in layers if ".layer" in name and not name.endswith("base_layer")]
    assert not inner, f"left out: {inner}"
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
    paragraph = text[text.index("LoRA (`pip install") :].partition("\n\n")[0]
    assert all(f"`{name}`" in paragraph for name in NAMED[family])


@HEAD
def test_lora_trains_saves_loads_and_merges(family: str, auto: str, tmp_path: Path) -> None:
    model, batch = model_and_batch(family, auto)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    untrained = result_of(family, model, batch)
    adapted = peft.get_peft_model(model, lora())
    assert all("lora_" in name for name, x in adapted.named_parameters() if x.requires_grad)
    losses = train(family, adapted, batch)
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items()), "what is below the adapters stands still"
    expected = result_of(family, adapted, batch)
    assert not torch.allclose(expected, untrained, atol=1e-3)

    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_and_batch(family, auto)[0], tmp_path)
    assert_close(result_of(family, loaded, batch), expected, rtol=1e-6, atol=1e-6)
    merged = adapted.merge_and_unload()
    assert type(merged) is model_class(family, auto) and merged.state_dict().keys() == before.keys()
    assert_close(result_of(family, merged, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_classifier_is_trained_and_saved_beside(family: str, tmp_path: Path) -> None:
    auto = "AutoModelForImageClassification" if family in VISION_FAMILIES else "AutoModelForSequenceClassification"
    model, batch = model_and_batch(family, auto)
    adapted = peft.get_peft_model(model, lora(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    trained = {name for name, x in adapted.named_parameters() if x.requires_grad and "lora_" not in name}
    assert trained and all("classifier" in name for name in trained)
    before = {name: x.clone() for name, x in adapted.named_parameters() if name in trained}
    train(family, adapted, batch)
    assert all(not torch.equal(before[name], x) for name, x in adapted.named_parameters() if name in trained)
    expected = result_of(family, adapted, batch)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model_and_batch(family, auto)[0], tmp_path)
    assert_close(result_of(family, loaded, batch), expected, rtol=1e-6, atol=1e-6)
    assert_close(result_of(family, adapted.merge_and_unload(), batch), expected, rtol=1e-4, atol=1e-4)
