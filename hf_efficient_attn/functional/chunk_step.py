"""LSH attention of one token, over the keys that its chunks hold."""

import torch
from torch import Tensor

from .chunk_plan import EXCLUDED, SELF_PENALTY
from .inputs import zero_padding


def chunk_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    tokens: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Softmax attention of the last token over some tokens, over itself only where there is no other.

    What `chunk_attention` gives for the last row, where `tokens` are those of its chunks.

    Args:
        query: `[batch, heads, 1, head_dim]`.
        key, value: `[batch, heads, length, head_dim]`.
        query_mask: `[batch, 1]` bool, False where the token is padding, or None.
        tokens: int64 `[batch, heads, rounds, keys]`, positions; one that is there several times counts as often.
        allowed: bool, likewise.
        bias: added to scores, likewise, or None.

    Returns:
        As `query`, 0 at padding.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451. Time and memory O(rounds * keys), whatever the length.
    """
    own = key.shape[2] - 1
    flat = tokens.flatten(2)
    index = flat[..., None].expand(*flat.shape, key.shape[3])
    keys, values = (x.gather(2, index) for x in (key, value))
    scores = torch.matmul(zero_padding(query, query_mask) * query.shape[-1] ** -0.5, keys.transpose(2, 3))[:, :, 0]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias.flatten(2).to(scores.dtype)
    scores = torch.where(flat == own, scores - SELF_PENALTY, scores)
    scores = scores.masked_fill(~allowed.flatten(2), EXCLUDED)
    # Where nothing is allowed, at padding, the result is cleared.
    mixed = torch.matmul(scores.softmax(dim=-1).to(value.dtype)[:, :, None], values)
    return zero_padding(mixed.to(value.dtype), query_mask)
