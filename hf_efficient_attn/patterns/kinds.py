"""Which pairs of tokens a mechanism lets attend, and by which part of its pattern."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention import (
    BigBirdSelfAttention,
    LocalSelfAttention,
    LongformerSelfAttention,
    LSHSelfAttention,
    NeighborhoodSelfAttention,
    SelfAttention,
)
from .capture import Given


Marks = dict[str, Tensor | None]
"""Kind -> the pairs that are of it, bool, broadcastable to `[heads, tokens, tokens]`; None for all. The last one that
holds a pair counts.
"""


def attended_pairs(given: Given) -> Tensor:
    """Which keys each query attends: bool `[heads, tokens, tokens]`."""
    return even_weights(given) > 0


def even_weights(given: Given) -> Tensor:
    """The mechanism's eager weights for queries and keys of 0, `[heads, tokens, tokens]`.

    All keys that count weigh the same there (or as often as they count), however small the weights of the states
    themselves are.
    """
    module, states, context = given.attention, given.states, given.context
    query, key, value = module.project(states)
    if isinstance(module, LSHSelfAttention):
        context = {**context, "replay": {"buckets": buckets_of(given, query)}}  # what is hashed are the queries
    nothing = (torch.zeros_like(x) for x in (states, query, key, value))
    return module.attend(*nothing, given.keep, dropout_p=0.0, backend="eager", **context)[1][0]


def eager_weights(given: Given) -> Tensor:
    """The weights of the mechanism's eager backend, float32 `[heads, tokens, tokens]`."""
    module, states = given.attention, given.states
    weights = module.attend(
        states, *module.project(states), given.keep, dropout_p=0.0, backend="eager", **given.context
    )[1]
    return weights[0].float()


def pair_kinds(given: Given, attended: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """By which part of the pattern pairs attend.

    Args:
        given: of the mechanism.
        attended: bool `[heads, tokens, tokens]`.

    Returns:
        The kinds, and int8 like `attended`: 0 for nothing, `n` for the kind number `n - 1`.
    """
    marks = KINDS.get(type(given.attention), _plain)(given)
    numbers = torch.zeros_like(attended, dtype=torch.int8)
    for number, pairs in enumerate(marks.values(), start=1):
        numbers.masked_fill_(attended if pairs is None else attended & pairs, number)
    return tuple(marks), numbers


def buckets_of(given: Given, query: Tensor) -> Tensor:
    """Buckets `[1, heads, rounds, tokens]` of LSH attention."""
    length = query.shape[2]
    keep = query.new_ones(1, length, dtype=torch.bool) if given.keep is None else given.keep
    return given.attention.buckets(query, *given.attention.factors(keep.sum(dim=1), length))


def _places(given: Given) -> Tensor:
    """Each token's place among the example's own ones, `[tokens]`."""
    if given.keep is None:
        return torch.arange(given.states.shape[1], device=given.states.device)
    return given.keep[0].long().cumsum(dim=0) - 1


def _either(tokens: Tensor) -> Tensor:
    """Pairs in which the query or the key is one of `tokens`, bool `[tokens]`."""
    return tokens[:, None] | tokens


def _plain(given: Given) -> Marks:
    return {"attended": None}


def _longformer(given: Given) -> Marks:
    tokens = given.context.get("global_tokens")
    return {"window": None} if tokens is None else {"window": None, "global": _either(tokens.mask[0])}


def _big_bird(given: Given) -> Marks:
    options = given.attention.options
    if options.attention_type == "original_full":
        return _plain(given)
    place = _places(given) - options.num_global_tokens
    block = place.div(options.block_size, rounding_mode="floor")
    is_global = place < 0
    if options.global_ends:
        is_global = is_global | (block == 0) | (block == block.max())
    near = (block[:, None] - block).abs() <= 1
    return {"random": None, "window": near, "global": _either(is_global)}


def _neighborhood(given: Given) -> Marks:
    tokens = torch.arange(given.states.shape[1], device=given.states.device)
    return {"window": None, "global": _either(tokens < given.context["num_global"])}


def _local(given: Given) -> Marks:
    chunk = _places(given) // given.attention.chunks["chunk_length"]
    return {"neighbouring chunk": None, "own chunk": chunk[:, None] == chunk}


def _lsh(given: Given) -> Marks:
    rounds = buckets_of(given, given.attention.project(given.states)[0])[0].unbind(1)
    same = torch.zeros((), dtype=torch.bool, device=given.states.device)
    for bucket in rounds:
        same = same | (bucket[:, :, None] == bucket[:, None, :])
    return {"another bucket, next in the order": None, "same bucket": same}


KINDS: dict[type[SelfAttention], Callable[[Given], Marks]] = {
    BigBirdSelfAttention: _big_bird,
    LSHSelfAttention: _lsh,
    LocalSelfAttention: _local,
    LongformerSelfAttention: _longformer,
    NeighborhoodSelfAttention: _neighborhood,
}
"""Mechanism -> what tells the parts of its pattern apart; one without a row has one kind."""
