"""Batches with a global attention mask."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


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
        length, left = batch["input_ids"].shape[1], self.collator.tokenizer.padding_side == "left"
        padded = torch.zeros(len(masks), length, dtype=torch.long)
        for row, (mask, feature) in enumerate(zip(masks, features, strict=True)):
            if len(mask) != len(feature["input_ids"]):
                raise ValueError(
                    f"global_attention_mask of feature {row} has {len(mask)} entries for {len(feature['input_ids'])} "
                    "input_ids; give one entry a token."
                )
            start = length - len(mask) if left else 0
            padded[row, start : start + len(mask)] = torch.as_tensor(mask)
        batch["global_attention_mask"] = padded
        return batch
