"""Losses of joint pretraining (Clark et al. 2020, arXiv 2003.10555). Tensors in, tensors out."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mean(losses: Tensor) -> Tensor:
    """Mean of `[tokens]`, 0 if there are none, with a gradient of 0 to all that made them."""
    return losses.sum() / max(1, losses.numel())


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods `[tokens]` of `targets` under `logits` `[tokens, vocab_size]`."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def detection_losses(logits: Tensor, is_replaced: Tensor) -> Tensor:
    """Binary cross entropy of each token, in fp32; both tensors of one shape."""
    return F.binary_cross_entropy_with_logits(logits.float(), is_replaced.float(), reduction="none")


def copy_nll(logits: Tensor, copy_logits: Tensor, read: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods `[tokens]` of `targets` where a token is copied or predicted.

    The probability of a token is `D * [it was read] + (1 - D) * softmax(logits)`, with `D = sigmoid(copy_logits)`.

    Args:
        logits: `[tokens, vocab_size]`.
        copy_logits: `[tokens]`.
        read: `[tokens]`, what the model read.
        targets: `[tokens]`, the original tokens.
    """
    copied, copy_logits = read == targets, copy_logits.float()
    predicted = F.logsigmoid(-copy_logits) - token_nll(logits, targets)
    both = torch.logaddexp(F.logsigmoid(copy_logits), predicted)
    return -torch.where(copied, both, predicted)


def adversarial_losses(
    logits: Tensor, sampled: Tensor, rewards: Tensor, baseline_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """REINFORCE for a generator that is to raise the discriminator's loss (appendix F).

    The reward of a sample is the discriminator's loss at it, `-log p` with `p` the probability of the right answer. The
    baseline is `-log sigmoid(baseline_logits)`, trained by cross entropy to match the reward.

    Args:
        logits: the generator's, `[tokens, vocab_size]`.
        sampled: `[tokens]`.
        rewards: `[tokens]`, without a gradient.
        baseline_logits: `[tokens]`.

    Returns:
        The policy's losses `[tokens]`, whose gradient is the policy gradient, and the baseline's `[tokens]`.
    """
    baseline = -F.logsigmoid(baseline_logits.float())
    advantage = (rewards - baseline).detach()
    policy = token_nll(logits, sampled) * advantage
    fit = F.binary_cross_entropy_with_logits(baseline_logits.float(), torch.exp(-rewards), reduction="none")
    return policy, fit
