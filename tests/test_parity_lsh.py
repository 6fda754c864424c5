"""LSH and local attention against the modules inside transformers' Reformer, for equal weights and hash directions.

Equal where these do not depend on padding: they count chunks through it, so here it fills no chunk of its own. Where a
chunk has more neighbours than there are chunks, they count some twice; not so here.
"""

from typing import Any

import pytest
import torch
from helpers import mask_of
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention

from hf_efficient_attn.functional import chunk_attention, hash_buckets, powers_of_two


HEADS, HEAD_DIM, WIDTH, CHUNK, SEED = 4, 8, 32, 8, 11


def original(cls: type, **fields: Any) -> nn.Module:
    """transformers' module in float64 with weights that spread scores."""
    config = ReformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=HEAD_DIM,
        lsh_attn_chunk_length=CHUNK,
        local_attn_chunk_length=CHUNK,
        hash_seed=SEED,
        max_position_embeddings=64,
        **fields,
    )
    module = cls(config, layer_idx=0).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def split(states: Tensor) -> Tensor:
    return states.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)


def ours_lsh(module: nn.Module, states: Tensor, keep: Tensor | None, rounds: int, before: int, after: int) -> Tensor:
    """The module's weights in our formula, with the directions that it draws."""
    query, value = split(module.query_key(states)), split(module.value(states))
    key = query * torch.rsqrt(query.square().mean(dim=-1, keepdim=True) + 1e-6)
    fixed = module.config.num_buckets
    if fixed is None:
        counts = torch.tensor([states.shape[1]]) if keep is None else keep.sum(dim=1)
        sizes = (16,)
        factors = powers_of_two(counts, CHUNK, 16, 1)
    else:
        sizes = (fixed,) if isinstance(fixed, int) else tuple(fixed)
        factors = torch.tensor([sizes])
    # The released code draws only what the number of buckets takes.
    used = int(factors.max()) if fixed is None else sum(sizes)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        drawn = torch.randn(HEADS, HEAD_DIM, rounds, used // 2, dtype=torch.float64)
    rotations = torch.zeros(HEADS, HEAD_DIM, rounds, sum(sizes) // 2, dtype=torch.float64)
    rotations[..., : used // 2] = drawn
    return chunk_attention(
        query,
        key,
        value,
        keep,
        buckets=hash_buckets(query, rotations, factors, sizes),
        chunk_length=CHUNK,
        chunks_before=before,
        chunks_after=after,
        causal=module.is_decoder,
        released=True,
        exclude_self=True,
    )


def compare(states: Tensor, theirs: Tensor, ours: Tensor, keep: Tensor | None) -> None:
    """Results and gradients of the states, where there is text."""
    ours = ours.transpose(1, 2).flatten(2)
    seen = torch.ones(states.shape[:2]).bool() if keep is None else keep
    assert_close(ours[seen], theirs[seen], rtol=0, atol=1e-10)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * seen[..., None]
    gradients = (torch.autograd.grad((x * weight).sum(), states)[0] for x in (ours, theirs))
    assert_close(*gradients, rtol=0, atol=1e-9)


def texts(length: int, padded: bool) -> tuple[Tensor, Tensor | None]:
    states = torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    keep = mask_of([length, length - 3, length - CHUNK + 1], length).bool() if padded else None
    return states.requires_grad_(), keep


# Published decoders do not look ahead.
FORMS = [(1, 0, False), (1, 1, False), (0, 1, False), (2, 0, False), (0, 0, False), (1, 0, True), (2, 0, True)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("before", "after", "causal"), FORMS)
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("num_buckets", [None, 6, [2, 4]])
def test_lsh_attention(
    num_buckets: int | list[int] | None, rounds: int, before: int, after: int, causal: bool, padded: bool
) -> None:
    near = {"lsh_num_chunks_before": before, "lsh_num_chunks_after": after}
    for length in (24, 48):
        module = original(LSHSelfAttention, num_hashes=rounds, num_buckets=num_buckets, is_decoder=causal, **near)
        states, keep = texts(length, padded)
        ours = ours_lsh(module, states, keep, rounds, before, after)
        with torch.random.fork_rng():
            theirs = module(states, attention_mask=keep).hidden_states
        compare(states, theirs, ours, keep)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_lsh_attention_in_one_chunk(rounds: int, causal: bool, padded: bool) -> None:
    """There transformers' module neither hashes nor sorts."""
    module = original(LSHSelfAttention, num_hashes=rounds, num_buckets=4, is_decoder=causal)
    states, keep = texts(CHUNK, padded)
    theirs = module(states, attention_mask=keep).hidden_states
    compare(states, theirs, ours_lsh(module, states, keep, rounds, 1, 0), keep)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (1, 1), (0, 2), (0, 0)])
@pytest.mark.parametrize("length", [8, 24, 48])
def test_local_attention(length: int, before: int, after: int, causal: bool, padded: bool) -> None:
    near = {"local_num_chunks_before": before, "local_num_chunks_after": after}
    module = original(LocalSelfAttention, is_decoder=causal, **near)
    states, keep = texts(length, padded)
    if causal and padded and after == 0:
        keep = mask_of([length, max(1, length // 2), 1], length).bool()  # no token sees what is behind its chunk
    ours = chunk_attention(
        *(split(getattr(module, name)(states)) for name in ("query", "key", "value")),
        keep,
        buckets=None,
        chunk_length=CHUNK,
        chunks_before=before,
        chunks_after=after,
        causal=causal,
        released=True,
        exclude_self=False,
    )
    compare(states, module(states, attention_mask=keep).hidden_states, ours, keep)
