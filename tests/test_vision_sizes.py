"""Images of any size in vision families: positions, sizes that the patch does not divide, batches of mixed sizes."""

from typing import Any

import pytest
import torch
from helpers import model_class, random_images, randomise_, tiny_config
from test_vision_families import FAMILY, HEAD, build, result_of
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_efficient_attn import DataCollatorWithPatchMask


@FAMILY
def test_positions_at_the_native_size_are_the_table(family: str) -> None:
    """Bit by bit, also where a size may be any (compiled) and where a mask gives each image its own grid."""
    embeddings = build(family, "AutoModel").embeddings
    table = embeddings.position_embeddings[:, 1:]
    assert torch.equal(embeddings.positions((4, 3), None)[1], table)
    mask = torch.ones(2, 6, 5, dtype=torch.bool)
    mask[0, 4:], mask[0, :, 3:] = False, False
    found = embeddings.positions((6, 5), mask)[1][0].unflatten(0, (6, 5))
    assert torch.equal(found[:4, :3].flatten(0, 1), table[0])


@FAMILY
@pytest.mark.parametrize("grid", [(1, 1), (4, 3), (3, 4), (9, 7), (2, 40), (64, 64)])
def test_positions_are_torchs_bicubic_interpolation(family: str, grid: tuple[int, int]) -> None:
    embeddings = build(family, "AutoModel").embeddings.double()
    table = embeddings.position_embeddings[:, 1:].unflatten(1, (4, 3)).permute(0, 3, 1, 2)
    right = nn.functional.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    mask = torch.ones(1, *grid, dtype=torch.bool)
    for patch_mask in (None, mask):
        found = embeddings.positions(grid, patch_mask)[1]
        torch.testing.assert_close(found, right.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


@HEAD
def test_sizes_that_the_patch_does_not_divide(family: str, auto: str) -> None:
    """Filled up with zeros, so that every pixel counts; or refused."""
    model = build(family, auto, uneven_size="pad")
    images = random_images(2, 18, 11)
    filled = nn.functional.pad(images, (0, 1, 0, 2))
    found, right = result_of(model, {"pixel_values": images}), result_of(model, {"pixel_values": filled})
    if "Masked" in auto:
        right = right[:, :, :18, :11]
    assert torch.equal(found, right)
    changed = images.clone()
    changed[:, :, -1, -1] += 1.0
    assert not torch.equal(result_of(model, {"pixel_values": changed}), found), "the last pixel counts"
    refusing = build(family, auto, uneven_size="refuse")
    with pytest.raises(ValueError, match=r"18 x 11 pixels has no whole patches of 4 x 4.*uneven_size = 'pad'"):
        refusing(images)
    refusing(random_images(2, 20, 12))


@FAMILY
def test_rectangular_patches(family: str) -> None:
    model = build(family, "AutoModel", patch_size=[4, 2], image_size=[16, 12])
    assert model.config.native_grid == (4, 6)
    outputs = model(random_images(2, 16, 12))
    assert outputs.last_hidden_state.shape == (2, 2 + 24, 32)
    narrow = build(family, "AutoModel", patch_size=[2, 4], image_size=[12, 16])
    narrow.load_state_dict({**model.state_dict(), **_transposed(model)})
    turned = narrow(random_images(2, 16, 12).transpose(2, 3)).last_hidden_state[:, 2:].unflatten(1, (6, 4))
    right = outputs.last_hidden_state[:, 2:].unflatten(1, (4, 6)).transpose(1, 2)
    torch.testing.assert_close(turned, right, rtol=1e-5, atol=1e-5)


def _transposed(model: PreTrainedModel) -> dict[str, Tensor]:
    """Its weights for images with rows and columns exchanged."""
    table = model.embeddings.position_embeddings.detach()
    patches = table[:, 1:].unflatten(1, (4, 6)).transpose(1, 2).flatten(1, 2)
    return {
        "embeddings.position_embeddings": torch.cat([table[:, :1], patches], dim=1),
        "embeddings.patch_embeddings.projection.weight": model.embeddings.patch_embeddings.projection.weight.detach()
        .transpose(2, 3)
        .contiguous(),
    }


@FAMILY
def test_without_positions_the_patches_have_no_order(family: str) -> None:
    """Patches exchanged are states exchanged, and the class token's state stays."""
    model = build(family, "AutoModel")
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
    images = random_images(1, 16, 12)
    exchanged = images.flip(0).clone()
    exchanged[:, :, 0:4, 0:4], exchanged[:, :, 8:12, 4:8] = images[:, :, 8:12, 4:8], images[:, :, 0:4, 0:4]
    order = list(range(14))
    order[2], order[2 + 7] = 2 + 7, 2
    found, right = model(exchanged).last_hidden_state, model(images).last_hidden_state[:, order]
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_collator_pads_images_and_marks_their_patches() -> None:
    images = [random_images(1, *size)[0] for size in ((8, 12), (10, 3), (16, 16))]
    features = [{"pixel_values": image, "labels": number} for number, image in enumerate(images)]
    batch = DataCollatorWithPatchMask(patch_size=4)(features)
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["labels"].tolist() == [0, 1, 2]
    assert batch["patch_mask"].sum(dim=(1, 2)).tolist() == [6, 3, 16]
    for row, image in enumerate(images):
        assert torch.equal(batch["pixel_values"][row, :, : image.shape[1], : image.shape[2]], image)
    even = DataCollatorWithPatchMask(patch_size=[4, 4])([{"pixel_values": images[0]}] * 2)
    assert set(even) == {"pixel_values"}, "images of one size need no mask"
    with pytest.raises(ValueError, match="pixel_values"):
        DataCollatorWithPatchMask(patch_size=4)([{"image": 1}])


def test_the_collator_of_other_patches_dtypes_and_masks() -> None:
    """Patches that are no squares; numbers keep their values; masked patches come along."""
    collate = DataCollatorWithPatchMask(patch_size=(2, 4))
    images = [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 3, 9), 0.7)]
    masked = [torch.ones(2, 1), torch.tensor([[0, 1, 0], [1, 0, 1]])]
    flat = collate([{"pixel_values": x, "bool_masked_pos": y.flatten()} for x, y in zip(images, masked, strict=True)])
    batch = collate([{"pixel_values": x, "bool_masked_pos": y} for x, y in zip(images, masked, strict=True)])
    assert torch.equal(flat["bool_masked_pos"], batch["bool_masked_pos"])
    assert batch["pixel_values"].shape == (2, 3, 4, 12) and batch["pixel_values"][1, 0, 0, 0] == 0.7
    assert batch["patch_mask"].tolist() == [[[1, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]]]
    assert batch["bool_masked_pos"].tolist() == [[[1, 0, 0], [1, 0, 0]], [[0, 1, 0], [1, 0, 1]]]


