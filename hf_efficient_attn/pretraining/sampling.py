"""Samples of a generator that depend on a text and a seed, and on nothing else."""

import hashlib

import torch
from torch import Tensor


def row_seeds(seed: int, ids: Tensor, keep: Tensor, masked: Tensor) -> list[int]:
    """A number below 2^63 for each text, a hash of `seed`, its tokens, and which of them are masked.

    Args:
        ids: `[batch, length]`, the original tokens.
        keep: `[batch, length]` bool, False at padding, which does not count.
        masked: `[batch, length]` bool.
    """
    seeds = []
    for tokens, own, chosen in zip(*(x.cpu().numpy() for x in (ids, keep, masked)), strict=True):
        hashed = hashlib.blake2b(f"{seed} ".encode(), digest_size=8)
        hashed.update(tokens[own].astype("<i8").tobytes())
        hashed.update(chosen[own].tobytes())
        seeds.append(int.from_bytes(hashed.digest(), "little") >> 1)
    return seeds


@torch.no_grad()
def sample_tokens(logits: Tensor, counts: list[int], seeds: list[int] | None = None) -> Tensor:
    """One token from each row of `softmax(logits)`, by the Gumbel-max trick. No gradient goes through.

    Args:
        logits: `[tokens, vocab_size]`, the tokens of all texts in order.
        counts: how many of them each text has.
        seeds: one number a text: its samples are then a pure function of it and of its logits. None takes torch's
            generator.

    Returns:
        `[tokens]` int64.

    Jang et al. 2016, arXiv 1611.01144; Maddison et al. 2014, arXiv 1411.0030.
    """
    sampled = [torch.empty(0, dtype=torch.long, device=logits.device)]
    for row, part in enumerate(logits.split(counts)):
        if len(part) == 0:
            continue
        generator = None
        if seeds is not None:
            generator = torch.Generator(logits.device)
            generator.manual_seed(seeds[row])
        noise = torch.rand(part.shape, device=logits.device, generator=generator)
        # Gumbel noise is -log(-log(u)); u = 0 would be -inf for good, and u is never 1.
        noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().neg_().log_().neg_()
        sampled.append(noise.add_(part.float()).argmax(dim=-1))
    return torch.cat(sampled)
