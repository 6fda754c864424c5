"""Chunks of tokens that are sorted by bucket (LSH attention) or not (local attention), token by token from sets."""

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from .common import project


def bucket_factors(count: int, chunk_length: int, limit: int) -> list[int]:
    """Factors of the number of buckets for `count` tokens: a power of two, at most two a chunk, split above `limit`."""
    if count <= chunk_length:
        return [1]
    exponent = math.floor(math.log2(2 * (count // chunk_length)))
    if 2**exponent <= limit:
        return [2**exponent]
    return [2 ** (exponent // 2), 2 ** (exponent - exponent // 2)]


def angular_buckets(vectors: Tensor, rotations: Tensor, factors: list[int], sizes: tuple[int, ...]) -> Tensor:
    """`argmax [x R, -x R]` for each factor, the first counting single: `[heads, rounds, n]`.

    `vectors` are `[heads, n, d]`, `rotations` `[heads, d, rounds, directions]`: `sizes[i] / 2` directions for factor i,
    which takes the first `factors[i] / 2` of them.
    """
    heads, count, _ = vectors.shape
    rounds = rotations.shape[2]
    starts = accumulate((size // 2 for size in sizes), initial=0)
    rooms = list(zip(factors, starts, strict=False))  # one start too many
    buckets = torch.zeros(heads, rounds, count, dtype=torch.long)
    for head in range(heads):
        for number in range(rounds):
            weight = 1
            for factor, start in rooms:
                if factor > 1:
                    directions = rotations[head, :, number, start : start + factor // 2].to(vectors.dtype)
                    turned = vectors[head].detach() @ directions
                    buckets[head, number] += weight * torch.cat([turned, -turned], dim=1).argmax(dim=1)
                weight *= factor
    return buckets


def chunk_pairs(
    buckets: Tensor, *, chunk_length: int, chunks_before: int, chunks_after: int, causal: bool, released: bool
) -> Tensor:
    """How often each of the n tokens of one example attends each: `[heads, n, n]`, from `buckets` `[heads, rounds, n]`.

    Released: the chunks of all rounds are a ring, and each chunk that a token attends counts what is in it. Else each
    round is a line, only tokens of one bucket meet, and a pair counts once.
    """
    heads, rounds, count = buckets.shape
    counts = torch.zeros(heads, count, count, dtype=torch.float64)
    for head in range(heads):
        lines = []
        for of_token in buckets[head].tolist():
            order = sorted(range(count), key=lambda token: (of_token[token], token))  # noqa: B023
            lines.append([order[start : start + chunk_length] for start in range(0, count, chunk_length)])
        steps = range(-chunks_before, chunks_after + 1)
        if released:
            ring = [chunk for line in lines for chunk in line]
            for place, chunk in enumerate(ring):
                for near in {(place + step) % len(ring) for step in steps}:
                    for query in chunk:
                        counts[head, query, ring[near]] += 1
        else:
            pairs = set()
            for of_token, line in zip(buckets[head].tolist(), lines, strict=True):
                for place, chunk in enumerate(line):
                    near = [token for step in steps if 0 <= place + step < len(line) for token in line[place + step]]
                    pairs |= {(i, j) for i in chunk for j in near if of_token[i] == of_token[j]}
            for query, key in pairs:
                counts[head, query, key] = 1
    return counts.tril() if causal else counts


def attend_pairs(query: Tensor, key: Tensor, value: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """`sum_j c_ij exp(q_i k_j / sqrt(d) - penalty [i = j]) v_j` over that sum without `v_j`; all `[heads, n, d]`."""
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 - penalty * torch.eye(query.shape[1])
    top = scores.masked_fill(counts == 0, -1e300).amax(dim=-1, keepdim=True).detach()
    terms = torch.where(counts > 0, counts * torch.exp(torch.where(counts > 0, scores - top, 0.0)), 0.0)
    return terms @ value / terms.sum(dim=-1, keepdim=True)


def _each_example(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, attend: Callable) -> Tensor:
    """`attend(query, key, value, tokens)` of the valid tokens of each example alone, 0 at padding."""
    results = []
    for row in range(query.shape[0]):
        tokens = torch.arange(query.shape[2]) if keep is None else keep[row].nonzero()[:, 0]
        result = torch.zeros_like(query[row])
        if len(tokens) > 0:
            found = attend(query[row][:, tokens], key[row][:, tokens], value[row][:, tokens], tokens)
            result = result.index_copy(1, tokens, found)
        results.append(result)
    return torch.stack(results)


def lsh(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    rotations: Tensor,
    num_buckets: list[int] | None,
    sizes: tuple[int, ...],
    limit: int,
    exact_below: int = 0,
    **chunks: object,
) -> Tensor:
    """LSH attention with the buckets of `key`; `chunks` are arguments of `chunk_pairs`.

    Examples of fewer than `exact_below` tokens meet all of their tokens once.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> Tensor:
        if len(tokens) < exact_below:
            return attend_pairs(query, key, value, torch.ones(query.shape[0], len(tokens), len(tokens)), 1e5)
        factors = num_buckets or bucket_factors(len(tokens), chunks["chunk_length"], limit)
        counts = chunk_pairs(angular_buckets(key, rotations, factors, sizes), **chunks)
        return attend_pairs(query, key, value, counts, 1e5)

    return _each_example(query, key, value, keep, attend)


def local(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None, **chunks: object) -> Tensor:
    """Attention of chunks of the text; `chunks` are arguments of `chunk_pairs`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> Tensor:
        one_bucket = torch.zeros(1, 1, len(tokens), dtype=torch.long)
        return attend_pairs(query, key, value, chunk_pairs(one_bucket, **chunks), 0.0)

    return _each_example(query, key, value, keep, attend)


def lsh_module(
    weights: dict[str, Tensor], states: Tensor, keep: Tensor | None, *, heads: int, **options: object
) -> Tensor:
    """LSH self-attention: keys are queries divided by their root mean square."""
    query, value = (project(weights, name, states, heads) for name in ("query_key", "value"))
    key = query / torch.sqrt(query.square().mean(dim=-1, keepdim=True) + 1e-6)
    return lsh(query, key, value, keep, **options).permute(0, 2, 1, 3).flatten(2)


def local_module(
    weights: dict[str, Tensor], states: Tensor, keep: Tensor | None, *, heads: int, **options: object
) -> Tensor:
    """Local self-attention: `[batch, n, hidden]` -> the same shape."""
    query, key, value = (project(weights, name, states, heads) for name in ("query", "key", "value"))
    return local(query, key, value, keep, **options).permute(0, 2, 1, 3).flatten(2)
