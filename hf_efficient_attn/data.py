"""Batches with a global attention mask, of packed rows, and of images of different size."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, compress
from typing import Any

import torch
from transformers import default_data_collator

from .encoder.packing import first_tokens


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
class DataCollatorWithPacking:
    """Packs texts of different length into rows, so that little of a batch is padding; another collator does the rest.

    The models of this package keep the documents of a row apart: nothing attends another document, and each is computed
    as in a row of its own. Other models do not: Trainer drops `document_ids`, which they do not take, and every
    document of a row attends the others without a word of warning. Padding, which costs in every layer, is left at the
    end of rows only.

    Args:
        collator: makes a batch of the rows; any with a `tokenizer`, such as `DataCollatorForLanguageModeling` (masks
            after packing, or `mlm=False`), `DataCollatorForTokenClassification` or `DataCollatorWithPadding` of
            transformers, or `DataCollatorForReplacedTokenDetection`.
        max_length: most tokens of a row. It may be more than the model's longest input, which is about documents.
        pad_to_multiple_of: fill rows up to a multiple of this length; `max_length` for batches that are always as wide.
        causal: for causal language models: labels (`input_ids`, where `collator` makes none or has `mlm=False`) are
            -100 at the first token of each document, which nothing predicts, so that Trainer counts what is predicted.
            None looks whether `collator` has `mlm=False`.

    A feature has `input_ids`, and may have `attention_mask`, whose zeros are dropped, and other columns with one entry
    a token (`labels`, `token_type_ids`, `special_tokens_mask`, `global_attention_mask`, ...). The longest come first,
    each into the row in which least room is left; within a row they stand in the order of the batch. So a batch of n
    features has fewer than n rows: raise the batch size (`per_device_train_batch_size` of Trainer counts features).

    Returns:
        What `collator` makes of the rows, with `attention_mask`, 1 at tokens, and `document_ids` int64
        `[rows, length]`: 0 at padding and 1, 2, ... at the tokens of a row's documents. `labels` are -100 at padding.

    Raises:
        ValueError: options out of range, or a collator without tokenizer; for a batch: no features, one without tokens
            or with more than `max_length`, columns that only some have or that have not one entry a token, padding
            without a pad token, a collator that changes the length of rows.

    With several processes each makes batches of its own, with a number of rows of its own. Streamed data is collated by
    the first process alone and cut for the others, where widths and numbers of rows do not fit: set
    `accelerator_config={"dispatch_batches": False}`. Evaluation on several processes takes `prediction_loss_only=True`.

    Example:

    ```python
    >>> collator = DataCollatorWithPacking(DataCollatorForLanguageModeling(tokenizer), max_length=1024)
    >>> Trainer(EffLongformerForMaskedLM(config), arguments, train_dataset=data, data_collator=collator).train()
    ```
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]
    max_length: int
    pad_to_multiple_of: int | None = None
    causal: bool | None = None

    def __post_init__(self) -> None:
        step = 1 if self.pad_to_multiple_of is None else self.pad_to_multiple_of
        for name, value in (("max_length", self.max_length), ("pad_to_multiple_of", step)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r}: give a number of tokens, 1 or more.")
        if self.max_length % step != 0:
            raise ValueError(
                f"max_length = {self.max_length} is no multiple of pad_to_multiple_of = {step}, to which rows are "
                "filled up; change one of them."
            )
        self._of_collator("tokenizer")

    def _of_collator(self, name: str) -> Any:
        """The attribute `name` of the collator, of the inner one where it wraps one; None if it has no such."""
        collator = self.collator
        while not hasattr(collator, "tokenizer") and hasattr(collator, "collator"):
            collator = collator.collator
        if not hasattr(collator, "tokenizer"):
            raise ValueError(
                f"the collator {self.collator!r} has no tokenizer to tell how to pad; take one that has, such as "
                "DataCollatorForLanguageModeling or DataCollatorWithPadding."
            )
        return getattr(collator, name, None)

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pack `features` into rows and collate these."""
        if not features:
            raise ValueError("features = []: a batch needs at least one text.")
        names = dict.fromkeys(["input_ids", "attention_mask", *chain.from_iterable(features)])
        documents = [_document(feature, number, names, self.max_length) for number, feature in enumerate(features)]
        sizes = [len(document["input_ids"]) for document in documents]
        plan = _best_fit(sizes, self.max_length)
        step = self.pad_to_multiple_of or 1
        length = max(-(-sum(sizes[number] for number in row) // step) * step for row in plan)
        rows = [self._row([documents[number] for number in row], length) for row in plan]
        document_ids = torch.tensor([row.pop("document_ids") for row in rows])
        batch = dict(self.collator(rows))
        if tuple(batch["input_ids"].shape) != tuple(document_ids.shape):
            raise ValueError(
                f"the collator {self.collator!r} makes {list(batch['input_ids'].shape)} of rows "
                f"{list(document_ids.shape)}; set pad_to_multiple_of here, and none there."
            )
        return self._with_labels({**batch, "document_ids": document_ids})

    def _row(self, documents: list[dict[str, list[Any]]], length: int) -> dict[str, list[Any]]:
        """The documents one after the other, and padding up to `length`."""
        tokenizer = self._of_collator("tokenizer")
        padding = length - sum(len(document["input_ids"]) for document in documents)
        if padding > 0 and tokenizer.pad_token_id is None:
            raise ValueError(
                f"rows are to be padded to {length} tokens, but this {type(tokenizer).__name__} has pad_token = None; "
                "set one (tokenizer.pad_token = tokenizer.eos_token, say)."
            )
        fillers = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "special_tokens_mask": 1,
            "labels": -100,
            "word_ids": None,
        }
        row = {name: list(chain.from_iterable(document[name] for document in documents)) for name in documents[0]}
        row["document_ids"] = [n for n, document in enumerate(documents, start=1) for _ in document["input_ids"]]
        for name, values in row.items():
            entry = values[0]
            is_tuple = isinstance(entry, list | tuple)  # such as the offsets of a token
            filler = [fillers.get(name, type(entry)([0] * len(entry)) if is_tuple else 0)] * padding
            row[name] = filler + values if tokenizer.padding_side == "left" else values + filler
        return row

    def _with_labels(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with labels only where something is predicted."""
        copies = self._of_collator("mlm") is False
        causal = copies if self.causal is None else self.causal
        labels, document_ids = batch.get("labels"), batch["document_ids"]
        if causal and (labels is None or copies):
            # Not those of the collator, which take every pad id for padding, also where it ends a text.
            labels = batch["input_ids"]
        if labels is None:
            return batch
        ignored = document_ids == 0
        if causal:
            ignored = ignored | first_tokens(document_ids)
        return {**batch, "labels": labels.masked_fill(ignored, -100)}


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of `sizes`, in rows of at most `room` in sum: the largest first, each where least room is left.

    Best-fit decreasing: at most 11/9 of the fewest possible rows, and four more (Johnson et al. 1974).
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room that is left and in which row, in order
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = bisect_left(free, (sizes[number], 0))
        if place == len(free):
            rows.append([])
            left, row = room, len(rows) - 1
        else:
            left, row = free.pop(place)
        rows[row].append(number)
        insort(free, (left - sizes[number], row))
    return sorted(sorted(row) for row in rows)


