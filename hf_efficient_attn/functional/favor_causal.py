"""The causal form of FAVOR+: prefix sums over chunks of positions, and the state with which a text goes on."""

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .favor_features import FeatureMap, finite
from .inputs import count_blocks


# At least head_dim positions a chunk keep the sums of all chunks within O(length * features).
_CHUNK = 64
# In a graph, which has no segments: fewer chunks, whose sums are combined pair by pair.
_GRAPH_CHUNK = 128
# Positions whose chunks are computed together in eager mode.
_SEGMENT = 1024


class PerformerState(NamedTuple):
    """What the causal form knows of all tokens so far; its size does not depend on their number.

    Args:
        sums: `[batch, heads, features, head_dim + 1]`, sums over keys of their features times their values and, in the
            last column, of their features, divided by `exp(top)`; fp32 at least.
        top: `[batch, heads]`, the largest logarithm of a feature so far; -inf before the first token.
    """

    sums: Tensor
    top: Tensor


def empty_state(features: FeatureMap, key: Tensor) -> PerformerState:
    """The state before the first token of `key` `[batch, heads, length, head_dim]`."""
    batch, heads, _, head_dim = key.shape
    count = features.projection.shape[0]
    sums = key.new_zeros(batch, heads, count, head_dim + 1)
    return PerformerState(sums, key.new_full((batch, heads), -torch.inf))


def causal_sums(
    features: FeatureMap, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, state: PerformerState
) -> tuple[Tensor, PerformerState]:
    """For each position the sums over the keys up to it, weighed by the kernel, and the state after the last one.

    Args:
        query, key: `[batch, heads, length, head_dim]`, in the dtype to compute in, finite also at padding.
        value: `[batch, heads, length, head_dim + 1]`, ones in the last column.
        keep: `[batch, length]` bool, which keys count.
        state: of the tokens before.

    Returns:
        `[batch, heads, length, head_dim + 1]`, each row up to a factor of its own.
    """
    length = key.shape[2]
    if torch.compiler.is_compiling() or length <= _SEGMENT:
        return _segment(features, query, key, value, keep, state)
    # Split, not sliced: the gradient of a slice is as long as the whole.
    pieces = (x.split(_SEGMENT, dim=2) for x in (query, key, value))
    masks = repeat(None) if keep is None else keep.split(_SEGMENT, dim=1)
    parts = []
    for *piece, own in zip(*pieces, masks, strict=False):
        rows, state = _segment(features, *piece, own, state)
        parts.append(rows)
    return torch.cat(parts, dim=2), state


def _segment(
    features: FeatureMap, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, state: PerformerState
) -> tuple[Tensor, PerformerState]:
    """See `causal_sums`; all chunks at once.

    Every scale is a maximum over keys that the row may see: `top` of a key alone, `running` up to a position, `before`
    and `last` at the ends of a chunk. So not even rounding lets a later key reach an earlier row.
    """
    length, device = key.shape[2], key.device
    if torch.compiler.is_compiling():
        size = max(_GRAPH_CHUNK, key.shape[3])
    else:
        size = min(max(_CHUNK, key.shape[3]), length)
    blocks = count_blocks(length, size)
    position = torch.arange(blocks, device=device)[:, None] * size + torch.arange(size, device=device)
    row = position.clamp(max=length - 1)
    counted = (position < length)[None]
    if keep is not None:
        counted = counted & keep[:, row]
    query, key, value = (x[:, :, row] for x in (query, key, value))

    query = features.queries(query)
    key, top = features.keys(key)
    top = top.masked_fill(~counted[:, None], -torch.inf)
    last = torch.maximum(top.amax(dim=-1).cummax(dim=-1).values, state.top[..., None])
    # By index, because a slice of one less makes a graph special to few chunks.
    number = torch.arange(blocks, device=device)
    before = torch.where(number == 0, state.top[..., None], last[..., (number - 1).clamp(min=0)])
    running = torch.maximum(top.cummax(dim=-1).values, before[..., None])

    later = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    within = top[..., None, :] - finite(running)[..., :, None]
    weights = torch.matmul(query, key.transpose(-1, -2)) * within.masked_fill(later, -torch.inf).exp()
    result = torch.matmul(weights, value)

    own = (top - finite(last)[..., None]).exp()
    sums = torch.matmul((key * own[..., None]).transpose(-1, -2), value)
    shares = last[..., None, :] - finite(before)[..., :, None]
    shares = shares.masked_fill(number[None, :] >= number[:, None], -torch.inf).exp()
    prefix = torch.matmul(shares, sums.flatten(-2)).unflatten(-1, sums.shape[-2:])
    prefix = prefix + _scaled(state.sums[:, :, None], state.top[..., None] - finite(before))
    result = result + torch.matmul(query, prefix) * (before[..., None] - finite(running)).exp()[..., None]

    end = last[..., -1]
    after = _scaled(prefix[:, :, -1], before[..., -1] - finite(end)) + sums[:, :, -1]
    position = torch.arange(length, device=device)
    return result[:, :, position // size, position % size], PerformerState(after, end)


def _scaled(sums: Tensor, exponent: Tensor) -> Tensor:
    """`sums` `[..., features, d + 1]` times `exp(exponent)` `[...]`."""
    return sums * exponent.exp()[..., None, None]
