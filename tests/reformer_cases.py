"""Reformer's rows of the table of mechanisms: LSH attention and local attention."""

from typing import Any

import oracles
import torch
from case_types import HEAD_DIM, HEADS, Case, Variant
from torch import Tensor

from hf_efficient_attn.functional import (
    chunk_attention,
    hash_buckets,
    hash_rotations,
    powers_of_two,
    table_sizes,
    valid_counts,
)


def _chunks(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: None, **kwargs: Any) -> Tensor:
    return chunk_attention(query, key, value, keep, buckets=None, exclude_self=False, **kwargs)


def _lsh(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    is_global: None,
    *,
    rotations: Tensor,
    num_buckets: list[int] | None,
    sizes: tuple[int, ...],
    limit: int,
    chunk_length: int,
    **kwargs: Any,
) -> Tensor:
    """Hashes keys, of which there are all where queries are fewer, and in float64, so that no rounding moves one."""
    if num_buckets is None:
        factors = powers_of_two(valid_counts(keep, key.shape[2], key.device), chunk_length, limit, len(sizes))
    else:
        factors = torch.tensor([num_buckets])
    buckets = hash_buckets(key.double(), rotations, factors, sizes)
    kwargs |= {"buckets": buckets, "chunk_length": chunk_length, "exclude_self": True}
    return chunk_attention(query, key, value, keep, **kwargs)


def hashed(
    length: int,
    rounds: int = 1,
    near: tuple[int, int] = (1, 0),
    num_buckets: list[int] | None = None,
    causal: bool = False,
    released: bool = True,
    limit: int = 180,
    exact_below: int = 0,
) -> Variant:
    """LSH attention with the directions of `hash_seed=0` in layer 0; for up to 2,100 tokens.

    `limit` is no option of the module; its own, whatever it is, must not split what is short of 100 tokens.
    """
    sizes = table_sizes(2100, length, limit) if num_buckets is None else tuple(num_buckets)
    shape = {"heads": HEADS, "head_dim": HEAD_DIM, "rounds": rounds, "directions": sum(x // 2 for x in sizes)}
    options = {
        "rotations": hash_rotations(0, 0, 0, **shape, device=torch.device("cpu")),
        "num_buckets": num_buckets,
        "sizes": sizes,
        "limit": limit,
        "chunk_length": length,
        "chunks_before": near[0],
        "chunks_after": near[1],
        "causal": causal,
        "released": released,
        "exact_below": exact_below,
    }
    config = {
        "lsh_attn_chunk_length": length,
        "lsh_num_chunks_before": near[0],
        "lsh_num_chunks_after": near[1],
        "num_hashes": rounds,
        "num_buckets": num_buckets,
        "hash_seed": 0,
        "chunk_rule": "released" if released else "paper",
        "exact_below": exact_below,
    }
    return Variant(options, config, causal=causal)


def _local(length: int, near: tuple[int, int] = (1, 0), causal: bool = False, released: bool = True) -> Variant:
    options = {"chunk_length": length, "chunks_before": near[0], "chunks_after": near[1]}
    config = {f"local_attn_{k}" if k == "chunk_length" else f"local_num_{k}": v for k, v in options.items()}
    config["chunk_rule"] = "released" if released else "paper"
    return Variant({**options, "causal": causal, "released": released}, config, causal=causal)


REFORMER_CASES = [
    Case(
        name="lsh",
        formula=_lsh,
        oracle=lambda q, k, v, keep, is_global, **options: oracles.lsh(q, k, v, keep, **options),
        module_oracle=lambda weights, x, keep, heads, is_global, **options: oracles.lsh_module(
            weights, x, keep, heads=heads, **options
        ),
        variants={
            "one round": hashed(8),
            "three rounds": hashed(9, 3),
            "causal three rounds": hashed(9, 3, causal=True),
            "one token a chunk": hashed(1, 1, (2, 1), num_buckets=[8]),
            "wide": hashed(16, 2, (2, 2), num_buckets=[2, 4]),
            "paper": hashed(8, 3, released=False),
            "paper ahead": hashed(9, 2, (1, 1), num_buckets=[6], released=False),
            "paper causal": hashed(8, 3, causal=True, released=False),
            "exact below 64": hashed(8, 2, exact_below=64),
        },
        softmax_options=None,  # a token does not attend itself
    ),
    Case(
        name="local",
        formula=_chunks,
        oracle=lambda q, k, v, keep, is_global, **options: oracles.local(q, k, v, keep, **options),
        module_oracle=lambda weights, x, keep, heads, is_global, **options: oracles.local_module(
            weights, x, keep, heads=heads, **options
        ),
        variants={
            "one before": _local(8),
            "causal": _local(8, causal=True),
            "ahead": _local(9, (1, 1)),
            "wide": _local(7, (2, 2)),
            "wide causal": _local(5, (3, 0), causal=True),
            "one token a chunk": _local(1, (3, 1)),
            "paper": _local(8, (1, 1), released=False),
        },
        softmax_options=_local(100).options,
    ),
]
