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
