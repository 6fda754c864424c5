"""What a classifier has to beat: the most frequent label, and a linear model on token counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def majority_accuracy(eval_labels: Sequence[int]) -> float:
    """Accuracy of always answering the most frequent of these held-out labels: the best that a constant can do."""
    return Counter(eval_labels).most_common(1)[0][1] / len(eval_labels)


def bag_of_tokens_accuracy(
    train_ids: Sequence[Sequence[int]],
    train_labels: Sequence[int],
    eval_ids: Sequence[Sequence[int]],
    eval_labels: Sequence[int],
    vocab_size: int,
) -> float:
    """Held-out accuracy of scikit-learn's logistic regression on log(1 + count of each token), order ignored.

    Args:
        train_ids, eval_ids: the token ids of each document; the same documents that the model sees.
        train_labels, eval_labels: their label ids.
        vocab_size: tokens in all.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    from hf_efficient_attn.bench import require_extras

    require_extras("sklearn")
    from sklearn.linear_model import LogisticRegression

    # The logarithm is the stronger baseline: with plain counts a few frequent tokens decide.
    model = LogisticRegression(max_iter=2000).fit(_log_counts(train_ids, vocab_size), train_labels)
    return float(model.score(_log_counts(eval_ids, vocab_size), eval_labels))


def _log_counts(documents: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    return np.stack([np.log1p(np.bincount(ids, minlength=vocab_size)) for ids in documents]).astype(np.float32)
