"""LSH attention for queries and keys of their own: a query attends keys near its bucket in the keys' sorted order."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunk_plan import EXCLUDED, valid_counts
from .dense import padded_attention
from .exact_rows import attend_short_rows, check_exact_below
from .inputs import check_qkv, count_blocks, zero_padding


# Queries whose chunks are computed together in eager mode: more would only touch more memory.
_SEGMENT = 2048


def hashed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    query_buckets: Tensor,
    key_buckets: Tensor,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    exact_below: int = 0,
) -> Tensor:
    """Softmax attention of each query over keys that hashing puts near it, in one round or several.

    In each round the valid tokens of an example are sorted twice, by the bucket of their query and by that of their
    key. Queries are cut into chunks of `chunk_length` in their order. A chunk attends one window of
    `(chunks_before + 1 + chunks_after) * chunk_length` neighbours in the order of the keys: the place of the chunk's
    middle query is where the keys of its bucket stand, as far into them as it is into the queries of that bucket, and
    the window is moved inwards at both ends. A query's results of several rounds are weighted by `exp` of their
    log-sum-exp, so that a pair that meets in several rounds counts as often. Where the window holds all tokens, this
    is softmax attention.

    This is not Reformer's attention, whose queries are its keys (`chunk_attention`). There is no causal form: which
    keys stand near a query depends on all tokens.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities of each round.
        query_buckets, key_buckets: int64 `[batch, heads, rounds, length]` from one hash, such as `hash_buckets` gives.
        chunk_length: queries of a chunk, 1 or more.
        chunks_before, chunks_after: how much further than a chunk the window reaches, in chunks.
        exact_below: examples of fewer valid tokens get full softmax attention instead, which is another function.

    Returns:
        As `query`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, a chunk without tokens, a negative `exact_below`.

    After Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451, section 2, and, for separate queries and keys, Daras et al.
    2020, arXiv 2010.05315. Time O(rounds * length * (window + log length)), memory O(rounds * length * window) or, in
    eager mode without gradients, O(rounds * length).
    """
    check_qkv(query, key, value, key_padding_mask)
    for name, buckets in (("query_buckets", query_buckets), ("key_buckets", key_buckets)):
        expected = (*query.shape[:2], query_buckets.shape[2], query.shape[2])
        if tuple(buckets.shape) != tuple(expected):
            raise ValueError(
                f"{name} must be [batch, heads, rounds, length] = {list(expected)}, got {list(buckets.shape)}."
            )
    if chunk_length < 1:
        raise ValueError(f"chunk_length = {chunk_length}: a chunk has 1 token or more.")
    if min(chunks_before, chunks_after) < 0:
        raise ValueError(f"chunks_before = {chunks_before} and chunks_after = {chunks_after} must be 0 or more.")
    if exact_below != 0:
        check_exact_below(exact_below, causal=False)
        shared = {"scale": scale, "dropout_p": dropout_p}
        estimate = partial(
            hashed_attention,
            query_buckets=query_buckets,
            key_buckets=key_buckets,
            chunk_length=chunk_length,
            chunks_before=chunks_before,
            chunks_after=chunks_after,
            **shared,
        )
        exact = partial(padded_attention, **shared)
        return attend_short_rows(estimate, exact, query, key, value, key_padding_mask, exact_below)
    length, compiling = query.shape[2], torch.compiler.is_compiling()
    window = (chunks_before + 1 + chunks_after) * chunk_length
    window = window if compiling else min(window, length)
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)

    counts = valid_counts(key_padding_mask, length, query.device)[:, None, None, None]
    query_order, query_sorted = _sorted(query_buckets, key_padding_mask)
    key_order, key_sorted = _sorted(key_buckets, key_padding_mask)
    chunks = count_blocks(length, chunk_length)
    first = torch.arange(chunks, device=query.device) * chunk_length
    start = _window_starts(query_sorted, key_sorted, counts, first, chunk_length, chunks_before * chunk_length, window)

    step = chunks if compiling else max(1, _SEGMENT // chunk_length)
    pieces = [
        _chunks_of(
            query,
            key,
            value,
            counts,
            (query_order, key_order),
            (first[at : at + step], start[..., at : at + step]),
            (chunk_length, window),
            dropout_p,
        )
        for at in range(0, chunks, step)
    ]
    mixed, logsumexp = (torch.cat(x, dim=3) for x in zip(*pieces, strict=True))

    places = torch.arange(length, device=query.device).expand_as(query_order)
    inverse = torch.zeros_like(query_order).scatter(-1, query_order, places)
    mixed = mixed.gather(3, inverse[..., None].expand(*inverse.shape, mixed.shape[-1]))
    share = logsumexp.gather(3, inverse).softmax(dim=2)
    mixed = (mixed * share[..., None].to(mixed.dtype)).sum(dim=2)
    return zero_padding(mixed.to(value.dtype), key_padding_mask)


def _sorted(buckets: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens by bucket and position, padding behind them, and their buckets: both `[batch, heads, rounds, length]`."""
    if key_padding_mask is not None:
        buckets = buckets.masked_fill(~key_padding_mask[:, None, None, :], torch.iinfo(torch.long).max)
    order = buckets.argsort(dim=-1, stable=True)
    return order, buckets.gather(-1, order)


