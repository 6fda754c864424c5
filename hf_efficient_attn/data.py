"""Batches with a global attention mask, and of images of different size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from transformers import default_data_collator


@dataclass
class DataCollatorWithGlobalAttention:
    """Pads `global_attention_mask`, which transformers' collators do not know, along with what they do pad.

    Args:
        collator: any collator of transformers with a `tokenizer` (`DataCollatorWithPadding`,
            `DataCollatorForTokenClassification`, `DataCollatorForLanguageModeling`, ...).

    Each feature may have `global_attention_mask`, a list of 0 and 1 as long as its `input_ids`; the batch then has it
    as `[batch, length]` int64, padded with 0 on the side of `input_ids`. If no feature has one, neither has the batch.

    Raises:
        ValueError: only some features have a mask, or a mask is not as long as its `input_ids`.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `features` into tensors."""
        masks = [feature.get("global_attention_mask") for feature in features]
        missing = [row for row, mask in enumerate(masks) if mask is None]
        plain = [{k: v for k, v in feature.items() if k != "global_attention_mask"} for feature in features]
        batch = self.collator(plain)
        if len(missing) == len(features):
            return batch
        if missing:
            raise ValueError(
                f"feature {missing[0]} has no global_attention_mask while others have one; give all or none."
            )
        if not hasattr(self.collator, "tokenizer"):
            raise ValueError(
                f"the collator {self.collator!r} has no tokenizer to tell the padding side; "
                "wrap one that has, such as DataCollatorWithPadding."
            )
        padded = torch.zeros_like(batch["input_ids"], dtype=torch.long)
        length, left = padded.shape[-1], self.collator.tokenizer.padding_side == "left"
        # A feature has one text, or for multiple choice one text a choice.
        targets = iter(padded.view(-1, length))
        for row, (mask, feature) in enumerate(zip(masks, features, strict=True)):
            for text, ids in zip(_texts(mask), _texts(feature["input_ids"]), strict=True):
                if len(text) != len(ids):
                    raise ValueError(
                        f"global_attention_mask of feature {row} has {len(text)} entries for {len(ids)} "
                        "input_ids; give one entry a token."
                    )
                start = length - len(text) if left else 0
                next(targets)[start : start + len(text)] = torch.as_tensor(text)
        batch["global_attention_mask"] = padded
        return batch


def _texts(values: Any) -> list[Any]:
    """`[length]` or `[choices, length]` as a list of rows."""
    return list(values) if len(values) > 0 and torch.as_tensor(values[0]).dim() > 0 else [values]


@dataclass
class DataCollatorWithPatchMask:
    """Images of different size in one batch: zeros at the right and bottom, and a mask of each image's own patches.

    Args:
        patch_size: of the model, one number or height and width.

    Each feature has `pixel_values` `[channels, height, width]`, and may have `bool_masked_pos` of its patches, `[rows,
    columns]` or `[patches]`, which is filled up with 0; everything else goes through `default_data_collator`. The batch
    has whole patches `pixel_values` `[batch, channels, height, width]` and `patch_mask` int64 `[batch, rows, columns]`.
    Images of one size stay as they are, without a mask.

    Raises:
        ValueError: a patch size that is none; no features; one without `pixel_values`, of another shape or number of
            channels, or with a `bool_masked_pos` that is not of its patches.
    """

    patch_size: int | Sequence[int] = 16

    def __post_init__(self) -> None:
        steps = self._steps
        if len(steps) != 2 or not all(isinstance(step, int) and step > 0 for step in steps):
            raise ValueError(f"patch_size = {self.patch_size!r}: give one number, or height and width, of 1 or more.")

    @property
    def _steps(self) -> tuple[int, ...]:
        several = isinstance(self.patch_size, Sequence) and not isinstance(self.patch_size, str)
        return tuple(self.patch_size) if several else (self.patch_size,) * 2

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `features` into tensors."""
        if not features:
            raise ValueError("features = []: a batch needs at least one image.")
        images = [
            torch.as_tensor(feature["pixel_values"]) if "pixel_values" in feature else None for feature in features
        ]
        channels = None if images[0] is None else images[0].shape[0]
        for row, image in enumerate(images):
            if image is None or image.dim() != 3 or 0 in image.shape or image.shape[0] != channels:
                found = "none" if image is None else f"shape {list(image.shape)}"
                raise ValueError(
                    f"feature {row} needs pixel_values [channels, height, width], with as many channels as the others, "
                    f"got {found}."
                )
        own = ("pixel_values", "bool_masked_pos")
        others = [{name: x for name, x in feature.items() if name not in own} for feature in features]
        batch = default_data_collator(others) if others[0] else {}
        grids = [
            [-(-size // step) for size, step in zip(image.shape[1:], self._steps, strict=True)] for image in images
        ]
        rows, columns = (max(grid[axis] for grid in grids) for axis in (0, 1))
        if any("bool_masked_pos" in feature for feature in features):
            batch["bool_masked_pos"] = self._masked_patches(features, grids, rows, columns)
        if len({image.shape for image in images}) == 1:
            return {"pixel_values": torch.stack(images), **batch}
        dtype = reduce(torch.promote_types, (image.dtype for image in images))
        height, width = rows * self._steps[0], columns * self._steps[1]
        pixels = torch.zeros(len(images), channels, height, width, dtype=dtype)
        mask = torch.zeros(len(images), rows, columns, dtype=torch.long)
        for row, (image, grid) in enumerate(zip(images, grids, strict=True)):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            mask[row, : grid[0], : grid[1]] = 1
        return {"pixel_values": pixels, "patch_mask": mask, **batch}

    def _masked_patches(
        self, features: list[dict[str, Any]], grids: list[list[int]], rows: int, columns: int
    ) -> torch.Tensor:
        """`bool_masked_pos` of all images, int64 `[batch, rows, columns]`."""
        masked = torch.zeros(len(features), rows, columns, dtype=torch.long)
        for row, (feature, grid) in enumerate(zip(features, grids, strict=True)):
            given = torch.as_tensor(feature.get("bool_masked_pos", ()))
            if list(given.shape) == [grid[0] * grid[1]]:
                given = given.unflatten(0, grid)
            if list(given.shape) != grid:
                raise ValueError(
                    f"feature {row} needs bool_masked_pos [rows, columns] = {grid} of its patches, got shape "
                    f"{list(given.shape)}."
                )
            masked[row, : grid[0], : grid[1]] = given
        return masked
