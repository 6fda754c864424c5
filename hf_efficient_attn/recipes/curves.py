"""The curves of a training run, as a table and as a picture."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def save_curves(history: Sequence[dict[str, Any]], folder: str | Path, figures: Sequence[str] = ("loss",)) -> None:
    """Write `training.csv`, and where matplotlib is installed `training.png`.

    Args:
        history: `log_history` of a Trainer's state. A figure `x` of the training stands there as `x`, of the evaluation
            as `eval_x`.
        folder: where to write.
        figures: names of figures, a panel each; one that was never logged is left out.
    """
    folder = Path(folder)
    names = ["step", "epoch", "learning_rate", *dict.fromkeys(x for name in figures for x in (name, f"eval_{name}"))]
    rows = [entry for entry in history if any(name in entry for name in names[3:])]
    with (folder / "training.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("matplotlib") is None:
        print('No training.png: matplotlib is not installed (pip install "hf_efficient_attn[demo]").')
        return
    # Not through pyplot: that would choose a backend for the whole program.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sides = {"training": "", "held out": "eval_"}
    drawn = [name for name in figures if any(front + name in row for row in rows for front in sides.values())]
    figure = Figure(figsize=(4 * max(1, len(drawn)), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, max(1, len(drawn)), squeeze=False)[0], drawn, strict=False):
        for label, front in sides.items():
            points = [(row["step"], row[front + name]) for row in rows if front + name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if front else None)
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(folder / "training.png", dpi=120)
