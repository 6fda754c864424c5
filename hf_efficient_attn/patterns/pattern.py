"""What attends what in one layer of a model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention import ATTENTIONS, LongformerSelfAttention
from ..auto import FAMILIES
from .capture import Given, attentions_of, layer_input, random_inputs
from .kinds import attended_pairs, eager_weights, pair_kinds


MAX_TOKENS = 8192
"""More tokens are refused: the eager backend, which holds every pair, would take many gigabytes."""


@dataclass(frozen=True)
class AttentionPattern:
    """What attends what in one layer.

    Args:
        matrix: `[heads, tokens, tokens]` on the CPU, a row a query: float32 weights, or int8, 0 where a query does not
            attend a key and `n` where it does by the kind number `n - 1`. 0 at padding. Tokens that the model adds
            (global ones of BigBird's extended form, a class token) are the first.
        kinds: parts of the pattern, such as `("window", "global")`; empty for weights.
        keep: bool `[tokens]`, False at padding.
        title: the family, the layer, the options that matter, and the share of pairs.
    """

    matrix: Tensor
    kinds: tuple[str, ...]
    keep: Tensor
    title: str

    @property
    def attended(self) -> Tensor:
        """Which keys each query attends: bool `[heads, tokens, tokens]`."""
        return self.matrix != 0

    @property
    def share(self) -> float:
        """Attended pairs among all pairs of tokens that are no padding, the mean over heads."""
        return _share(self.matrix, self.keep)


def attention_pattern(
    model: PreTrainedModel | PreTrainedConfig,
    length: int = 512,
    *,
    layer: int = 0,
    seed: int = 0,
    weights: bool = False,
    num_global: int = 0,
    inputs: Mapping[str, Tensor] | None = None,
) -> AttentionPattern:
    """What attends what in one layer: which pairs, for mechanisms with a pattern, and weights for those that estimate.

    Args:
        model: a model of one family, or its config, of which one with new weights is made. It stays as it is.
        length: tokens of a random text, or patches of a random image in the most nearly square grid. Only where pairs
            depend on the states (hashing), and for weights, does it matter which.
        layer: from 0.
        seed: of the random input and of new weights; torch's global generator is neither used nor changed.
        weights: weights of the eager backend where it would be pairs.
        num_global: so many tokens at the beginning are marked as global, where texts have such.
        inputs: one example in place of the random one, as the model's forward takes it, such as `{"input_ids": ...,
            "attention_mask": ...}`; `length` and `num_global` have no meaning then.

    Returns:
        The pattern. It takes as much memory as the eager weights of this one layer, O(heads * tokens ** 2).

    Raises:
        ValueError: a model of another kind, no tokens or more than `MAX_TOKENS`, a layer that is not there, an input
            that the model refuses.
    """
    if inputs is None:
        check_length(length)
    is_new = not isinstance(model, PreTrainedModel)
    if is_new:
        model = new_model(model, seed)
    attentions_of(model)
    given = layer_input(model, layer, random_inputs(model, length, seed, num_global) if inputs is None else inputs)
    tokens = given.states.shape[1]
    check_length(tokens)
    with torch.no_grad():
        if weights or given.attention.is_estimate:
            kinds, matrix = (), eager_weights(given)
        else:
            kinds, matrix = pair_kinds(given, attended_pairs(given))
    keep = torch.ones(1, tokens, dtype=torch.bool) if given.keep is None else given.keep
    if given.packing is not None:
        matrix = given.packing.unpack_weights(matrix[None])[0]
        keep = keep.to(matrix.device).gather(1, given.packing.place)
    matrix, keep = matrix.cpu(), keep[0].cpu()
    return AttentionPattern(
        matrix, kinds, keep, _title(model, layer, given, _share(matrix, keep), is_new and not kinds)
    )


def check_length(length: int) -> None:
    """Raises `ValueError` for no tokens, or more than `MAX_TOKENS`."""
    if length < 1:
        raise ValueError(f"length = {length}: there has to be 1 token or more.")
    if length > MAX_TOKENS:
        raise ValueError(
            f"length = {length:,}: {length**2:,} pairs a head are more than a picture shows, and take too much memory; "
            f"give at most {MAX_TOKENS:,}. With smaller windows, blocks or chunks a short text looks alike."
        )


def new_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A base model with new weights, which are a pure function of `config` and `seed`.

    Raises:
        ValueError: a config of no family.
    """
    row = FAMILIES.get(getattr(config, "model_type", None))
    if row is None:
        raise ValueError(
            f"{type(config).__name__} is no config of a family; give a model, or a config of one of "
            f"{', '.join(FAMILIES)}."
        )
    cls = getattr(row.module("modeling"), row.model_names["AutoModel"])
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        return cls(copy.deepcopy(config)).eval()


def _share(matrix: Tensor, keep: Tensor) -> float:
    own = int(keep.sum())
    # Head by head: a count of all at once would take a wider copy of the matrix.
    return sum(int(head.count_nonzero()) for head in matrix) / max(1, len(matrix) * own**2)


def _title(model: PreTrainedModel, layer: int, given: Given, share: float, is_new: bool) -> str:
    """Two lines: what it is, and the options that matter."""
    config, attention = model.config, given.attention
    row = FAMILIES.get(config.model_type)
    name = type(model).__name__ if row is None else f"Eff{row.name}"
    mechanism = next((name for name, cls in ATTENTIONS.items() if cls is type(attention)), type(attention).__name__)
    if f"eff_{mechanism}" != config.model_type:
        name = f"{name} ({mechanism})"
    pairs = f"{100 * share:.3g} % of the pairs{', estimated' if attention.is_estimate else ''}"
    first = (
        f"{name}{', causal' if attention.is_causal else ''}, layer {layer}, {given.states.shape[1]:,} tokens: {pairs}"
    )
    shown = [f"{name} = {value}" for name, value in _options(given).items()]
    return "\n".join([first, ", ".join([*shown, *(["new weights"] if is_new else [])])]).strip()


def _options(given: Given) -> dict[str, Any]:
    """The mechanism's options: sizes, and what else is not as by default."""
    attention, found = given.attention, {}
    kind = attention.options_class
    for field in fields(kind) if kind is not None else ():
        value = getattr(attention.options, field.name)
        is_size = isinstance(value, int | list | tuple) and not isinstance(value, bool) and "seed" not in field.name
        if is_size or value != field.default:
            found[field.name] = value
    if isinstance(attention, LongformerSelfAttention):
        # Not all layers' numbers.
        found |= {"attention_window": 2 * attention.radius, "attention_dilation": attention.dilation}
    if "grid" in given.context:
        found["grid"] = tuple(given.context["grid"])
    return found