def _window_starts(
    queries: Tensor, keys: Tensor, counts: Tensor, first: Tensor, chunk_length: int, before: int, window: int
) -> Tensor:
    """Where each chunk's window begins in the order of the keys, int64 `[batch, heads, rounds, chunks]`.

    `queries` and `keys` are sorted buckets, `counts` `[batch or 1, 1, 1, 1]` valid tokens, `first` `[chunks]` places.
    """
    middle = torch.minimum(first + chunk_length // 2, counts - 1).clamp(min=0)
    middle = middle.expand(*queries.shape[:3], -1)
    bucket = queries.gather(-1, middle).contiguous()
    spans = []
    for row in (queries.contiguous(), keys.contiguous()):
        spans.append([torch.searchsorted(row, bucket, side=side) for side in ("left", "right")])
    (query_start, query_end), (key_start, key_end) = spans
    into = (middle - query_start) * (key_end - key_start) // (query_end - query_start).clamp(min=1)
    start = key_start + into - (middle - first) - before
    return torch.minimum(start.clamp(min=0), (counts - window).clamp(min=0))


def _chunks_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    orders: tuple[Tensor, Tensor],
    starts: tuple[Tensor, Tensor],
    sizes: tuple[int, int],
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Some chunks: results `[batch, heads, rounds, places, head_dim]` and log-sum-exp `[batch, heads, rounds, places]`.

    `orders` of queries and keys, `starts` of the chunks and of their windows, `sizes` of a chunk and of a window.
    """
    (query_order, key_order), (first, start), (chunk_length, window) = orders, starts, sizes
    length, device = query.shape[2], query.device
    place = first[:, None] + torch.arange(chunk_length, device=device)
    tokens = query_order[..., place.clamp(max=length - 1)]
    near = start[..., None] + torch.arange(window, device=device)
    allowed = near < counts[..., None]
    near = near.clamp(max=length - 1)
    near = key_order.gather(-1, near.flatten(3)).view_as(near)

    def rows(tensor: Tensor, index: Tensor) -> Tensor:
        # [batch, heads, rounds, chunks, size] -> [batch, heads, rounds, chunks, size, head_dim]
        flat = index.flatten(2)[..., None].expand(*index.shape[:2], -1, tensor.shape[-1])
        return tensor.gather(2, flat).view(*index.shape, tensor.shape[-1])

    scores = torch.matmul(rows(query, tokens), rows(key, near).transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~allowed[..., None, :], EXCLUDED)
    probs = scores.softmax(dim=-1).to(value.dtype)
    probs = F.dropout(probs, dropout_p) if dropout_p > 0.0 else probs
    return torch.matmul(probs, rows(value, near)).flatten(3, 4), scores.logsumexp(dim=-1).flatten(3, 4)
