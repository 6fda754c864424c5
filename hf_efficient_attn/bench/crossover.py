"""Where one kind of model becomes quicker than another: from lengths that were measured, interpolated between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .cases import Case, Result
from .kinds import KINDS


# What is less quicker than this may be noise.
_MARGIN = 0.98


@dataclass(frozen=True)
class Crossover:
    """From where on a series is quicker than the baseline, by 2 % at least, as far as was measured.

    Args:
        series: the case without its length.
        baseline: likewise.
        length: tokens; None if it is not quicker at the longest length measured of both.
        seconds: what the series takes there.
        everywhere: it is quicker at every length measured, of which `length` is the shortest.
    """

    series: Case
    baseline: Case
    length: float | None
    seconds: float | None = None
    everywhere: bool = False

    def describe(self, labels: Mapping[Case, str]) -> str:
        """Who is quicker than whom, from where on; `labels` name the series."""
        name, other = labels[self.series], labels[self.baseline]
        if self.length is None:
            return f"{name} is not quicker than {other} at the longest text measured of both"
        if self.everywhere:
            return f"{name} is quicker than {other} at every length measured, from {self.length:,.0f} tokens on"
        return f"{name} is quicker than {other} from about {_rounded(self.length):,} tokens on"


def find_crossovers(results: Sequence[Result], mode: str) -> list[Crossover]:
    """One for each series that shares a length with the baseline, which is BERT, or the first quadratic kind."""
    times: dict[Case, dict[int, float]] = {}
    for result in results:
        if result.case.mode == mode and result.median is not None:
            times.setdefault(result.case.series, {})[result.case.length] = result.median
    quadratic = sorted((series for series in times if KINDS[series.kind].quadratic), key=lambda x: x.kind != "bert")
    baseline = quadratic[0] if quadratic else None
    if baseline is None:
        return []
    others = (series for series in times if series != baseline and times[series].keys() & times[baseline].keys())
    return [_crossover(series, baseline, times[series], times[baseline]) for series in others]


def _crossover(series: Case, baseline: Case, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Crossover:
    lengths = sorted(ours.keys() & theirs.keys())
    ratios = {length: math.log(ours[length] / (theirs[length] * _MARGIN)) for length in lengths}
    slower = [length for length in lengths if ratios[length] >= 0]
    if not slower:
        return Crossover(series, baseline, lengths[0], ours[lengths[0]], everywhere=True)
    if slower[-1] == lengths[-1]:
        return Crossover(series, baseline, None)
    low, high = slower[-1], lengths[lengths.index(slower[-1]) + 1]
    # Times are powers of the length, so lines on logarithmic axes, as the plots have them.
    share = ratios[low] / (ratios[low] - ratios[high])

    def between(first: float, second: float) -> float:
        return math.exp(math.log(first) + share * (math.log(second) - math.log(first)))

    return Crossover(series, baseline, between(low, high), between(ours[low], ours[high]))


def _rounded(length: float) -> int:
    """To two digits, which is more than an interpolation knows."""
    step = 10 ** max(0, math.floor(math.log10(length)) - 1)
    return round(length / step) * step
