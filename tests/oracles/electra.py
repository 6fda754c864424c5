"""Joint pretraining as its formulas, token by token, in float64 (Clark et al. 2020, arXiv 2003.10555)."""

import math

import torch
from torch import Tensor


def _log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum().log()


def _log_sigmoid(logit: Tensor) -> Tensor:
    return -(1 + (-logit).exp()).log()


def _mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`logits` `[batch, length, vocab]`; the mean over tokens whose label is not -100."""
    losses = []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            if labels[row, place] != -100:
                losses.append(-_log_softmax(logits[row, place].double())[labels[row, place]])
    return _mean(losses)


def detection_loss(logits: Tensor, corrupted: Tensor, original: Tensor, counted: Tensor) -> Tensor:
    """`logits` `[batch, length]`; a token is replaced where it is not the original one. The mean over `counted`."""
    losses = []
    for row in range(original.shape[0]):
        for place in range(original.shape[1]):
            if counted[row, place]:
                logit = logits[row, place].double()
                replaced = bool(corrupted[row, place] != original[row, place])
                losses.append(-_log_sigmoid(logit if replaced else -logit))
    return _mean(losses)


def copy_loss(logits: Tensor, copy_logits: Tensor, corrupted: Tensor, original: Tensor, counted: Tensor) -> Tensor:
    """All-tokens MLM: `D` on the token that was read, `1 - D` on the softmax."""
    losses = []
    for row in range(original.shape[0]):
        for place in range(original.shape[1]):
            if counted[row, place]:
                copied = _log_sigmoid(copy_logits[row, place].double()).exp()
                softmax = _log_softmax(logits[row, place].double()).exp()
                one_hot = torch.zeros_like(softmax)
                one_hot[corrupted[row, place]] = 1.0
                probability = copied * one_hot + (1 - copied) * softmax
                losses.append(-probability[original[row, place]].log())
    return _mean(losses)


def policy_gradient(logits: Tensor, rewards: Tensor, baseline: Tensor) -> Tensor:
    """Gradient of the expected reward minus baseline by `logits` `[vocab]`, exactly: the sum over all samples.

    `rewards` `[vocab]`: what each sample would earn.
    """
    logits = logits.detach().double().requires_grad_()
    probabilities = _log_softmax(logits).exp()
    ((rewards.double() - baseline.double()) * probabilities).sum().backward()
    return logits.grad


def frequencies(logits: Tensor, temperature: float) -> Tensor:
    """`softmax(logits / temperature)`."""
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    return torch.tensor([x / sum(weights) for x in weights], dtype=torch.float64)
