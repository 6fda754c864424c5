"""Batches with a global attention mask, and of images of different size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    Each feature has `pixel_values` `[channels, height, width]`; everything else goes through
    `default_data_collator`. The batch has `pixel_values` `[batch, channels, height, width]`, in whole patches, and
    `patch_mask` int64 `[batch, rows, columns]`. Images of one size stay as they are, without a mask.

    Raises:
        ValueError: a feature without `pixel_values`, or of another shape.
    """

    patch_size: int | Sequence[int] = 16

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate `features` into tensors."""
        images = [
            torch.as_tensor(feature["pixel_values"]) if "pixel_values" in feature else None for feature in features
        ]
        for row, image in enumerate(images):
            if image is None or image.dim() != 3:
                found = "none" if image is None else f"shape {list(image.shape)}"
                raise ValueError(f"feature {row} needs pixel_values [channels, height, width], got {found}.")
        others = [{name: x for name, x in feature.items() if name != "pixel_values"} for feature in features]
        batch = default_data_collator(others) if others[0] else {}
        if len({image.shape for image in images}) == 1:
            return {"pixel_values": torch.stack(images), **batch}
        steps = (self.patch_size,) * 2 if isinstance(self.patch_size, int) else tuple(self.patch_size)
        grids = [[-(-size // step) for size, step in zip(image.shape[1:], steps, strict=True)] for image in images]
        rows, columns = (max(grid[axis] for grid in grids) for axis in (0, 1))
        pixels = images[0].new_zeros(len(images), images[0].shape[0], rows * steps[0], columns * steps[1])
        mask = torch.zeros(len(images), rows, columns, dtype=torch.long)
        for row, (image, grid) in enumerate(zip(images, grids, strict=True)):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            mask[row, : grid[0], : grid[1]] = 1
        return {"pixel_values": pixels, "patch_mask": mask, **batch}
