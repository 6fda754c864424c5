"""Weights of a source into a model of ours: copies, what is new, what is left out."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


# A new weight of ours -> the common name of what it starts as a copy of, and how the report says so.
_COPIED = {
    r"\.(query|key|value)_global\.": (r".\1.", "copy of the local projection"),
}
_NEW_BY_RULE: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    (r"\.attention\.(self|attention)\.conv\.weight$", "zeros, so that nothing is added", torch.zeros_like),
    (r"(^|\.)pooler\.(dense\.)?weight$", "identity: the source has no pooler", lambda x: torch.eye(len(x)).to(x)),
    (r"(^|\.)pooler\.(dense\.)?bias$", "zeros: the source has no pooler", torch.zeros_like),
)
# Drawn from the config's seed when the model was built, and the tokens that the paper starts anew.
_NEW_AS_BUILT = (
    (r"\.attention\.(self|attention)\.projection$", "drawn from projection_seed"),
    (r"(^|\.)global_embeddings\.weight$", "new and random: train on"),
)

# What a source may have that a family has no place for.
_LEFT_OUT = re.compile(r"^(pooler\.|head\.relationship\.)")


@dataclass
class Filled:
    """What came of each weight.

    Args:
        copied: number of tensors copied from the source.
        new: weight of ours -> how it starts.
        left_out: weights of the source that ours has no place for.
    """

    copied: int = 0
    new: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@torch.no_grad()
def fill(model: nn.Module, names: dict[str, str], state: dict[str, Tensor]) -> Filled:
    """Fill every weight of `model` in place with a copy.

    Args:
        model: a new model of ours.
        names: its weights -> their common names.
        state: the source's weights by common name.

    Raises:
        ValueError: weights that are missing, not read, or of another shape, by name; the model is not to be used then.
    """
    own, filled = model.state_dict(), Filled()
    missing, misshapen, used = [], [], set()
    for name, tensor in own.items():
        common = names[name]
        if common in state:
            used.add(common)
            value = state[common]
            filled.copied += 1
        else:
            value, how = _start(name, tensor, common, state)
            if value is None:
                missing.append(name)
                continue
            filled.new[name] = how
        if value.shape != tensor.shape:
            misshapen.append(f"{name} {list(value.shape)} for {list(tensor.shape)}")
        elif value is not tensor:
            tensor.copy_(value)
    unread = [name for name in state if name not in used]
    filled.left_out = [name for name in unread if _LEFT_OUT.match(name)]
    unread = [name for name in unread if not _LEFT_OUT.match(name)]
    if missing or unread or misshapen:
        raise ValueError("the weights do not fit. " + "; ".join(_complaints(missing, unread, misshapen)) + ".")
    return filled


def _start(name: str, tensor: Tensor, common: str, state: dict[str, Tensor]) -> tuple[Tensor | None, str]:
    """What a weight starts as that the source does not have, and how; None where no rule says it."""
    for pattern, (replacement, how) in _COPIED.items():
        model_of = re.sub(pattern, replacement, common)
        if model_of != common and model_of in state:
            return state[model_of], how
    for pattern, how, make in _NEW_BY_RULE:
        if re.search(pattern, name):
            return make(tensor), how
    for pattern, how in _NEW_AS_BUILT:
        if re.search(pattern, name):
            return tensor, how
    return None, ""


def _complaints(missing: list[str], unread: list[str], misshapen: list[str]) -> Iterator[str]:
    if missing:
        yield f"The source has nothing for {', '.join(missing)}"
    if unread:
        yield f"the source has what is not read: {', '.join(unread)}"
    if misshapen:
        yield f"of another shape: {', '.join(misshapen)}"
