"""Attention through features, in two passes that never write features to memory: sums over keys, mixes for queries.

A feature is `exp(root w x)` of a row `w` of some weights: of a random projection in Performer, of a landmark in
Nyström attention, whose softmax over keys or landmarks is a ratio of such sums. The kernels are in
`features_forward`, `sums_backward` and `mix_backward`.
"""

from typing import Any

import torch
from torch import Tensor

from ..cpu import first_derivatives
from .features_forward import mix_for_queries, sum_over_keys
from .mix_backward import mix_gradients
from .operators import Operator
from .sums_backward import sum_gradients
from .tiles import dropout_seed, empty_like_rows, takes


_sums_op = Operator("feature_sums", sum_over_keys)


@_sums_op.register_fake
def _(
    key: Tensor, value: Tensor, weights: Tensor, keep: Tensor | None, seed: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, width = key.shape
    shape = (batch, heads, weights.shape[-2])
    return tuple(key.new_empty(x, dtype=torch.float32) for x in ((*shape, width), shape, shape))


def _keep_for_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.root, ctx.half_norm, ctx.dropout_p, ctx.whole_keys, ctx.precise = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


@first_derivatives
def _sums_backward(ctx: Any, sums: Tensor | None, ones: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    key, value, weights, keep, seed, top = ctx.saved_tensors
    if sums is None and ones is None:
        return (None,) * 10
    sums = top.new_zeros(*top.shape, key.shape[-1]) if sums is None else sums
    ones = torch.zeros_like(top) if ones is None else ones
    settings = (ctx.root, ctx.half_norm, ctx.dropout_p, ctx.whole_keys, ctx.precise, ctx.needs_input_grad[2])
    *found, weights_grad = sum_gradients(key, value, weights, keep, seed, top, sums, ones, *settings)
    return (*found, weights_grad if ctx.needs_input_grad[2] else None, *(None,) * 7)


_sums_op.register_autograd(_sums_backward, setup_context=_keep_for_sums)


_mix_op = Operator("feature_mix", mix_for_queries)


@_mix_op.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like_rows(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _keep_for_mix(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.root, ctx.dropout_p, ctx.precise = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


@first_derivatives
def _mix_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    needed = ctx.needs_input_grad
    found = mix_gradients(*ctx.saved_tensors, grad, ctx.root, ctx.dropout_p, ctx.precise, needed[1])
    return (*(x if wanted else None for x, wanted in zip(found, needed[:5], strict=True)), *(None,) * 5)


_mix_op.register_autograd(_mix_backward, setup_context=_keep_for_mix)


def feature_sums(
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    key_padding_mask: Tensor | None,
    *,
    root: float,
    half_norm: bool,
    dropout_p: float = 0.0,
    whole_keys: bool = False,
    seed: Tensor | None = None,
    precise: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Sums over the keys that count: of values times features, and of features.

    A feature of a key is `exp(root w key - root^2 |key|^2 / 2 - top)`, without the second term unless `half_norm`;
    `top` is the largest logarithm of that feature in its head, 0 where no key counts, and a constant to gradients.

    Args:
        key, value: `[batch, heads, length, head_dim]`, of one dtype.
        weights: `[features, head_dim]`, or for each head `[batch, heads, features, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = counts. What stands elsewhere is not read.
        dropout_p: dropout of the features in the first sums, not in the second.
        whole_keys: drop a key from all features of a head, or from none.
        seed: one whole number, on the device; with dropout drawn from torch's generator if there is none.
        precise: products with features to 16 bits also in bfloat16, which itself has 8.

    Returns:
        In float32 `[batch, heads, features, head_dim]`, `[batch, heads, features]` and `top`, likewise. None for heads
        that there is no kernel for.

    Choromanski et al. 2020, arXiv 2009.14794, and Xiong et al. 2021, arXiv 2102.03902, with the running maximum of
    Dao et al. 2022, arXiv 2205.14135. Time O(length * features * head_dim), memory O(features * head_dim).
    """
    if not takes(key, value):
        return None
    seed = dropout_seed(dropout_p, key.device) if seed is None else seed
    return _sums_op(key, value, weights, key_padding_mask, seed, root, half_norm, dropout_p, whole_keys, precise)


def feature_mix(
    query: Tensor,
    weights: Tensor,
    table: Tensor,
    normalisers: Tensor,
    bias: Tensor | None,
    query_padding_mask: Tensor | None,
    *,
    root: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    precise: bool = False,
) -> Tensor | None:
    """`sum_f p_f table_f / sum_f p_f normaliser_f` for each query, with `p_f = exp(root w_f query + bias_f)`.

    Args:
        query: `[batch, heads, length, head_dim]`.
        weights: `[features, head_dim]`, or for each head `[batch, heads, features, head_dim]`.
        table: `[batch, heads, features, head_dim]`, float32.
        normalisers: `[batch, heads, features]`, float32, 0 or more.
        bias: likewise, or None; -inf takes a feature out.
        query_padding_mask: `[batch, length]` bool; False gives rows of zeros, and what stands there is not read.
        dropout_p, seed, precise: as in `feature_sums`, for the `p_f` of the numerator.

    Returns:
        As `query`; 0 where the denominator is. None for heads that there is no kernel for.

    References as of `feature_sums`. Time O(length * features * head_dim), memory O(length).
    """
    if not takes(query):
        return None
    seed = dropout_seed(dropout_p, query.device) if seed is None else seed
    return _mix_op(query, weights, table, normalisers, bias, query_padding_mask, seed, root, dropout_p, precise)[0]
