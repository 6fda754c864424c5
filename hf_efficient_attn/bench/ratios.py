"""Ratios between cases of one run, and whether they are what they should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .cases import OK, Result, describe_global_tokens
from .kinds import KINDS
from .report import MODE_NAMES


@dataclass(frozen=True)
class Comparison:
    """A ratio to be formed, and what it should be.

    Args:
        quantity: "speed" (the other's time over this kind's), "time" or "memory" (this kind's over the other's).
        mode: "forward" or "train".
        length: tokens.
        kind: a key of `KINDS`.
        other: the kind it is compared with; the same kind with `other_length`.
        other_length: tokens of the other; None for the same.
        at_least, at_most: the target, where there is one.
        goal: what is hoped for beyond it; only told.
    """

    quantity: str
    mode: str
    length: int
    kind: str
    other: str
    other_length: int | None = None
    at_least: float | None = None
    at_most: float | None = None
    goal: float | None = None

    @property
    def target(self) -> str:
        """The target in words; empty if there is none."""
        bounds = [("at least", self.at_least), ("at most", self.at_most)]
        text = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        return text + (f" (goal {self.goal:g})" if text and self.goal is not None else "")

    def met_by(self, value: float) -> bool:
        """Whether a ratio is within the target."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


def ratio_lines(results: Sequence[Result], comparisons: Iterable[Comparison], *, targets: bool = True) -> list[str]:
    """One line a ratio, of medians, with the target and whether it is met; none for what was not measured.

    A line begins with the kind where several are compared. One with global tokens is compared once for each choice of
    them, with the same choice where the other has it. Times of one length also give the range of the ratio over the
    turns, in which both ran one after the other.

    Args:
        results: of one run and one model size.
        comparisons: the ratios to form.
        targets: also say what they should be.
    """
    lines, comparisons = [], list(comparisons)
    several = len({comparison.kind for comparison in comparisons}) > 1
    for comparison in comparisons:
        for mine in _find(results, comparison.kind, comparison.mode, comparison.length):
            chosen = mine.case.global_tokens
            others = _find(results, comparison.other, comparison.mode, comparison.other_length or comparison.length)
            has_choice = KINDS[comparison.other].global_tokens
            for other in (o for o in others if not has_choice or o.case.global_tokens == chosen):
                whose = f"{comparison.kind}, " if several else ""
                lines.append(whose + _line(comparison, mine, other, targets))
    return lines


def _find(results: Sequence[Result], kind: str, mode: str, length: int) -> list[Result]:
    return [r for r in results if (r.case.kind, r.case.mode, r.case.length) == (kind, mode, length)]


def _line(comparison: Comparison, mine: Result, other: Result, targets: bool) -> str:
    case = mine.case
    what = [MODE_NAMES[case.mode], f"{case.length:,} tokens"]
    if case.global_tokens is not None and KINDS[case.kind].global_tokens:
        what.append(describe_global_tokens(case.global_tokens))
    over = comparison.other if comparison.other_length is None else f"that at {comparison.other_length:,} tokens"
    text = f"{', '.join(what)}: {comparison.quantity} over {over} "
    value = _value(comparison.quantity, mine, other)
    if value is None:
        stopped = next((result for result in (mine, other) if result.status != OK), None)
        reason = "not known here" if stopped is None else f"{stopped.case.kind} {stopped.verdict}"
        return f"{text}- ({reason})"
    text += f"{value:.2f}"
    if comparison.quantity != "memory" and comparison.other_length is None:
        turns = [
            _value(comparison.quantity, replace(mine, seconds=[a]), replace(other, seconds=[b]))
            for a, b in zip(mine.seconds, other.seconds, strict=False)
        ]
        # Of other numbers of runs the medians are not those of the turns.
        whole = len(turns) > 1 and len(mine.seconds) == len(other.seconds)
        text += f" ({min(turns):.2f} - {max(turns):.2f})" if whole else ""
    if not targets or not comparison.target:
        return text
    return f"{text}; {comparison.target}: {'met' if comparison.met_by(value) else 'not met'}"


def _value(quantity: str, mine: Result, other: Result) -> float | None:
    if mine.status != OK or other.status != OK:
        return None
    if quantity == "memory":
        pair = mine.peak_bytes, other.peak_bytes
    else:
        pair = (other.median, mine.median) if quantity == "speed" else (mine.median, other.median)
    return pair[0] / pair[1] if pair[0] is not None and pair[1] else None