def _document(feature: Mapping[str, Any], number: int, names: Iterable[str], max_length: int) -> dict[str, list[Any]]:
    """The columns `names` of feature `number` without padding, each a list of one entry a token."""
    ids = _entries(feature.get("input_ids"))
    if not ids or isinstance(ids[0], list):
        raise ValueError(
            f"feature {number} needs input_ids, a list of one or more ids; drop empty texts from the data set."
        )
    given = {"attention_mask": [1] * len(ids), **feature}
    columns = {}
    for name in names:
        if name not in given:
            raise ValueError(f"feature {number} has no {name} while others have one; give all or none.")
        columns[name] = _entries(given[name])
        if columns[name] is None or len(columns[name]) != len(ids):
            raise ValueError(
                f"{name} of feature {number} has not one entry for each of the {len(ids)} input_ids; drop the column, "
                "as packed rows have columns of tokens only."
            )
    if not all(columns["attention_mask"]):
        columns = {name: list(compress(values, columns["attention_mask"])) for name, values in columns.items()}
    found = len(columns["input_ids"])
    if found == 0:
        raise ValueError(f"feature {number} has attention_mask 0 everywhere; drop empty texts from the data set.")
    if found > max_length:
        raise ValueError(
            f"feature {number} has {found} tokens, more than a row takes (max_length = {max_length}); truncate with "
            f"tokenizer(..., truncation=True, max_length={max_length}), or raise max_length."
        )
    return columns


def _entries(values: Any) -> list[Any] | None:
    """`values` as a list; None for what is no list, array or tensor."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values) if isinstance(values, list | tuple) else None


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
