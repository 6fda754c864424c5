"""Angular locality-sensitive hashing: vectors that point the same way get the same bucket, the likelier the closer."""

import torch
from torch import Tensor

from ..cpu import without_autocast
from .counter_random import normal_draws


def powers_of_two(counts: Tensor, chunk_length: int, limit: int, tables: int) -> Tensor:
    """Buckets for examples of so many tokens, as factors: about two buckets a chunk, a power of two.

    Args:
        counts: int64 `[batch]`, valid tokens of each example.
        chunk_length: tokens of a chunk.
        limit: largest number of buckets in one factor; more become two factors.
        tables: 1 if there can be no second factor, or 2.

    Returns:
        int64 `[batch, tables]`; their product is the number of buckets: 1 where the text fits into a chunk, for then
        nothing is to be sorted.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451 (2 length / chunk buckets); powers of two and factors as released.
    """
    wanted = 2 * (counts // chunk_length)
    steps = torch.arange(1, 62, device=counts.device)
    exponent = torch.where(counts > chunk_length, (wanted[:, None] >= 2**steps).sum(dim=1), 0)
    if tables == 1:
        return (2**exponent)[:, None]
    half = exponent // 2
    split = 2**exponent > limit
    return torch.stack([torch.where(split, 2**half, 2**exponent), torch.where(split, 2 ** (exponent - half), 1)], dim=1)


def table_sizes(max_length: int, chunk_length: int, limit: int) -> tuple[int, ...]:
    """Largest factors that `powers_of_two` gives for texts of up to `max_length` tokens."""
    exponent = (2 * (max_length // chunk_length)).bit_length() - 1 if max_length > chunk_length else 0
    if 2**exponent <= limit:
        return (2**exponent,)
    # An odd exponent's larger half, and what is just not split.
    return (2 ** max((exponent // 2), limit.bit_length() - 1), 2 ** (exponent - exponent // 2))


def hash_rotations(
    seed: int, layer: int, redraw: int, *, heads: int, head_dim: int, rounds: int, directions: int, device: torch.device
) -> Tensor:
    """Random directions `[heads, head_dim, rounds, directions]`, standard normal, float32.

    A number depends on `seed`, `layer`, `redraw` and its own place only, so that a round's directions are the same
    however many rounds, heads or directions there are.
    """
    sizes = (heads, head_dim, rounds, directions)
    head, width, hash_round, direction = (torch.arange(size, device=device) for size in sizes)
    places = (hash_round[:, None], head[:, None, None, None], width[:, None, None], direction)
    return normal_draws(seed, layer, redraw, *places, device=device)


def hash_buckets(vectors: Tensor, rotations: Tensor, factors: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The bucket of each vector in each round; no gradient.

    With one factor b the bucket is the argmax of `[x R, -x R]` over b / 2 directions R; with several it is that of each
    factor, the first one counting single.

    Args:
        vectors: `[batch, heads, length, head_dim]`.
        rotations: `[heads, head_dim, rounds, directions]`; the first `sizes[0] / 2` directions are for the first
            factor, and so on.
        factors: int64 `[batch or 1, tables]`, even or 1, at most `sizes`; 1 hashes nothing. Directions that an example
            does not need are left out.
        sizes: room for each factor in `rotations`.

    Returns:
        int64 `[batch, heads, rounds, length]`, from 0 on, below the product of the factors.

    Andoni et al. 2015, arXiv 1509.02897; Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451. Time O(length * head_dim *
    rounds * directions), memory O(length * rounds * directions).
    """
    batch, heads, length, _ = vectors.shape
    with torch.no_grad(), without_autocast(vectors.device):
        dtype = torch.promote_types(vectors.dtype, torch.float32)
        flat = rotations.to(dtype).flatten(2)
        rotated = torch.matmul(vectors.detach().to(dtype), flat).unflatten(-1, tuple(rotations.shape[2:]))
        buckets = torch.zeros(batch, heads, length, rotations.shape[2], dtype=torch.long, device=vectors.device)
        start, weight = 0, torch.ones_like(factors[:, 0])
        for number, size in enumerate(sizes):
            half = (factors[:, number] // 2)[:, None, None, None]
            own = rotated[..., start : start + size // 2]
            start += size // 2
            if size > 1:
                used = torch.arange(size // 2, device=vectors.device) < half[..., None]
                # Either end of a direction is a bucket; none is used where the factor is 1.
                best = own.abs().masked_fill(~used, -1.0).argmax(dim=-1)
                positive = own.gather(-1, best[..., None])[..., 0] >= 0
                bucket = torch.where(positive, best, best + half) * (half > 0)
                buckets = buckets + weight[:, None, None, None] * bucket
            weight = weight * factors[:, number]
        return buckets.transpose(2, 3)
