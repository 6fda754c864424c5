"""What enters a model: checks with clear errors, and the one place where the mask becomes bool."""

from typing import Any

import torch
from torch import Tensor

from .configuration import EffEncoderConfig


_LIBRARY_KWARGS = frozenset({"num_items_in_batch", "output_attentions", "output_hidden_states", "return_dict"})


def check_forward_kwargs(kwargs: dict[str, Any], model: str) -> None:
    """Raises `ValueError` for a forward argument that would be ignored; None and False ask for nothing."""
    for name, value in kwargs.items():
        if name in _LIBRARY_KWARGS or value is None or value is False:
            continue
        if name.startswith("encoder_"):
            raise ValueError(
                f"{model} got {name!r}: it is an encoder without cross-attention; join both texts into one input."
            )
        raise ValueError(f"{model} got the unknown argument {name!r}; remove it, it would be ignored.")


def input_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None, config: EffEncoderConfig) -> tuple[int, int]:
    """`(batch, length)` of the input; raises `ValueError` where it is missing, doubled or misshapen."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "give exactly one of input_ids and inputs_embeds, got " + ("none" if input_ids is None else "both")
        )
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, length], got shape {list(input_ids.shape)}.")
    width = config.embedding_size or config.hidden_size
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != width):
        raise ValueError(f"inputs_embeds must be [batch, length, {width}], got shape {list(inputs_embeds.shape)}.")
    batch, length = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
    if not torch.compiler.is_compiling() and (batch == 0 or length == 0):
        raise ValueError(f"the input is empty, [batch, length] = [{batch}, {length}]; give at least one token.")
    return batch, length


def check_length(length: int, past_length: int, config: EffEncoderConfig) -> None:
    """Raises `ValueError` for an input of `length` tokens after `past_length` others that is too long."""
    if past_length + length > config.max_input_length:
        if past_length > 0:
            raise ValueError(
                f"the text has {past_length + length} tokens, {past_length} of them in the cache, more than the "
                f"model's {config.max_input_length} (max_position_embeddings = {config.max_position_embeddings}); "
                "generate fewer (max_new_tokens), or build the model with a longer position table."
            )
        raise ValueError(
            f"the input has {length} tokens, more than the {config.max_input_length} of this model "
            f"(max_position_embeddings = {config.max_position_embeddings}, {config.first_position} of them reserved); "
            f"truncate with tokenizer(..., truncation=True, max_length={config.max_input_length})."
        )


def as_bool_mask(name: str, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """A mask of 0 and 1 `[batch, length]` as bool; raises `ValueError` for any other shape."""
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, length):
        raise ValueError(
            f"{name} must be [batch, length] = [{batch}, {length}] with 1 at tokens that count, got shape "
            f"{list(mask.shape)}."
        )
    # Only where looking costs no synchronisation.
    if mask.dtype != torch.bool and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (mask != 0) & (mask != 1)
        if bool(wrong.any()):
            raise ValueError(
                f"{name} contains {mask[wrong][0].item()}, but it marks tokens with 1 and the others with 0; "
                "give such a mask (not an additive one)."
            )
    return mask.bool()


def check_ids(name: str, ids: Tensor | None, batch: int, length: int, rows: int) -> None:
    """Raises `ValueError` unless `ids` is None, or `[batch, length]` or `[1, length]` rows of a table of `rows`."""
    if ids is None:
        return
    if ids.dim() != 2 or ids.shape[1] != length or ids.shape[0] not in (1, batch):
        raise ValueError(f"{name} must be [batch, length] = [{batch}, {length}], got shape {list(ids.shape)}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} are {ids.dtype}; these are rows of a table, give int64.")
    # Only where looking costs no synchronisation.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (ids < 0) | (ids >= rows)
        if bool(wrong.any()):
            raise ValueError(
                f"{name} contains {int(ids[wrong][0])}, but its table in this model has {rows} rows; "
                "use the model's own tokenizer, or leave the argument out."
            )


def check_labels(name: str, labels: Tensor, classes: int, fix: str) -> None:
    """Raises `ValueError` for a class label outside `[0, classes)` that is not the ignored -100."""
    if labels.dtype.is_floating_point:
        raise ValueError(f"{name} are {labels.dtype}; these are classes, give integers.")
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return
    wrong = (labels != -100) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"{name} contains {int(labels[wrong][0])}, outside 0 to {classes - 1} (-100 is ignored); {fix}"
        )


def check_positions(name: str, positions: Tensor) -> None:
    """Raises `ValueError` unless `positions` are integers of 0 or more."""
    if positions.dtype.is_floating_point:
        raise ValueError(f"{name} are {positions.dtype}; these are token positions, give integers.")
    if not torch.compiler.is_compiling() and bool((positions < 0).any()):
        raise ValueError(f"{name} contains {int(positions.min())}; positions count from 0, past the input is ignored.")


def check_one_per_example(name: str, labels: Tensor, batch: int) -> Tensor:
    """`labels` as `[batch]`; raises `ValueError` for another count."""
    if labels.numel() != batch:
        raise ValueError(f"{name} must be [batch] = [{batch}], got shape {list(labels.shape)}; give one an example.")
    return labels.reshape(-1)


def first_token(hidden_states: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """State of each example's first attended token, wherever padding stands: `[batch, hidden]`."""
    if key_padding_mask is None:
        return hidden_states[:, 0]
    index = key_padding_mask.long().argmax(dim=1)[:, None, None]
    return hidden_states.gather(1, index.expand(-1, -1, hidden_states.shape[-1]))[:, 0]
