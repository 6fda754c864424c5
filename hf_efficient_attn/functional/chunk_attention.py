"""Attention of chunks to neighbouring chunks, of the text as it is or sorted by bucket, in one round or several."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunk_cpu import cpu_chunk_attention
from .chunk_plan import EXCLUDED, SELF_PENALTY, ChunkPlan, cut, meeting_counts, plan_chunks, valid_counts
from .dense import masked_softmax, padded_attention
from .exact_rows import attend_others, attend_short_rows, check_exact_below, join_short_rows
from .fused import fused
from .inputs import check_qkv, zero_padding


# So few rows against all keys are one small matrix.
_FEW_QUERIES = 64


def _bias(
    plan: ChunkPlan,
    buckets: Tensor | None,
    reach: tuple[int, int],
    dtype: torch.dtype,
    *,
    causal: bool,
    exclude_self: bool,
) -> Tensor:
    """What is added to scores: `[b or 1, h or 1, rounds * chunks, chunk_length, keys]`.

    With `buckets` only tokens of one bucket meet, and a pair counts once however often it meets.
    """
    tokens = plan.tokens()
    keys, queries = plan.of_neighbours(tokens).flatten(3)[:, :, :, None], tokens[..., None]
    filled = plan.of_neighbours(plan.filled[:, None]) & plan.seen[:, None, :, :, None]
    allowed = filled.flatten(3)[:, :, :, None]
    if causal:
        allowed = allowed & (keys <= queries)
    bias = torch.zeros((), dtype=dtype, device=tokens.device)
    if buckets is not None:
        same, meetings = _meetings(plan, buckets, reach)
        allowed = allowed & same
        # A pair that meets n times has n shares of 1 / n.
        bias = -meetings.clamp(min=1).to(dtype).log()
    if exclude_self:
        bias = torch.where(keys == queries, bias - SELF_PENALTY, bias)
    return torch.where(allowed, bias, EXCLUDED)


def _meetings(plan: ChunkPlan, buckets: Tensor, reach: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whether a query and a key have one bucket in the query's round, and in how many rounds they meet.

    Both `[batch, heads, rounds * chunks, chunk_length, keys]`, for plans that do not wrap; `reach` is the number of
    chunks before and after the own one.
    """
    tokens, rounds = plan.tokens(), plan.order.shape[2]
    batch, heads = buckets.shape[:2]
    index = tokens.expand(batch, heads, -1, -1).flatten(2)
    number = torch.arange(rounds, device=index.device).repeat_interleave(tokens.shape[2] // rounds)
    same = torch.zeros((), dtype=torch.bool, device=index.device)
    total = torch.zeros((), dtype=torch.long, device=index.device)
    for hash_round in range(rounds):
        chunk = (plan.inverse[:, :, hash_round] // plan.chunk_length).expand(batch, heads, -1).gather(2, index)
        bucket = buckets[:, :, hash_round].gather(2, index)
        chunk, bucket = (cut(x, plan.chunk_length, 2) for x in (chunk, bucket))
        distance = plan.of_neighbours(chunk).flatten(3)[:, :, :, None] - chunk[..., None]
        equal = plan.of_neighbours(bucket).flatten(3)[:, :, :, None] == bucket[..., None]
        total = total + (equal & (distance >= -reach[0]) & (distance <= reach[1]))
        same = same | (equal & (number == hash_round)[:, None, None])
    return same, total


def _rounds_together(mixed: Tensor, logsumexp: Tensor, plan: ChunkPlan) -> Tensor:
    """Sorted results of all rounds `[batch, heads, rounds * chunks, chunk_length, head_dim]` as one, in token order."""
    batch, heads, _, _, width = mixed.shape
    rounds = plan.order.shape[2]
    place = plan.inverse.expand(batch, heads, -1, -1)
    mixed = mixed.unflatten(2, (rounds, -1)).flatten(3, 4).gather(3, place[..., None].expand(-1, -1, -1, -1, width))
    if rounds == 1:
        return mixed[:, :, 0]
    return _weighed(mixed, logsumexp.unflatten(2, (rounds, -1)).flatten(3, 4).gather(3, place))


def _weighed(mixed: Tensor, logsumexp: Tensor) -> Tensor:
    """Rounds `[batch, heads, rounds, length, head_dim]` as one, by logarithms `[batch, heads, rounds, length]`."""
    share = logsumexp.softmax(dim=2)
    return (mixed * share[..., None].to(mixed.dtype)).sum(dim=2)


def chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    buckets: Tensor | None,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    causal: bool,
    released: bool,
    exclude_self: bool,
    exact_below: int = 0,
) -> Tensor:
    """Softmax attention of each token to its chunk and neighbouring chunks.

    With `buckets` tokens are sorted by bucket and position, in each round on their own, and chunks are of that order
    (LSH attention); without they are of the text (local attention). Chunks count an example's valid tokens from the
    first. A token's results of several rounds are weighted by `exp` of their log-sum-exp.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`; a causal `query` may be shorter, the last tokens.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities of each round.
        buckets: int64 `[batch, heads, rounds, length]`, or None.
        chunk_length: tokens of a chunk, 1 or more.
        chunks_before, chunks_after: neighbouring chunks that a chunk attends besides itself.
        causal: no token attends a later one, wherever sorting puts it.
        released: as in the released code, a token attends all of these chunks, the first chunk has the last one of the
            round before it as neighbour (the first round's that of the last round), and a pair that meets in several
            rounds counts as often. Otherwise as in the paper: only tokens of its own bucket, nothing before the first
            chunk, and each pair counts once.
        exclude_self: a token attends itself only where it may attend nothing else.
        exact_below: examples of fewer valid tokens attend all of theirs instead, which is another function. Not in the
            causal form.

    Returns:
        As `query`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, a chunk without tokens, `exact_below` in the causal form.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451. Time O(rounds * length * (chunk + log length)), memory O(rounds *
    length * chunk) or, on a CPU with `released` or without `buckets`, O(rounds * length).
    """
    _check(query, key, value, key_padding_mask, buckets, chunk_length, chunks_before, chunks_after, causal)
    queries, length = query.shape[2], key.shape[2]
    options = {"scale": scale, "dropout_p": dropout_p, "buckets": buckets, "chunk_length": chunk_length}
    options |= {"chunks_before": chunks_before, "chunks_after": chunks_after, "causal": causal, "released": released}
    options |= {"exclude_self": exclude_self}
    if exact_below != 0:
        check_exact_below(exact_below, causal)
        exact = partial(attend_others if exclude_self else padded_attention, scale=scale, dropout_p=dropout_p)
        estimate = partial(chunk_attention, **options)
        return attend_short_rows(estimate, exact, query, key, value, key_padding_mask, exact_below)
    if queries < length:
        if queries <= _FEW_QUERIES:
            return dense_chunk_attention(query, key, value, key_padding_mask, **options)[0]
        query = F.pad(query, (0, 0, length - queries, 0))
        return chunk_attention(query, key, value, key_padding_mask, **options)[:, :, length - queries :]
    plan = plan_chunks(
        buckets,
        key_padding_mask,
        length,
        query.device,
        chunk_length=chunk_length,
        chunks_before=chunks_before,
        chunks_after=chunks_after,
        wrap=released,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "dropout_p": dropout_p, "causal": causal, "exclude_self": exclude_self}
    options |= {"chunks_before": chunks_before, "chunks_after": chunks_after}
    # In the paper's form of LSH pairs count once and only in their bucket: the kernel on a CPU has no masks for that.
    meets_all = released or buckets is None
    if meets_all:
        shape = {"scale": scale, "dropout_p": dropout_p, "causal": causal, "exclude_self": exclude_self}
        mixed = _fused(query, key, value, plan, **shape)
        if mixed is not None:
            return mixed
    if meets_all and query.device.type == "cpu" and dropout_p < 1.0 and not torch.compiler.is_compiling():
        counts = valid_counts(key_padding_mask, length, query.device)
        options |= {"chunk_length": chunk_length, "wrap": released}
        return cpu_chunk_attention(query, key, value, plan.order, plan.inverse, counts, **options)
    only = None if released else buckets
    return _portable(query, key, value, key_padding_mask, plan, only, **options)


def _fused(query: Tensor, key: Tensor, value: Tensor, plan: ChunkPlan, **options: float) -> Tensor | None:
    """All chunks that meet whole, each round in one kernel of a GPU; None where there is none."""
    kernel = fused("blocks", query)
    if kernel is None:
        return None
    rounds, size = plan.order.shape[2], plan.chunk_length
    source, filled = plan.order.flatten(2), plan.filled.flatten(1)[:, None]
    lists = plan.neighbours.masked_fill(~plan.seen, -1)[:, None].unflatten(2, (rounds, -1))
    found = []
    for hash_round in range(rounds):
        front = hash_round * lists.shape[3]
        own = kernel(query, key, value, lists[:, :, hash_round], source, filled, size=size, front=front, **options)
        if own is None:
            return None
        found.append(own)
    if rounds == 1:
        return found[0][0]
    mixed, logsumexp = (torch.stack(x, dim=2) for x in zip(*found, strict=True))
    return _weighed(mixed, logsumexp)


def _portable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    plan: ChunkPlan,
    only: Tensor | None,
    *,
    scale: float,
    dropout_p: float,
    chunks_before: int,
    chunks_after: int,
    causal: bool,
    exclude_self: bool,
) -> Tensor:
    """All chunks at once, each against a copy of its neighbours; with `only`, tokens of one of these buckets meet."""
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    index = plan.order.flatten(2)[..., None].expand(*query.shape[:2], -1, query.shape[3])
    rows = (x.gather(2, index) for x in (query * scale, key, value))
    own, keys, values = (cut(x, plan.chunk_length, 2) for x in rows)
    keys, values = (plan.of_neighbours(x).flatten(3, 4) for x in (keys, values))
    scores = torch.matmul(own, keys.transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    reach = (chunks_before, chunks_after)
    scores = scores + _bias(plan, only, reach, scores.dtype, causal=causal, exclude_self=exclude_self)
    # Not `exp(scores - logsumexp)`: where a token has only itself, both are -1e5 and have lost their last digits.
    probs, logsumexp = scores.softmax(dim=-1).to(value.dtype), scores.logsumexp(dim=-1)
    mixed = torch.matmul(F.dropout(probs, dropout_p) if dropout_p > 0.0 else probs, values)
    return zero_padding(_rounds_together(mixed.to(value.dtype), logsumexp, plan), key_padding_mask)


def dense_chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    buckets: Tensor | None,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    causal: bool,
    released: bool,
    exclude_self: bool,
    exact_below: int = 0,
) -> tuple[Tensor, Tensor]:
    """`chunk_attention` with the whole matrix in memory; arguments and errors as there.

    A pair that meets n times has n times the weight.

    Returns:
        The result `[batch, heads, queries, head_dim]` and the weights before dropout `[batch, heads, queries, length]`.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451. Time O(rounds^2 * queries * length), memory O(queries * length).
    """
    _check(query, key, value, key_padding_mask, buckets, chunk_length, chunks_before, chunks_after, causal)
    if exact_below != 0:
        check_exact_below(exact_below, causal)
        options = {"scale": scale, "dropout_p": dropout_p, "causal": causal, "released": released}
        options |= {"exclude_self": exclude_self, "chunks_before": chunks_before, "chunks_after": chunks_after}
        estimate, exact = (
            dense_chunk_attention(query, key, value, key_padding_mask, buckets=x, chunk_length=size, **options)
            for x, size in ((buckets, chunk_length), (None, key.shape[2]))  # the second has one chunk of all tokens
        )
        return join_short_rows(estimate, exact, key_padding_mask, exact_below)
    queries, length = query.shape[2], key.shape[2]
    own_mask = None if key_padding_mask is None else key_padding_mask[:, -queries:]
    query = zero_padding(query, own_mask)
    key, value = (zero_padding(x, key_padding_mask) for x in (key, value))
    plan = plan_chunks(
        buckets,
        key_padding_mask,
        length,
        query.device,
        chunk_length=chunk_length,
        chunks_before=chunks_before,
        chunks_after=chunks_after,
        wrap=released,
    )
    met = meeting_counts(plan, None if released else buckets, queries)
    allowed = met > 0
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask[:, None, None, :] & own_mask[:, None, :, None]
    places = torch.arange(length, device=query.device)
    if causal:
        allowed = allowed & (places <= places[-queries:, None])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if released:
        scores = scores + met.clamp(min=1).to(scores.dtype).log()
    if exclude_self:
        scores = torch.where(places == places[-queries:, None], scores - SELF_PENALTY, scores)
    weights = masked_softmax(scores, allowed).to(query.dtype)
    mixed = torch.matmul(F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights, value)
    return mixed.to(query.dtype), weights


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    buckets: Tensor | None,
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    causal: bool,
) -> None:
    check_qkv(query, key, value, key_padding_mask, last_queries=causal)
    if chunk_length < 1:
        raise ValueError(f"chunk_length = {chunk_length}: a chunk has 1 token or more.")
    if min(chunks_before, chunks_after) < 0:
        raise ValueError(f"chunks_before = {chunks_before} and chunks_after = {chunks_after} must be 0 or more.")
    if buckets is not None:
        expected = (key.shape[0], key.shape[1], key.shape[2])
        if buckets.dim() != 4 or (*buckets.shape[:2], buckets.shape[3]) != expected:
            raise ValueError(
                f"buckets must be [batch, heads, rounds, length] = [{expected[0]}, {expected[1]}, rounds, "
                f"{expected[2]}], got {list(buckets.shape)}."
            )
