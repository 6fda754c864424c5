"""From start and end logits to answers; `QuestionAnswerer` documents the formula."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Passage:
    """One input of the model: a question and a part of the context."""

    inputs: dict[str, list[int]]  # of the model, `length` each
    at: np.ndarray  # [tokens], where its context tokens stand among them
    first: int  # which token of the whole context the first of these is
    offsets: np.ndarray  # [tokens, 2], their characters in the context
    has_null: bool  # the input begins with a special token


def best_answers(
    context: str,
    windows: list[Passage],
    logits: list[np.ndarray],
    top_k: int,
    longest: int,
    allow_no_answer: bool,
) -> list[dict[str, Any]]:
    """The `top_k` best different answers of at most `longest` tokens, as `QuestionAnswerer` returns and scores them.

    Args:
        context: the text.
        windows: its windows in order.
        logits: start and end logits of each, `[2, length]` float64.
        top_k, longest, allow_no_answer: see `QuestionAnswerer`.

    Raises:
        ValueError: no token of the context has a character, or a logit is NaN.
    """
    best = np.full((2, windows[-1].first + len(windows[-1].at)), -np.inf)  # of each token of the context
    inside = []
    for window, values in zip(windows, logits, strict=True):
        # A token without characters neither begins nor ends an answer.
        inside.append(np.where(window.offsets[:, 0] < window.offsets[:, 1], values[:, window.at], -np.inf))
        seen = best[:, window.first : window.first + len(window.at)]
        np.maximum(seen, inside[-1], out=seen)
    if best.size == 0 or best.max() == -np.inf:
        raise ValueError(f"the tokenizer finds no token in the context {context[:40]!r}; give a context with words.")
    if np.isnan(best).any():
        raise ValueError(
            "the model's start or end logits are NaN; load it in a wider dtype, such as dtype=torch.float32."
        )
    null = min((values[:, 0] for values in logits), key=sum) if windows[0].has_null else np.full(2, -np.inf)
    normaliser = np.logaddexp.reduce(np.column_stack([best, null]), axis=1)
    no_answer = float((null - normaliser).sum())
    scores: dict[tuple[int, int], float] = {}  # span -> log of its score
    words = _word_borders(context)
    for window, values in zip(windows, inside, strict=True):
        for span, score in _best_spans(values - normaliser[:, None], window.offsets, words, top_k, longest):
            scores[span] = max(score, scores.get(span, score))
    if allow_no_answer and windows[0].has_null:
        scores[0, 0] = no_answer
    return [
        {
            "answer": context[start:end],
            "score": math.exp(score),
            "start": start,
            "end": end,
            "no_answer_score": math.exp(no_answer),
        }
        for (start, end), score in sorted(scores.items(), key=lambda item: -item[1])[:top_k]
    ]


def _best_spans(
    log_p: np.ndarray, offsets: np.ndarray, words: tuple[np.ndarray, np.ndarray], top_k: int, longest: int
) -> list[tuple[tuple[int, int], float]]:
    """The `top_k` best different spans `(start, end)` of a window, each with the log of its score.

    `log_p` is `[2, tokens]`, `words` as from `_word_borders`. Time and memory: tokens x `longest`.
    """
    tokens = log_p.shape[1]
    # [tokens, lengths]: answers by their first token, and by how many tokens follow it.
    first = np.arange(tokens)[:, None]
    last = first + np.arange(min(longest, tokens))[None]
    first, last = np.broadcast_to(first, last.shape)[last < tokens], last[last < tokens]
    score = log_p[0, first] + log_p[1, last]
    start, end = offsets[first, 0], offsets[last, 1]
    # Without whitespace around it, unless there is nothing else.
    has_words = words[0][start] < words[1][end]
    start, end = np.where(has_words, words[0][start], start), np.where(has_words, words[1][end], end)
    keep = np.flatnonzero((start < end) & (score > -np.inf))
    keep = keep[np.argsort(-score[keep], kind="stable")]
    _, best = np.unique(start[keep] * len(words[0]) + end[keep], return_index=True)
    return [((int(start[i]), int(end[i])), float(score[i])) for i in keep[np.sort(best)[:top_k]]]


def _word_borders(text: str) -> tuple[np.ndarray, np.ndarray]:
    """For each place in `text`, where the next character stands that is no whitespace, and where the last one ends."""
    space = np.array([character.isspace() for character in text])
    place = np.arange(len(text))
    following = np.minimum.accumulate(np.where(space, len(text), place)[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(space, 0, place + 1))
    return np.append(following, len(text)), np.insert(preceding, 0, 0)
