"""Loading of vision families: dtypes and devices, fresh weights, resized tables, what folders and callers choose."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import model_class, no_warnings, random_images, randomise_, tiny_config
from test_vision_families import FAMILY, HEAD, MECHANISM, batch_of, build, result_of
from transformers import AutoBackbone, Trainer, TrainerCallback, TrainingArguments


@HEAD
@MECHANISM
def test_loads_through_meta_device_and_dtype(family: str, auto: str, mechanism: str, tmp_path: Path) -> None:
    model = build(family, auto, mechanism)
    inputs = batch_of(auto, 2, 20, 28)
    model.save_pretrained(tmp_path)
    cls = type(model)
    for loaded in (cls.from_pretrained(tmp_path), cls.from_pretrained(tmp_path, device_map="cpu")):
        assert not any(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))
        for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        torch.testing.assert_close(result_of(loaded.eval(), inputs), result_of(model, inputs), rtol=1e-6, atol=1e-6)
    half = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    assert result_of(half.eval(), inputs).dtype == torch.bfloat16


@FAMILY
def test_fresh_weights_are_drawn_and_masks_start_at_zero(family: str) -> None:
    model = model_class(family, "AutoModelForMaskedImageModeling")(tiny_config(family, num_register_tokens=2))
    embeddings = model.base_model.embeddings
    for tokens in (embeddings.cls_token, embeddings.register_tokens, embeddings.position_embeddings):
        assert 0.005 < tokens.std() < 0.04, "initializer_range is 0.02"
    assert (embeddings.mask_token == 0).all()


@FAMILY
def test_backbone(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, out_features=["stem", "stage2"])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is model_class(family, "AutoBackbone")
    assert backbone.out_indices == [0, 2] and backbone.channels == [32, 32]
    randomise_(backbone)
    images = random_images(2, 20, 28)
    outputs = backbone(images, output_hidden_states=True)
    assert [x.shape for x in outputs.feature_maps] == [(2, 32, 5, 7)] * 2 and len(outputs.hidden_states) == 3
    for index, feature_map in zip((0, 2), outputs.feature_maps, strict=True):
        states = backbone.vit.layernorm(outputs.hidden_states[index])[:, 1:]
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), states)
    assert backbone(images).hidden_states is None
    backbone.out_indices = [1]
    assert backbone.out_features == ["stage1"] and len(backbone(images).feature_maps) == 1
    backbone.out_features = ["stage2"]
    assert backbone.out_indices == [2]
    with pytest.raises(ValueError, match="'stage9'; the stages are stem, stage1, stage2"):
        backbone.out_features = ["stage9"]
    assert backbone.out_indices == [2], "a refused choice changes nothing"
    backbone.save_pretrained(tmp_path)
    again = type(backbone).from_pretrained(tmp_path).eval()
    assert again.out_features == ["stage2"]
    assert torch.equal(again(images).feature_maps[0], backbone(images).feature_maps[0])
    backbone.config.reshape_hidden_states, backbone.config.apply_layernorm = False, False
    assert torch.equal(backbone(images).feature_maps[0], outputs.hidden_states[2])


@FAMILY
def test_the_callers_stages_take_the_place_of_the_stored_ones(family: str, tmp_path: Path) -> None:
    backbone_class = model_class(family, "AutoBackbone")
    build(family, "AutoModel", out_indices=[1]).save_pretrained(tmp_path)
    assert backbone_class.from_pretrained(tmp_path).out_features == ["stage1"]
    assert backbone_class.from_pretrained(tmp_path, out_features=["stem", "stage2"]).out_indices == [0, 2]
    assert backbone_class.from_pretrained(tmp_path, out_indices=[0]).out_features == ["stem"]
    with pytest.raises(ValueError, match="different stages"):
        backbone_class.from_pretrained(tmp_path, out_features=["stem"], out_indices=[1]).out_indices  # noqa: B018


@FAMILY
def test_resized_tables_stay_frozen_or_trainable(family: str, tmp_path: Path) -> None:
    model = build(family, "AutoModel")
    for trainable in (True, False):
        model.embeddings.position_embeddings.requires_grad_(trainable)
        model.resize_positions([20, 16])
        assert model.embeddings.position_embeddings.requires_grad is trainable
    assert model.embeddings.native_grid == (5, 4)


@FAMILY
def test_names_of_the_callers_own(family: str, tmp_path: Path) -> None:
    """`key_mapping` goes beside the names that the family knows itself."""
    model = build(family, "AutoModelForImageClassification")
    model.classifier.weight.data.add_(1.0)
    renamed = {name.replace("classifier.", "head."): x for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=renamed)
    with no_warnings():
        again = type(model).from_pretrained(tmp_path, key_mapping={r"^head\.": "classifier."})
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert set(again.state_dict()) == set(model.state_dict())


@FAMILY
def test_a_mask_token_is_left_behind_in_silence(family: str, tmp_path: Path) -> None:
    model = model_class(family, "AutoModel")(tiny_config(family), use_mask_token=True)
    model.save_pretrained(tmp_path)
    assert model.embeddings.mask_token is not None
    with no_warnings():
        assert model_class(family, "AutoBackbone").from_pretrained(tmp_path).base_model.embeddings.mask_token is None


@FAMILY
def test_an_original_table_is_for_whole_patches(family: str) -> None:
    """transformers drops the pixels that fill no patch; here a table's size says so."""
    config_class = type(tiny_config(family))
    for image_size, patch_size, whole in [(30, 8, [24, 24]), ([30, 16], [8, 16], [24, 16]), (32, 8, 32)]:
        original = {"image_size": image_size, "patch_size": patch_size, "hidden_size": 8}
        assert config_class.convert_original(original) == {**original, "image_size": whole}
    assert config_class.convert_original({"hidden_size": 8}) == {"hidden_size": 8}


@FAMILY
def test_positions_are_interpolated_in_float32_under_autocast(family: str) -> None:
    embeddings = build(family, "AutoModel").embeddings
    right = embeddings.positions((7, 5), None)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embeddings.positions((7, 5), None)[1], right)


@FAMILY
def test_the_mean_of_no_patches_is_zero(family: str) -> None:
    model = build(family, "AutoModelForImageClassification", pooling="mean")
    mask = torch.ones(2, 4, 3)
    mask[1] = 0
    logits = model(random_images(2), patch_mask=mask).logits
    assert torch.equal(logits[1], model.classifier.bias) and not torch.equal(logits[0], model.classifier.bias)


@FAMILY
def test_accumulated_losses_are_means_of_their_batches(family: str, tmp_path: Path) -> None:
    """The head's loss is a mean over images, which Trainer has to know to divide by the number of accumulated steps."""
    model = build(family, "AutoModelForImageClassification")
    inputs = batch_of("AutoModelForImageClassification", 8)
    right = model(**inputs).loss.item()
    logged: list[float] = []

    class Log(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            logged.extend([logs["loss"]] if "loss" in logs else [])

    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({name: x.tolist() for name, x in inputs.items()}).with_format("torch")
    Trainer(model, arguments, train_dataset=rows, callbacks=[Log()]).train()
    assert logged == [pytest.approx(right, abs=1e-4)]
