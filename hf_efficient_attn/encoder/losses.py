"""Losses of the classification heads. They read the config and never write it, unlike transformers' own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .configuration import EffConfig
from .inputs import check_labels, check_one_per_example, check_positions


def sequence_classification_loss(logits: Tensor, labels: Tensor, config: EffConfig) -> Tensor:
    """Mean loss of `logits` `[batch, num_labels]` for `config.problem_type`, guessed from the labels where it is None.

    Labels are `[batch]` integers (single label), `[batch, num_labels]` floats of 0 and 1 (multi-label), or `[batch]`
    or `[batch, num_labels]` floats (regression).

    Raises:
        ValueError: labels of a wrong shape, or outside the number of classes.
    """
    labels = labels.to(logits.device)
    problem = config.problem_type
    if problem is None:
        if config.num_labels == 1:
            problem = "regression"
        else:
            is_class = not labels.dtype.is_floating_point
            problem = "single_label_classification" if is_class else "multi_label_classification"
    if problem == "single_label_classification":
        if labels.numel() != logits.shape[0]:
            raise ValueError(
                f"labels have shape {list(labels.shape)} for a batch of {logits.shape[0]}; single-label classification "
                "takes one integer an example. Set config.problem_type for another kind."
            )
        labels = labels.reshape(-1)
        check_labels(
            "labels", labels, config.num_labels, f"load the model with num_labels={config.num_labels + 1} or more."
        )
        return F.cross_entropy(logits.float(), labels.long())
    targets = labels.reshape(-1, 1) if labels.dim() == 1 and config.num_labels == 1 else labels
    if targets.shape != logits.shape:
        raise ValueError(
            f"labels have shape {list(labels.shape)}, {problem} needs {list(logits.shape)} = [batch, num_labels]; "
            "set num_labels to the number of targets."
        )
    if problem == "regression":
        return F.mse_loss(logits.float(), targets.float())
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def token_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross entropy of `logits` `[batch, length, classes]` against `labels` `[batch, length]`, -100 ignored.

    The mean over labels, 0 if there are none, or with `num_items` (Trainer's `num_items_in_batch`, all labels of an
    accumulated batch) the sum divided by it.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must be [batch, length] = {list(logits.shape[:2])}, got {list(labels.shape)}.")
    classes = logits.shape[-1]
    check_labels("labels", labels, classes, f"the head has {classes} classes (vocab_size or num_labels).")
    flat, labels = logits.float().flatten(0, 1), labels.flatten().to(logits.device)
    if num_items is None:
        num_items = (labels != -100).sum().clamp(min=1)
    return F.cross_entropy(flat, labels, reduction="sum") / num_items


LOGITS_AT_ONCE = 1 << 24
"""How many numbers of logits `token_loss_in_chunks` has at a time: 64 MiB in float32, and the loss some such more."""


def token_loss_in_chunks(
    logits_of: Callable[[Tensor], Tensor],
    states: Tensor,
    labels: Tensor,
    classes: int,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """`token_loss(logits_of(states), labels, num_items)` in memory that does not grow with `length * classes`.

    There are logits of labelled tokens only, and of some at a time; the backward pass computes them again where one
    time was not enough. While compiling, where the number of labels is not known, all tokens have some. The head is
    called once a time, so ranks of several may call it a different number of times; on a GPU the count of labels is
    waited for.

    Args:
        logits_of: `[1, tokens, width]` -> `[1, tokens, classes]`, of each token alone.
        states: `[batch, length, width]`.
        labels: `[batch, length]`, -100 ignored.
        classes: number of logits of a token.
        num_items: as in `token_loss`.
    """
    if labels.shape != states.shape[:2]:
        raise ValueError(f"labels must be [batch, length] = {list(states.shape[:2])}, got {list(labels.shape)}.")
    check_labels("labels", labels, classes, f"the head has {classes} classes (vocab_size or num_labels).")
    states, labels = states.flatten(0, 1), labels.flatten().to(states.device)
    if not torch.compiler.is_compiling():
        # None at all is a chunk of no tokens, so that every parameter has a gradient.
        labelled = (labels != -100).nonzero()[:, 0]
        states, labels = states.index_select(0, labelled), labels.index_select(0, labelled)
    if num_items is None:
        num_items = (labels != -100).sum().clamp(min=1)

    def summed(chunk: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(chunk[None])[0].float(), targets, reduction="sum")

    size = max(1, LOGITS_AT_ONCE // classes)
    if states.shape[0] <= size:
        return summed(states, labels) / num_items
    total = 0.0
    for chunk, targets in zip(states.split(size), labels.split(size), strict=True):
        total = total + checkpoint(summed, chunk, targets, use_reentrant=False)
    return total / num_items


def replaced_token_loss(logits: Tensor, labels: Tensor, keep: Tensor | None) -> Tensor:
    """Mean binary cross entropy of `logits` `[batch, length]` where `labels` of the same shape are 1 (replaced) or 0.

    Padding, False in `keep` `[batch, length]`, and labels of -100 are ignored; 0 if nothing is left.
    """
    if labels.shape != logits.shape:
        raise ValueError(f"labels must be [batch, length] = {list(logits.shape)}, got {list(labels.shape)}.")
    check_labels("labels", labels, 2, "1 is a replaced token, 0 an original one.")
    labels = labels.to(logits.device)
    counted = labels != -100 if keep is None else (labels != -100) & keep
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.clamp(min=0).float(), reduction="none")
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp(min=1)


def next_sentence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of `[batch, 2]` logits; label 0 is a continuation, 1 a random sentence."""
    labels = check_one_per_example("next_sentence_label", labels, logits.shape[0])
    check_labels("next_sentence_label", labels, 2, "0 is a continuation, 1 a random sentence.")
    return F.cross_entropy(logits.float(), labels.to(logits.device))


def choice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of `[batch, choices]` logits."""
    labels = check_one_per_example("labels", labels, logits.shape[0])
    check_labels("labels", labels, logits.shape[1], "it is the index of the right choice.")
    return F.cross_entropy(logits.float(), labels.to(logits.device))


def span_loss(start_logits: Tensor, end_logits: Tensor, start: Tensor, end: Tensor, keep: Tensor | None) -> Tensor:
    """Mean cross entropy of both ends `[batch]` over `[batch, length]` logits; 0 if no end counts.

    An end past the input, or in padding where `keep` `[batch, length]` is False, is ignored.
    """
    batch, length = start_logits.shape
    start = check_one_per_example("start_positions", start, batch)
    end = check_one_per_example("end_positions", end, batch)
    loss = 0.0
    for name, logits, position in (("start", start_logits, start), ("end", end_logits, end)):
        position = position.to(logits.device)
        check_positions(f"{name}_positions", position)
        position = position.clamp(0, length)
        if keep is not None:
            inside = keep.gather(1, position.clamp(max=length - 1)[:, None])[:, 0]
            position = torch.where(inside, position, length)
        total = F.cross_entropy(logits.float(), position, ignore_index=length, reduction="sum")
        loss = loss + total / (position != length).sum().clamp(min=1)
    return loss / 2
