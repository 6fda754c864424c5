"""FAVOR+: attention through positive random features, linear in length, with a causal form and its constant state."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu import without_autocast
from .dense import dense_softmax_attention, padded_attention
from .exact_rows import attend_short_rows, check_exact_below, join_short_rows
from .favor_causal import PerformerState, causal_sums, empty_state
from .favor_cpu import cpu_performer_attention
from .favor_features import FeatureMap, finite, make_feature_map, ratio
from .feature_kernels import feature_kernels
from .inputs import check_qkv, zero_padding


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    projection: Tensor,
    kernel: str = "softmax",
    causal: bool = False,
    exact_below: int = 0,
    overwrite: bool = False,
) -> Tensor:
    """`sum_j phi(q_i) phi(k_j) v_j / sum_j phi(q_i) phi(k_j)` over the keys, in the causal form over those `j <= i`.

    With `x = sqrt(scale) * query` or `key` and the rows w of the projection, phi(x) is `exp(w x - |x|^2 / 2)` (kernel
    "softmax": in expectation over w the result's sums are those of softmax attention) or `relu(w x) + 1e-3` ("relu").

    No epsilon is added anywhere, so none brings an error. Instead exponentials are taken relative to maxima that cancel
    in the ratio. Bidirectional: of each feature over the valid keys of that head and example, moved to the queries, so
    that no normaliser is below 1 whatever the norms. Causal: a key's own maximum, and the running one of all keys up to
    the row; a maximum over all keys would show a row what comes later. There a normaliser is at least
    `exp(-min(|x_i|, |x_j|) D)`, where j is the key that holds the maximum and D the largest distance of two rows of the
    projection: in fp32 it may underflow, and the row become 0, only where the query and every key so far are longer
    than `87 / D` after scaling (head_dim 64: 16 before it, in the worst direction; not even 80 in random ones).

    Args:
        query: `[batch, heads, length, head_dim]`; in the causal form it may be shorter than the keys, being then the
            last of them.
        key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores that the kernel stands for, `head_dim ** -0.5` by default; positive.
        dropout_p: there is no matrix to drop from; whole keys are dropped from a head's numerator instead (a value is
            multiplied by 0 or by `1 / (1 - dropout_p)`), the same for all queries, and normalisers stay. Unbiased.
        projection: `[features, head_dim]`, such as `orthogonal_features` gives.
        kernel: "softmax" or "relu".
        causal: attend no key after the query.
        exact_below: examples of fewer valid tokens get softmax attention instead, which is another function; there
            `dropout_p` is dropout of its probabilities. Not in the causal form or for "relu".
        overwrite: without a graph, let the result take the memory of `query`, and set what is padding in `key` and
            `value` to 0 where it stands.

    Returns:
        As `query`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, another kernel, a scale that is not positive, an `exact_below` that does
            not go with the rest.

    Choromanski et al. 2020, arXiv 2009.14794. Time O(length * features * head_dim), memory O(length * features). On a
    CPU in eager mode the bidirectional form keeps only O(length * head_dim) for the backward pass. The causal form
    goes from 1,024 tokens to the next in eager mode; in a graph it combines the sums of all its chunks in pairs:
    (length / 128)^2 * features * head_dim multiply-adds on top.
    """
    check_qkv(query, key, value, key_padding_mask, last_queries=causal)
    if exact_below != 0:
        check_exact_kernel(exact_below, kernel, causal)
        shared = {"scale": scale, "dropout_p": dropout_p}
        estimate = partial(performer_attention, projection=projection, kernel=kernel, overwrite=overwrite, **shared)
        exact = partial(padded_attention, **shared)
        return attend_short_rows(estimate, exact, query, key, value, key_padding_mask, exact_below, overwrite)
    features = make_feature_map(query, projection, kernel, scale)
    if kernel == "softmax" and not causal:
        mixed = _fused(query, key, value, key_padding_mask, projection, features.root, dropout_p)
        if mixed is not None:
            return mixed
    queries, length = query.shape[2], key.shape[2]
    query_mask = None if key_padding_mask is None else key_padding_mask[:, length - queries :]
    dtype = query.dtype
    with without_autocast(query.device):
        query, key, value = _prepared(query, key, value, key_padding_mask, query_mask, features, dropout_p, overwrite)
        if causal:
            query = F.pad(query, (0, 0, length - queries, 0))
            state = empty_state(features, key)
            sums, _ = causal_sums(features, query, key, _with_ones(value), key_padding_mask, state)
            mixed = ratio(sums[:, :, length - queries :])
        elif query.device.type == "cpu" and not projection.requires_grad and not torch.compiler.is_compiling():
            mixed = cpu_performer_attention(features, query, key, value, key_padding_mask, overwrite)
        else:
            query, key = features.pair(query, key, key_padding_mask)
            mixed = ratio(torch.matmul(query, torch.matmul(key.transpose(-1, -2), _with_ones(value))))
    return zero_padding(mixed.to(dtype), query_mask, overwrite)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    projection: Tensor,
    root: float,
    dropout_p: float,
) -> Tensor | None:
    """The bidirectional form of kernel "softmax" in two kernels of a GPU; None where there are none."""
    kernels = feature_kernels(query, key, value)
    if kernels is None:
        return None
    with without_autocast(query.device):
        dropout = {"dropout_p": dropout_p, "whole_keys": True}
        found = kernels.sums(key, value, projection, key_padding_mask, root=root, half_norm=True, **dropout)
        if found is None:
            return None
        sums, ones, top = found
        return kernels.mix(query, projection, sums, ones, top, key_padding_mask, root=root)


def check_exact_kernel(exact_below: int, kernel: str, causal: bool) -> None:
    """Raises `ValueError` for an `exact_below` that breaks a rule, or does not go with the kernel or the form."""
    check_exact_below(exact_below, causal)
    if exact_below > 0 and kernel != "softmax":
        raise ValueError(
            f"exact_below = {exact_below} with kernel = {kernel!r}: only kernel = 'softmax' estimates softmax "
            "attention; set it to 0."
        )


def performer_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    projection: Tensor,
    kernel: str = "softmax",
    state: PerformerState | None = None,
) -> tuple[Tensor, PerformerState]:
    """The causal form of `performer_attention` for tokens that go on where `state` ends; any number of them at a time.

    Args:
        key_padding_mask: `[batch, length]` bool of these tokens alone.
        state: what the last call returned, with the same projection, kernel and scale; None at the beginning.

    Returns:
        `[batch, heads, length, head_dim]`, and the state after these tokens, of the same size as the one before.

    Raises:
        ValueError: as there.

    Time O(length * features * head_dim), memory O(length * features).
    """
    check_qkv(query, key, value, key_padding_mask)
    features = make_feature_map(query, projection, kernel, scale)
    dtype = query.dtype
    with without_autocast(query.device):
        query, key, value = _prepared(query, key, value, key_padding_mask, key_padding_mask, features, dropout_p)
        state = empty_state(features, key) if state is None else state
        sums, state = causal_sums(features, query, key, _with_ones(value), key_padding_mask, state)
        mixed = ratio(sums).to(dtype)
    return zero_padding(mixed, key_padding_mask), state


def dense_performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    projection: Tensor,
    kernel: str = "softmax",
    causal: bool = False,
    state: PerformerState | None = None,
    exact_below: int = 0,
) -> tuple[Tensor, Tensor]:
    """The same function as `performer_attention`, or with a `state` as `performer_step`, with the matrix in memory.

    Returns:
        `[batch, heads, length, head_dim]`, and the weights `[batch, heads, length, length]`, positive and with rows
        that sum to 1; with a `state` the weights of these tokens only, whose rows sum to less.

    Raises:
        ValueError: as there.

    Time O(length^2 * features), memory O(length^2).
    """
    check_qkv(query, key, value, key_padding_mask)
    if exact_below != 0:
        check_exact_kernel(exact_below, kernel, causal)
        shared = {"scale": scale, "dropout_p": dropout_p}
        estimate, exact = (
            dense_performer_attention(query, key, value, key_padding_mask, projection=projection, **shared),
            dense_softmax_attention(query, key, value, key_padding_mask, **shared),
        )
        return join_short_rows(estimate, exact, key_padding_mask, exact_below)
    features = make_feature_map(query, projection, kernel, scale)
    dtype, length = query.dtype, query.shape[2]
    with without_autocast(query.device):
        query, key, value = _prepared(query, key, value, key_padding_mask, key_padding_mask, features, dropout_p)
        total = past = 0.0
        if causal:
            query, (key, top) = features.queries(query), features.keys(key)
            later = torch.ones(length, length, dtype=torch.bool, device=key.device).triu(1)
            top = top[:, :, None, :].masked_fill(later, -torch.inf)
            if key_padding_mask is not None:
                top = top.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
            running = top.amax(dim=-1, keepdim=True)
            if state is not None:
                running = torch.maximum(running, state.top[..., None, None])
                share = (state.top[..., None, None] - finite(running)).exp()
                past = torch.matmul(query, state.sums) * share
                total, past = past[..., -1:], past[..., :-1]
            weights = torch.matmul(query, key.transpose(-1, -2)) * (top - finite(running)).exp()
        else:
            query, key = features.pair(query, key, key_padding_mask)
            weights = torch.matmul(query, key.transpose(-1, -2))
        total = weights.sum(dim=-1, keepdim=True) + total
        total = torch.where(total > 0, total, 1.0)
        weights = weights / total
        if key_padding_mask is not None:
            weights = weights.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        mixed = torch.matmul(weights, value) + past / total
    return zero_padding(mixed.to(dtype), key_padding_mask), weights.to(dtype)


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    query_mask: Tensor | None,
    features: FeatureMap,
    dropout_p: float,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype to compute in, 0 at padding, the values with dropout."""
    dtype = features.projection.dtype
    query = zero_padding(query, query_mask, overwrite).to(dtype)
    key, value = (zero_padding(x, key_padding_mask, overwrite).to(dtype) for x in (key, value))
    if dropout_p > 0.0:
        value = value * F.dropout(value.new_ones(*value.shape[:3], 1), dropout_p)
    return query, key, value


def _with_ones(value: Tensor) -> Tensor:
    """A column of ones behind the values, for the normalisers."""
    return torch.cat([value, value.new_ones(*value.shape[:3], 1)], dim=-1)
