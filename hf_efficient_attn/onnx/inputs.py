"""What a program reads: names, which of its sizes may change, and examples of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel


class ProgramInputs:
    """The inputs of one model's program.

    Args:
        model: the model.
        more: names of inputs besides the usual ones: `token_type_ids`, `position_ids`, `global_attention_mask`; for
            images `patch_mask`.

    Raises:
        ValueError: an input that the model does not have.
    """

    def __init__(self, model: PreTrainedModel, more: Sequence[str] = ()) -> None:
        self.config = model.config
        self.reads_images = model.main_input_name == "pixel_values"
        self.has_choices = type(model).__name__.endswith("ForMultipleChoice")
        self.token_types = getattr(self.config, "type_vocab_size", 0)
        if self.reads_images:
            usual, possible = ["pixel_values"], ["patch_mask"]
        else:
            usual, possible = ["input_ids", "attention_mask"], ["position_ids"]
            (usual if self.token_types > 1 else possible).append("token_type_ids")
            if hasattr(self.config, "max_global_tokens"):
                possible.append("global_attention_mask")
        for name in more:
            if name not in (*usual, *possible):
                raise ValueError(
                    f"input {name!r}: a program of {type(model).__name__} reads {', '.join(usual)}, and on request "
                    f"{', '.join(possible)}."
                )
        self.names = tuple(dict.fromkeys((*usual, *more)))

    @property
    def takes_whole_patches(self) -> bool:
        """Whether images come in whole patches only: because others are refused, or because a mask names patches."""
        return self.config.uneven_size == "refuse" or "patch_mask" in self.names

    def sizes(self) -> dict[str, dict[int, Any]]:
        """Input -> dimension -> its name and bounds, as `torch.export` takes them."""
        batch = Dim("batch", min=1)
        if not self.reads_images:
            length = Dim("length", min=1, max=self.config.max_input_length)
            middle = {1: Dim("choices", min=1)} if self.has_choices else {}
            return {name: {0: batch, **middle, len(middle) + 1: length} for name in self.names}
        if self.takes_whole_patches:
            # From two on: to torch.export a dimension of 1 is another program.
            rows, columns = (Dim(name, min=2, max=2**12) for name in ("rows", "columns"))
            high, wide = self.config.patch_shape
            sizes = {"pixel_values": {0: batch, 2: high * rows, 3: wide * columns}}
            return {**sizes, "patch_mask": {0: batch, 1: rows, 2: columns}} if "patch_mask" in self.names else sizes
        pixels = zip((2, 3), ("height", "width"), self.config.patch_shape, strict=True)
        return {"pixel_values": {0: batch, **{axis: Dim(name, min=size + 1, max=2**16) for axis, name, size in pixels}}}

    def example(self, batch: int, length: int, *, padded: bool, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs.

        Args:
            batch: examples.
            length: tokens, of images rows and columns of patches; as many as the model reads if that is fewer.
            padded: part of the last example is padding.
            seed: of the numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.reads_images:
            return self._images(batch, length, padded, generator)
        length = min(length, self.config.max_input_length)
        shape = (batch, 2, length) if self.has_choices else (batch, length)
        keep = torch.ones(shape, dtype=torch.long)
        if padded:
            keep[-1, ..., length - length // 3 :] = 0
        ids = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        second = (torch.arange(length) >= length // 2).long()
        made = {
            "input_ids": ids,
            "attention_mask": keep,
            "token_type_ids": (second if self.token_types > 1 else torch.zeros_like(second)).expand(shape).clone(),
            "position_ids": torch.arange(length).expand(shape).clone(),
            # In a causal model only the first ones may be global.
            "global_attention_mask": (torch.arange(length) < 1).long().expand(shape).clone(),
        }
        return {name: made[name] for name in self.names}

    def _images(self, batch: int, side: int, padded: bool, generator: torch.Generator) -> dict[str, Tensor]:
        rows, columns = side, side + 1
        height, width = (count * size for count, size in zip((rows, columns), self.config.patch_shape, strict=True))
        if not self.takes_whole_patches:
            height, width = height + 1, width - 1
        made = {
            "pixel_values": torch.randn(batch, self.config.num_channels, height, width, generator=generator),
            "patch_mask": torch.ones(batch, rows, columns, dtype=torch.long),
        }
        if padded:
            made["patch_mask"][-1, rows - rows // 3 :] = 0
        return {name: made[name] for name in self.names}

    @property
    def longest_that_fits(self) -> int:
        """Tokens of texts that no program refuses, whatever is in them: all may be global."""
        return min(
            self.config.max_input_length, getattr(self.config, "max_global_tokens", self.config.max_input_length)
        )

    def fits(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """What must be true of inputs that a runtime might not refuse, each a bool `[]` of the graph."""
        return [] if self.reads_images else [_length(inputs["input_ids"]) <= self.config.max_input_length]


def _length(ids: Tensor) -> Tensor:
    """As a number that is counted when the program runs: that of the shape is known to be within its bounds."""
    return torch.ones_like(ids.flatten(0, -2)[0]).sum()
