"""Blocks: window, global ones and random ones, token by token."""

import torch
from torch import Tensor

from .common import project


def random_choice(draws: Tensor, row: int, blocks: int, ends: bool) -> list[int]:
    """Blocks that `row` of `blocks` attends besides: one for each of `draws` (32-bit numbers), until none is left."""
    taken = {row - 1, row, row + 1} | ({0, blocks - 1} if ends else set())
    left = [block for block in range(blocks) if block not in taken]
    picked = []
    for draw in draws.tolist():
        if left:
            picked.append(left.pop(draw * len(left) // 2**32))
    return picked


def big_bird_counts(
    tokens: list[int], length: int, block_size: int, draws: Tensor, num_global: int, ends: bool
) -> Tensor:
    """How often each of the `tokens` of one example counts each for each: `[heads, n, n]`."""
    heads = draws.shape[0]
    counts = torch.zeros(heads, length, length, dtype=torch.float64)
    front, text = tokens[:num_global], tokens[num_global:]
    blocks = [text[start : start + block_size] for start in range(0, len(text), block_size)]
    for head in range(heads):
        for token in front:
            counts[head, token, tokens] = 1
        for row, block in enumerate(blocks):
            if ends and row in (0, len(blocks) - 1):
                keys = list(tokens)
            else:
                near = {row - 1, row, row + 1} | ({0, len(blocks) - 1} if ends else set())
                seen = [b for b in near if 0 <= b < len(blocks)]
                seen += random_choice(draws[head, row], row, len(blocks), ends)
                keys = front + [token for b in seen for token in blocks[b]]
            for query in block:
                for key in keys:
                    counts[head, query, key] += 1
    return counts


def counted_attention(query: Tensor, key: Tensor, value: Tensor, counts: Tensor) -> Tensor:
    """`sum_j c_ij exp(q_i k_j / sqrt(d)) v_j / sum_j c_ij exp(q_i k_j / sqrt(d))`; a row without keys is 0."""
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * query.shape[-1] ** -0.5
    top = scores.masked_fill(counts == 0, -1e300).amax(dim=-1, keepdim=True).detach()
    terms = torch.where(counts > 0, counts * torch.exp(torch.where(counts > 0, scores - top, 0.0)), 0.0)
    total = terms.sum(dim=-1, keepdim=True)
    return torch.einsum(
        "bhij,bhjd->bhid", torch.where(total > 0, terms / torch.where(total > 0, total, 1.0), 0.0), value
    )


def big_bird(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    *,
    block_size: int,
    draws: Tensor,
    num_global: int = 0,
    ends: bool = True,
) -> Tensor:
    """BigBird attention; `draws` are 32-bit numbers `[heads, rows, count]`."""
    batch, _, length, _ = query.shape
    kept = [list(range(length)) if keep is None else keep[row].nonzero()[:, 0].tolist() for row in range(batch)]
    counts = [big_bird_counts(tokens, length, block_size, draws, num_global, ends) for tokens in kept]
    return counted_attention(query, key, value, torch.stack(counts))


def big_bird_module(
    weights: dict[str, Tensor], states: Tensor, keep: Tensor | None, *, heads: int, **options: object
) -> Tensor:
    """BigBird's self-attention: `[batch, n, hidden]` -> the same shape."""
    query, key, value = (project(weights, name, states, heads) for name in ("query", "key", "value"))
    return big_bird(query, key, value, keep, **options).permute(0, 2, 1, 3).flatten(2)
