"""Softmax attention in place of an estimate of it, for the examples of a batch that are short."""

from collections.abc import Callable

import torch
from torch import Tensor

from .chunk_plan import SELF_PENALTY, valid_counts
from .dense import biased_attention
from .inputs import zero_padding
from .tokens import gather_tokens, replace_tokens, select_tokens


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

# Queries of one call in eager mode where each has a mask of its own: more would only hold more of the mask.
_QUERIES = 512


def check_exact_below(exact_below: int, causal: bool) -> None:
    """Raises `ValueError` for a bound that breaks a rule."""
    if exact_below < 0:
        raise ValueError(f"exact_below = {exact_below}: it is a number of tokens, give 0 (never) or more.")
    if exact_below > 0 and causal:
        raise ValueError(
            f"exact_below = {exact_below} in the causal form: a token's result must not depend on how many follow; "
            "set it to 0."
        )


def all_are_short(length: int, exact_below: int) -> bool:
    """Whether every example of a batch of `length` is below the bound, by shape alone; in a graph nothing is known."""
    return not torch.compiler.is_compiling() and length < exact_below


def attend_short_rows(
    estimate: Attend,
    exact: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    exact_below: int,
    overwrite: bool = False,
) -> Tensor:
    """`estimate`, but `exact` for each example of fewer than `exact_below` valid tokens.

    Neither is called where no example wants it and that follows from shapes, or on a CPU from the mask; a graph calls
    both, `exact` for at most `exact_below - 1` tokens an example.

    Args:
        estimate, exact: `(query, key, value, key_padding_mask)` -> as `query`, 0 at padding.
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        exact_below: tokens.
        overwrite: `estimate` may change the tensors it gets, which `exact` has read by then, and its result is written
            into; there must be no graph.

    Returns:
        As `query`.
    """
    tensors, length, compiling = (query, key, value), query.shape[2], torch.compiler.is_compiling()
    if all_are_short(length, exact_below):
        return exact(*tensors, key_padding_mask)
    if not compiling and key_padding_mask is None:
        return estimate(*tensors, None)
    valid = key_padding_mask
    if valid is None:
        valid = torch.ones(query.shape[0], length, dtype=torch.bool, device=query.device)
    short = valid.sum(dim=1, keepdim=True) < exact_below
    slots = exact_below - 1
    if not compiling and query.device.type == "cpu":  # where a look at the mask waits for nothing
        slots = int((valid & short).sum(dim=1).amax())
        if slots == 0:
            return estimate(*tensors, key_padding_mask)
        if short.all():
            return exact(*tensors, key_padding_mask)
    tokens = select_tokens(valid & short, slots)
    rows = exact(*(gather_tokens(x, tokens.index) for x in tensors), tokens.valid)
    return replace_tokens(estimate(*tensors, key_padding_mask), rows, tokens, overwrite)


def join_short_rows(
    estimate: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    key_padding_mask: Tensor | None,
    exact_below: int,
) -> tuple[Tensor, Tensor]:
    """What `attend_short_rows` gives, of two dense results and their weights `[batch, heads, length, length]`."""
    length, device = estimate[0].shape[2], estimate[0].device
    short = valid_counts(key_padding_mask, length, device)[:, None, None, None] < exact_below
    mixed, weights = (torch.where(short, a, b) for a, b in zip(exact, estimate, strict=True))
    return mixed, weights


def attend_others(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention of each token to all others, to itself only where there is no other.

    What LSH attention comes to when everything is in one chunk; its queries are its keys, so that each would see itself
    most of all. Arguments, result and errors as of `softmax_attention`.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451, section 2. Time O(length^2), memory O(length) or, where gradients
    follow, O(length^2), for all heads together.
    """
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Half of what excludes padding, where float16 has nothing as large as the penalty.
    penalty = min(SELF_PENALTY, -torch.finfo(query.dtype).min / 2)
    places = torch.arange(query.shape[2], device=query.device)

    def rows(queries: Tensor, own: Tensor) -> Tensor:
        bias = torch.where(places == own[:, None], -penalty, 0.0).to(query.dtype)[None, None]
        if key_padding_mask is not None:
            bias = torch.where(key_padding_mask[:, None, None, :], bias, torch.finfo(query.dtype).min)
        return biased_attention(queries, key, value, bias, scale=scale, dropout_p=dropout_p)

    if torch.compiler.is_compiling():
        mixed = rows(query, places)
    else:
        pieces = zip(query.split(_QUERIES, dim=2), places.split(_QUERIES), strict=True)
        mixed = torch.cat([rows(*piece) for piece in pieces], dim=2)
    return zero_padding(mixed, key_padding_mask)
