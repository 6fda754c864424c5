"""Figures of an evaluation that need not keep the logits of all tokens."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction


IGNORED = -100


def best_labels(logits: Any, labels: Tensor) -> Tensor:
    """The label with the largest logit, for `preprocess_logits_for_metrics`: `[..., labels]` -> `[...]`."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def token_sums(logits: Any, labels: Tensor, shift: bool = False) -> Tensor:
    """Sums over the tokens of each row, for `preprocess_logits_for_metrics`.

    Args:
        logits: `[batch, length, vocab_size]`, or a tuple that begins with them.
        labels: `[batch, length]`, -100 where nothing is predicted.
        shift: a causal model, whose logits are of the next token.

    Returns:
        `[batch, 3]` float64: minus the sum of log-likelihoods, right predictions, and predictions in all.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    kept = labels != IGNORED
    nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    hits = (logits.argmax(dim=-1) == labels) & kept
    sums = [nll.view_as(labels).double().sum(dim=1), hits.sum(dim=1).double(), kept.sum(dim=1).double()]
    return torch.stack(sums, dim=1)


def token_figures(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for `token_sums`: `nll` (nats a token), `perplexity`, `accuracy` and the number of `tokens`."""
    nll, hits, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    mean = nll / max(tokens, 1.0)
    # A model that has learnt nothing yet may be far beyond what a float can hold.
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"nll": mean, "perplexity": perplexity, "accuracy": hits / max(tokens, 1.0), "tokens": tokens}


def label_f1(found: np.ndarray, wanted: np.ndarray, num_labels: int) -> np.ndarray:
    """F1 of each label over single tokens, `[num_labels]`; NaN for a label that is neither found nor wanted.

    Args:
        found, wanted: label ids of the same tokens, of any shape.
        num_labels: labels in all.
    """
    ids = range(num_labels)
    hits = np.array([np.sum((found == label) & (wanted == label)) for label in ids], dtype=np.float64)
    sizes = np.array([np.sum(found == label) + np.sum(wanted == label) for label in ids], dtype=np.float64)
    return np.divide(2 * hits, sizes, out=np.full(num_labels, np.nan), where=sizes > 0)


def answer_scores(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of answers, as SQuAD counts them.

    Answers are compared without case, punctuation and the articles a, an and the; F1 is that of their words. Of several
    right answers the nearest counts; no right answer means that `""` is right.

    Args:
        found: an answer each.
        wanted: the right answers of each.

    Source: Rajpurkar, Zhang, Lopyrev & Liang 2016, "SQuAD", https://arxiv.org/abs/1606.05250.
    """
    exact, f1 = [], []
    for answer, options in zip(found, wanted, strict=True):
        ours = _words(answer)
        theirs = [_words(option) for option in options] or [[]]
        exact.append(float(ours in theirs))
        f1.append(max(_overlap(ours, option) for option in theirs))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
