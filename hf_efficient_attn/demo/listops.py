"""ListOps: nested operations on digits, as many as are wanted and of any length, with their results as labels.

Nangia & Bowman 2018 (https://arxiv.org/abs/1804.06028), with the sizes of Long Range Arena (Tay et al. 2020,
https://arxiv.org/abs/2011.04006): `[MAX 2 9 [MIN 4 7 ] 0 ]` is 9.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def _median(values: list[int]) -> int:
    """Of an even number of values the mean of the two in the middle, rounded down, as published."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


LISTOPS_OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
}
"""Token that begins an operation -> what it makes of its arguments."""

CLOSE = "]"
_NAMES = list(LISTOPS_OPERATORS)
# In the published grammar a place holds an operation with this probability, else a digit.
OPERATION_SHARE = 0.25
# So many draws without a new example, and it is said that there are no more.
DRAWS_IN_VAIN = 200_000


class ListOpsExample(NamedTuple):
    """One expression.

    Args:
        tokens: digits, operators and closing brackets.
        label: its value, 0 to 9.
    """

    tokens: tuple[str, ...]
    label: int


def draw_listops(
    min_length: int = 500, max_length: int = 2000, *, seed: int = 0, max_depth: int = 10, max_args: int = 10
) -> Iterator[ListOpsExample]:
    """Expressions without end, no two of them equal; the first ones of a seed are always the same.

    A place of the expression holds a digit, or with probability 1/4, above `max_depth`, an operation on 2 to `max_args`
    places; digits, operators and numbers of arguments are uniform. Expressions outside the lengths are dropped.

    Args:
        min_length: tokens of the shortest one.
        max_length: tokens of the longest one.
        seed: of a random generator of its own.
        max_depth: levels, that of the digits included.
        max_args: most arguments of an operation.

    Raises:
        ValueError: numbers out of range; lengths of which there are no expressions, or no more.
    """
    if not 1 <= min_length <= max_length:
        raise ValueError(f"lengths are {min_length} to {max_length}: give 1 or more, the shortest first.")
    if max_depth < 1 or max_args < 2:
        raise ValueError(f"max_depth is {max_depth} and max_args {max_args}: give 1 and 2, or more.")
    # A generator function of its own, so that what is wrong raises at the call and not at the first draw.
    return _distinct(min_length, max_length, seed, max_depth, max_args)


def _distinct(shortest: int, longest: int, seed: int, max_depth: int, max_args: int) -> Iterator[ListOpsExample]:
    random, seen, in_vain = Random(seed).random, set(), 0
    while in_vain < DRAWS_IN_VAIN:
        tokens: list[str] = []
        label = _draw(random, tokens, longest, max_depth, max_args)
        in_vain += 1
        if label is None or len(tokens) < shortest:
            continue
        digest = hashlib.blake2b(" ".join(tokens).encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            in_vain = 0
            yield ListOpsExample(tuple(tokens), label)
    raise ValueError(
        f"no new expression of {shortest} to {longest} tokens in {DRAWS_IN_VAIN:,} draws, after {len(seen):,}; give a "
        "wider range of lengths, or ask for fewer."
    )


def _draw(random: Callable[[], float], tokens: list[str], longest: int, depth: int, max_args: int) -> int | None:
    """Append an expression of at most `depth` levels to `tokens`; its value, or None once it is too long."""
    if len(tokens) >= longest:
        return None
    # Not through the generator's other methods: only `random` gives the same numbers in every version of Python.
    if depth == 1 or random() >= OPERATION_SHARE:
        digit = int(10 * random())
        tokens.append(str(digit))
        return digit
    name = _NAMES[int(len(_NAMES) * random())]
    tokens.append(name)
    values = []
    for _ in range(2 + int((max_args - 1) * random())):
        value = _draw(random, tokens, longest, depth - 1, max_args)
        if value is None:
            return None
        values.append(value)
    tokens.append(CLOSE)
    return None if len(tokens) > longest else LISTOPS_OPERATORS[name](values)


def listops_tokenizer(max_length: int = 2001) -> PreTrainedTokenizerFast:
    """One id a token, `[CLS]` before each expression; reads `" ".join(example.tokens)`.

    Args:
        max_length: becomes `model_max_length`, where truncation cuts.
    """
    words = ["[PAD]", "[UNK]", "[CLS]", *map(str, range(10)), *LISTOPS_OPERATORS, CLOSE]
    ids = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", ids["[CLS]"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
    )
