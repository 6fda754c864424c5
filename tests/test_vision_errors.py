"""Bad configs and calls of vision families: errors that name the value, the rule and the fix."""

import pytest
import torch
from helpers import random_images, tiny_config
from test_vision_families import FAMILY, build


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "uneven table": ({"image_size": [18, 12]}, r"no multiple of patch_size = 4.*give \[16, 12\]"),
    "pooling": ({"pooling": "max"}, "pooling = 'max': choose one of cls, mean"),
    "pooling without token": ({"use_cls_token": False}, "use pooling='mean'"),
    "uneven": ({"uneven_size": "crop"}, "uneven_size = 'crop': choose one of pad, refuse"),
    "registers": ({"num_register_tokens": -1}, "num_register_tokens = -1"),
    "three sizes": ({"image_size": [4, 4, 4]}, "one number, or height and width"),
    "no patch": ({"patch_size": 0}, "patch_size = 0"),
    "channels": ({"num_channels": 0}, "num_channels = 0"),
    "pooler": ({"pooler_act": "tanch"}, "pooler_act = 'tanch' is not an activation; try tanh"),
    "pooler size": ({"pooler_output_size": 0}, "pooler_output_size = 0"),
    "no stage": ({"out_features": []}, "give one stage or more"),
    "stage twice": ({"out_indices": [1, 1]}, "each once"),
    "stage too far": ({"out_indices": [3]}, "out_indices has 3; the stages are 0"),
    "two choices": ({"out_features": ["stem"], "out_indices": [1]}, "different stages"),
    "misspelt": ({"num_registers": 3}, "did you mean 'num_register_tokens'"),
    "dropout": ({"hidden_dropout_prob": 2.0}, "between 0 and 1"),
    "mechanism": ({"attention": "neighbourhood"}, "Did you mean 'neighborhood'"),
}


@FAMILY
@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_options_are_refused(family: str, name: str) -> None:
    options, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        tiny_config(family, **options)


CALLS: dict[str, tuple[dict[str, object], str]] = {
    "nothing": ({}, "needs pixel_values"),
    "no batch": ({"pixel_values": torch.zeros(3, 16, 12)}, r"must be \[batch, 3, height, width\]"),
    "a list": ({"pixel_values": torch.zeros(2, 3, 16, 12).tolist()}, "pixel_values is a list; give a tensor"),
    "numpy": ({"pixel_values": torch.zeros(2, 3, 16, 12).numpy()}, "is a ndarray; .* return_tensors='pt'"),
    "channels": ({"pixel_values": torch.zeros(2, 1, 16, 12)}, "num_channels = 3"),
    "empty": ({"pixel_values": torch.zeros(2, 3, 0, 12)}, "empty"),
    "mask of pixels": ({"patch_mask": torch.ones(2, 16, 12)}, r"\[2, 4, 3\] of patches"),
    "additive mask": ({"patch_mask": torch.full((2, 4, 3), -1.0)}, "marks tokens with 1"),
    "masked patches without a token": ({"bool_masked_pos": torch.ones(2, 12)}, "without a mask token"),
    "text": ({"attention_mask": torch.ones(2, 12)}, "unknown argument 'attention_mask'"),
}


@FAMILY
@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_explained(family: str, name: str) -> None:
    given, message = CALLS[name]
    model = build(family, "AutoModel")
    with pytest.raises(ValueError, match=message):
        model(**({} if name == "nothing" else {"pixel_values": random_images(2), **given}))
    assert model(random_images(2)).last_hidden_state.isfinite().all()


@FAMILY
def test_a_loss_needs_predictions_as_large_as_patches(family: str) -> None:
    model = build(family, "AutoModelForMaskedImageModeling", encoder_stride=2)
    assert model(random_images(2)).reconstruction.shape == (2, 3, 8, 6)
    with pytest.raises(ValueError, match="encoder_stride = 2 with patch_size = 4"):
        model(random_images(2), bool_masked_pos=torch.ones(2, 12))


@FAMILY
def test_a_loss_of_no_masked_patches_is_zero(family: str) -> None:
    model = build(family, "AutoModelForMaskedImageModeling")
    assert model(random_images(2), bool_masked_pos=torch.zeros(2, 12)).loss == 0


@FAMILY
def test_a_size_that_cannot_be_is_refused_and_changes_nothing(family: str) -> None:
    model = build(family, "AutoModel")
    table = model.embeddings.position_embeddings
    with pytest.raises(ValueError, match="no multiple"):
        model.resize_positions(18)
    assert model.config.image_size == [16, 12] and model.embeddings.position_embeddings is table