@pytest.mark.parametrize("size", [0, "4", (4,), (4, 0), 2.0])
def test_patch_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="patch_size = .*: give one number, or height and width"):
        DataCollatorWithPatchMask(patch_size=size)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "a batch needs at least one image"),
        ([{"pixel_values": torch.zeros(3, 4, 4)}, {"pixel_values": torch.zeros(1, 4, 4)}], "feature 1 needs"),
        ([{"pixel_values": torch.zeros(3, 0, 4)}], "feature 0 needs pixel_values"),
        (
            [{"pixel_values": torch.zeros(3, 8, 4), "bool_masked_pos": torch.ones(1, 2)}],
            r"feature 0 needs bool_masked_pos \[rows, columns\] = \[2, 1\]",
        ),
    ],
)
def test_features_that_do_not_fit(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorWithPatchMask(patch_size=4)(features)


def test_the_loss_of_masked_patches_does_not_depend_on_batch_mates() -> None:
    """Of an image that patches do not divide, too."""
    config = tiny_config("eff_vit", image_size=16, patch_size=4, encoder_stride=4)
    model = randomise_(model_class("eff_vit", "AutoModelForMaskedImageModeling")(config))
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(3, *size, generator=generator) for size in ((9, 7), (16, 16)))
    masked = torch.zeros(3, 2).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(1.0))
    pair = [
        {"pixel_values": small, "bool_masked_pos": masked},
        {"pixel_values": large, "bool_masked_pos": masked.new_zeros(4, 4)},
    ]
    together = model(**DataCollatorWithPatchMask(4)(pair)).loss
    assert_close(together, model(small[None], bool_masked_pos=masked[None]).loss)
    with pytest.raises(ValueError, match=r"bool_masked_pos must be \[batch, patches\] = \[1, 6\]"):
        model(small[None], bool_masked_pos=masked.T[None])
