"""Tiny causal models and their inputs, for every test of causal families."""

from typing import Any

import pytest
import torch
from helpers import mask_of, model_class, random_ids, randomise_, tiny_config
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_efficient_attn import FAMILIES


AUTO = "AutoModelForCausalLM"
CAUSAL = [name for name, row in FAMILIES.items() if AUTO in row.heads]

# Family -> settings that are tested. Longformer: windows of 9 and 5 tokens (4 and 2 back), or with gaps; and the same
# with a prefix of global tokens.
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "eff_longformer": {
        "plain": {},
        "dilated": {"attention_dilation": [2, [1, 2, 1, 3]]},
        "prefix": {"causal_global": "prefix"},
        "dilated prefix": {"causal_global": "prefix", "attention_dilation": [2, [1, 2, 1, 3]]},
    },
    "eff_performer": {"plain": {}, "relu": {"kernel": "relu"}},
    # One LSH layer, the last: a text that goes on sorts all its tokens anew, which earlier states do not see.
    "eff_reformer": {
        "plain": {"num_buckets": 4},
        "paper": {"num_buckets": 4, "chunk_rule": "paper"},
        "local": {"attn_layers": ["local"]},
    },
}
FAMILY = pytest.mark.parametrize("family", CAUSAL)
FORM = pytest.mark.parametrize(("family", "form"), [(family, form) for family in CAUSAL for form in FORMS[family]])
# Sorting puts a token among others by what comes later, too, though it attends none of that: each row is compared as
# the last of the text so far.
SORTS = [("eff_reformer", "plain"), ("eff_reformer", "paper")]
LENGTH = 40  # more than three times the widest window


def build(family: str, form: str = "plain", **overrides: Any) -> PreTrainedModel:
    """A tiny causal model with random weights; logits are far enough apart for greedy search to have no ties."""
    return randomise_(model_class(family, AUTO)(tiny_config(family, **FORMS[family][form], **overrides)), std=0.3)


def inputs_of(form: str, lengths: list[int], side: str = "left") -> dict[str, Tensor]:
    """Ids, mask, and a prefix of 3, 1 and 0 global tokens where the form has it."""
    keep = mask_of(lengths, LENGTH, side)
    inputs = {"input_ids": random_ids(len(lengths), LENGTH), "attention_mask": keep}
    if "prefix" in form:
        wanted = torch.tensor([3, 1, 0, 5][: len(lengths)])[:, None]
        inputs["global_attention_mask"] = ((keep.cumsum(1) <= wanted) & keep.bool()).long()
    return inputs


def at_once(model: PreTrainedModel, inputs: dict[str, Tensor], sizes: list[int]) -> Tensor:
    """Logits of pieces of a text, each as the last ones of all that has been read by then, without a cache."""
    logits, stop = [], 0
    for size in sizes:
        stop += size
        logits.append(model(**{name: x[:, :stop] for name, x in inputs.items()}, use_cache=False).logits[:, -size:])
    return torch.cat(logits, dim=1)


def in_chunks(model: PreTrainedModel, inputs: dict[str, Tensor], sizes: list[int]) -> tuple[Tensor, Cache]:
    """Logits of the whole text, computed in pieces that go on from each other's cache."""
    past, logits, start = None, [], 0
    for size in sizes:
        stop = start + size
        piece = {name: x[:, start:stop] for name, x in inputs.items() if name != "attention_mask"}
        outputs = model(**piece, attention_mask=inputs["attention_mask"][:, :stop], past_key_values=past)
        past, start = outputs.past_key_values, stop
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1), past
