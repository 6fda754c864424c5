"""What the measurements look like: tables, a csv file, a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import OK, Case, Result
from .crossover import find_crossovers
from .memory import MIB
from .models import NEW_TOKENS


if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MODE_NAMES = {"forward": "forward pass", "train": "training step", "generate": f"{NEW_TOKENS} new tokens"}
_GENERATION = f"{NEW_TOKENS} new tokens behind a text"


def _columns(mode: str) -> tuple[str, ...]:
    memory = "cache MiB" if mode == "generate" else "peak MiB"
    return ("tokens", "model", "median s (min - max)", "x", memory, "x")


def _title(mode: str) -> str:
    if mode == "generate":
        return f"Time of {_GENERATION}, memory of the cache"
    return f"Time and peak memory of one {MODE_NAMES[mode]}"


def describe(result: Result) -> str:
    """One line: what was measured and what came out."""
    what = f"{result.case.label}, {result.case.length:,} tokens, {MODE_NAMES[result.case.mode]}"
    if result.median is None:
        return f"{what}: {result.verdict} ({result.detail})"
    return f"{what}: {_seconds(result)} s, {_mebibytes(result)} MiB"


def print_tables(results: Sequence[Result], console: Console | None = None) -> None:
    """Print one table a mode, with one row a case; ratios are to the first model measured at that length.

    Args:
        results: what `run_cases` returned.
        console: where to; by default standard output.
    """
    from rich.console import Console

    console = console or Console()
    for mode in MODE_NAMES:
        chosen = sorted((r for r in results if r.case.mode == mode), key=lambda result: result.case.length)
        if chosen:
            console.print(_table(chosen, mode))
            for line in crossover_lines(chosen):
                console.print(line, highlight=False, soft_wrap=True)
            console.print()


def _table(results: Sequence[Result], mode: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=_title(mode),
        caption=_caption(results),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
        show_edge=False,
    )
    for column in _columns(mode):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for index, result in enumerate(results):
        last = index + 1 == len(results) or results[index + 1].case.length != result.case.length
        table.add_row(*_cells(result, results), end_section=last)
    return table


def markdown_tables(results: Sequence[Result]) -> str:
    """The tables of `print_tables` as Markdown."""
    lines: list[str] = []
    for mode, name in MODE_NAMES.items():
        chosen = sorted((r for r in results if r.case.mode == mode), key=lambda result: result.case.length)
        if chosen:
            heading = _GENERATION if mode == "generate" else f"One {name}"
            lines += [f"### {heading}", "", f"| {' | '.join(_columns(mode))} |"]
            lines += ["| ---: | --- | ---: | ---: | ---: | ---: |"]
            lines += [f"| {' | '.join(_cells(result, chosen))} |" for result in chosen]
            lines += ["", f"{_caption(chosen)}.", "", *(f"- {line}" for line in crossover_lines(chosen)), ""]
    return "\n".join(lines)


def crossover_lines(results: Sequence[Result]) -> list[str]:
    """For each mode and series from what length on it is quicker than the quadratic baseline, if there is one."""
    labels = _labels(results)
    return [f"{MODE_NAMES[mode]}: {x.describe(labels)}" for mode in MODE_NAMES for x in find_crossovers(results, mode)]


def _caption(results: Sequence[Result]) -> str:
    return f"x: times that of {_labels(results)[results[0].case.series]} at the same length"


def _cells(result: Result, results: Sequence[Result]) -> tuple[str, ...]:
    """One row: length, model, time and its ratio, memory and its ratio to the first of `results` at that length."""
    length = result.case.length
    first = next(other for other in results if other.case.length == length)
    cells = (f"{length:,}" if result is first else "", _labels(results)[result.case.series])
    if result.median is None:
        return (*cells, result.verdict, "", "", "")
    ratios = _ratio(result.median, first.median), _ratio(result.peak_bytes, first.peak_bytes)
    return (*cells, _seconds(result), ratios[0], _mebibytes(result), ratios[1])


def write_csv(results: Sequence[Result], path: str | Path) -> Path:
    """Write one row a case: its settings, its status, times in seconds, memory in bytes.

    Returns:
        The path.
    """
    path = Path(path)
    rows = [_row(result) for result in results]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def plot(results: Sequence[Result], path: str | Path, title: str = "") -> Path:
    """Draw time and peak memory over length, one row a mode, and save it as an image.

    A cross marks from where on a series is quicker than the quadratic baseline; cases past the bounds are listed in a
    corner.

    Returns:
        The path.

    Raises:
        ValueError: matplotlib is not installed.
    """
    from ..extras import require_extras

    require_extras("matplotlib")
    # Not through pyplot: that would choose a backend for the whole program.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    modes = [mode for mode in MODE_NAMES if any(result.case.mode == mode for result in results)]
    figure = Figure(figsize=(10, 0.6 + 3.6 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(modes), 2, squeeze=False)
    for row, mode in enumerate(modes):
        chosen = [result for result in results if result.case.mode == mode]
        _draw(axes[row][0], chosen, f"{MODE_NAMES[mode]}: time", "seconds (bar: min to max)", _time_point)
        _mark_crossovers(axes[row][0], chosen)
        words = ("cache", "MiB") if mode == "generate" else ("peak memory", "MiB above the built model")
        _draw(axes[row][1], chosen, f"{MODE_NAMES[mode]}: {words[0]}", words[1], _memory_point)
    axes[0][0].legend(fontsize="small")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return path


def _draw(axis: Any, results: Sequence[Result], title: str, unit: str, point: Any) -> None:
    axis.set(xscale="log", yscale="log", title=title, xlabel="tokens", ylabel=unit)
    lengths = sorted({result.case.length for result in results})
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xticks([], minor=True)
    axis.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
    # Limits are set below: matplotlib's own choice warns where all values are equal.
    axis.set_autoscale_on(False)
    axis.grid(True, alpha=0.3)
    drawn: list[float] = []
    notes: list[str] = []
    for index, (series, label) in enumerate(_labels(results).items()):
        members = [result for result in results if result.case.series == series]
        points = [(result.case.length, *point(result)) for result in members if result.status == OK and point(result)]
        errors = [[middle - low for _, middle, low, _ in points], [high - middle for _, middle, _, high in points]]
        lines = {"marker": "o", "capsize": 3, "color": f"C{index}", "label": label}
        axis.errorbar([p[0] for p in points], [p[1] for p in points], yerr=errors, **lines)
        drawn += [value for p in points for value in p[2:]]
        notes += [f"{label} at {r.case.length:,}: {r.verdict}" for r in members if r.status != OK]
    if drawn:
        axis.set_ylim(min(drawn) / 2, max(drawn) * 2)
    # Curves rise to the right, so this corner is free.
    axis.text(0.98, 0.03, "\n".join(notes), transform=axis.transAxes, fontsize="x-small", ha="right", va="bottom")


def _mark_crossovers(axis: Any, results: Sequence[Result]) -> None:
    colors = {series: f"C{index}" for index, series in enumerate(_labels(results))}
    for crossover in find_crossovers(results, results[0].case.mode):
        if crossover.length is not None and not crossover.everywhere:
            place = {"color": colors[crossover.series], "markeredgecolor": "black", "zorder": 5}
            axis.plot([crossover.length], [crossover.seconds], marker="X", markersize=9, linestyle="", **place)


def _time_point(result: Result) -> tuple[float, float, float] | None:
    return None if result.median is None else (result.median, min(result.seconds), max(result.seconds))


def _memory_point(result: Result) -> tuple[float, float, float] | None:
    # A logarithmic axis has no zero: a pass that stayed within what the process already had is drawn at 0.1 MiB.
    value = None if result.peak_bytes is None else max(result.peak_bytes / MIB, 0.1)
    return None if value is None else (value, value, value)


def _row(result: Result) -> dict[str, object]:
    case = result.case.to_json()
    size = case.pop("size")
    timed = result.status == OK and bool(result.seconds)
    return {
        **case,
        **size,
        "status": result.status,
        "predicted": result.predicted,
        "runs": len(result.seconds) if timed else 0,
        "seconds_median": result.median,
        "seconds_min": min(result.seconds) if timed else None,
        "seconds_max": max(result.seconds) if timed else None,
        "peak_bytes": result.peak_bytes if timed else None,
        "detail": result.detail,
    }


def _labels(results: Sequence[Result]) -> dict[Case, str]:
    # Window and global tokens only where they tell two series of a kind apart: tables are narrow.
    labels = {}
    for series in (result.case.series for result in results):
        others = [result.case for result in results if result.case.kind == series.kind]
        windows, chosen = ({other.size.attention_window for other in others}, {o.global_tokens for o in others})
        labels[series] = series.label_with(window=len(windows) > 1, global_tokens=len(chosen) > 1)
    return labels


def _ratio(value: float | None, first: float | None) -> str:
    return f"{value / first:.2f}" if value is not None and first else ""


def _seconds(result: Result) -> str:
    """Median and spread, all with the decimals that give the median three digits, down to 0.1 ms."""
    decimals = min(max(2 - math.floor(math.log10(result.median)), 0), 4)
    median, low, high = (f"{s:.{decimals}f}" for s in (result.median, min(result.seconds), max(result.seconds)))
    return f"{median} ({low} - {high})"


def _mebibytes(result: Result) -> str:
    if result.peak_bytes is None:
        return "?"
    value = result.peak_bytes / MIB
    return f"{value:.2g}" if 0.01 <= value < 10 else f"{value:,.0f}"
