"""What the shorter lengths of a series say about a longer one, so that hopeless cases are not started."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .cases import OK, OVER_MEMORY, OVER_TIME, Bounds, Case, Result
from .kinds import KINDS
from .memory import MIB


def predict(case: Case, earlier: Iterable[Result], bounds: Bounds) -> Result | None:
    """A result for a case that is not worth starting, from shorter cases of its series; None if it is to be started."""
    series = [r for r in earlier if r.case.series == case.series and r.case.length < case.length]
    series.sort(key=lambda result: result.case.length)
    over = [result for result in series if result.status in (OVER_MEMORY, OVER_TIME)]
    if over:
        detail = f"{over[-1].verdict} at {over[-1].case.length:,} tokens already"
        return Result(case, over[-1].status, predicted=True, detail=detail)
    # An example's share: longer ones may come in smaller batches.
    memory = [
        (r.case.length, r.peak_bytes / r.case.batch_size) for r in series if r.status == OK and r.peak_bytes is not None
    ]
    if memory and case.device == "cpu":  # a GPU says itself when it has no more
        needed = (series[-1].base_bytes or 0) + extrapolate(memory, case) * case.batch_size
        if needed > bounds.memory_bytes:
            detail = f"about {needed / MIB:,.0f} MiB predicted, bound {bounds.memory_bytes / MIB:,.0f} MiB"
            return Result(case, OVER_MEMORY, predicted=True, detail=detail)
    # The quickest run is the one that noise touched least.
    times = [(r.case.length, min(r.seconds) / r.case.batch_size) for r in series if r.status == OK and r.seconds]
    if times:
        seconds = extrapolate(times, case) * case.batch_size
        if seconds > bounds.seconds:
            detail = f"about {seconds:,.0f} s predicted, bound {bounds.seconds:,.0f} s"
            return Result(case, OVER_TIME, predicted=True, detail=detail)
    return None


def extrapolate(points: Sequence[tuple[int, float]], case: Case) -> float:
    """What `points` of (length, value), the longest last, say about the longer `case`.

    Generation is a token's work: of linear kinds the same at any length, of quadratic ones at most in proportion.
    Otherwise linear kinds grow in proportion from the last point. Quadratic kinds follow `b L + c L^2`, because the
    linear part still counts at short lengths: through the last two points (neither part negative), or through the only
    one with the shares of a Transformer layer's multiplications, `L (2 hidden + intermediate)` to `L^2`.
    """
    last, value = points[-1]
    length, size = case.length, case.size
    if case.mode == "generate":
        return value * (length / last if KINDS[case.kind].quadratic else 1.0)
    if not KINDS[case.kind].quadratic:
        return value * length / last
    if len(points) == 1:
        linear = 2 * size.hidden_size + size.intermediate_size
        return value * length * (length + linear) / (last * (last + linear))
    before, lower = points[-2]
    c = (value / last - lower / before) / (last - before)
    c = min(max(c, 0.0), value / last**2)
    return (value / last - c * last) * length + c * length**2
