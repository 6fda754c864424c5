"""The long end: 1,048,576 tokens forward, and training steps at 65,536, one process a case.

    python benchmarks/long_end.py                            # everything, about 45 minutes on two cores
    python benchmarks/long_end.py --parts forward            # the forward passes alone
    python benchmarks/long_end.py --quick                    # a trial run with a small model and short texts

Two layers of base size (hidden size 768, 12 heads, feed-forward 3,072, vocabulary 30,522, window 512, 64 landmarks, 256
features), float32, one text.

- forward: the base model's last hidden state, from 8,192 to 1,048,576 tokens. Seconds and memory a token, above the
  loaded model, and how far they are from those at 8,192. The position table, which is part of the loaded model and
  grows with the length, is told apart.
- train: one step with AdamW and dropout 0.1 of states and attention (Performer has it of states alone) at 65,536
  tokens: sequence classification and masked language modelling (`skip_logits=True`), the second step of a process.
- deep: the same with twelve layers and gradient checkpointing, masked language modelling, the first step.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hf_efficient_attn.bench import (
    BASE,
    GIB,
    KINDS,
    MIB,
    Bounds,
    Case,
    ModelSize,
    Result,
    check_out,
    environment_line,
    memory_bound,
    run_cases,
    run_script,
    split_names,
    split_numbers,
)


FAMILIES = ("eff_longformer", "eff_nystromformer", "eff_performer")
PARTS = ("forward", "train", "deep")
LAYERS = 12
QUICK = ModelSize(64, 2, 2, 256, 4096, attention_window=64)
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def forward_cases(kinds: Sequence[str], lengths: Sequence[int], size: ModelSize) -> list[Case]:
    """Base models, forward."""
    return [
        Case(kind, length, "forward", _size_of(kind, size), task="base") for length in sorted(lengths) for kind in kinds
    ]


def train_cases(kinds: Sequence[str], length: int, size: ModelSize) -> list[Case]:
    """Whole training steps."""
    cases = []
    for kind in kinds:
        own = _size_of(kind, size)
        common = {"length": length, "mode": "train", "optimizer": "adamw"}
        cases += [Case(kind, size=own, task=task, **common) for task in ("classification", "masked_lm")]
    return cases


def deep_cases(kinds: Sequence[str], length: int, size: ModelSize) -> list[Case]:
    """Whole training steps of twelve layers."""
    common = {"length": length, "mode": "train", "optimizer": "adamw", "task": "masked_lm", "checkpointing": True}
    return [Case(kind, size=replace(_size_of(kind, size), num_layers=LAYERS), **common) for kind in kinds]


def _size_of(kind: str, size: ModelSize) -> ModelSize:
    if kind not in KINDS:
        raise ValueError(f"--kinds has {kind!r}, which is not known: pass some of {', '.join(KINDS)}.")
    return size if KINDS[kind].windowed else replace(size, attention_window=None)


def table(results: Sequence[Result]) -> list[str]:
    """Rows as Markdown: what, seconds, seconds and memory a token, memory of the process, the position table."""
    lines = ["| tokens | model | s | us a token | peak MiB | KiB a token | process GiB | of it positions MiB |"]
    lines.append(f"| ---: | --- |{' ---: |' * 6}")
    for result in results:
        case = result.case
        what = f"| {case.length:,} | {_name(case)} |"
        if result.median is None or result.peak_bytes is None or result.base_bytes is None:
            lines.append(f"{what} {result.verdict} | | | | | |")
            continue
        positions = (case.length + KINDS[case.kind].extra_positions) * case.size.hidden_size * 4
        cells = [
            f"{result.median:.2f}",
            f"{result.median / case.length * 1e6:.0f}",
            f"{result.peak_bytes / MIB:,.0f}",
            f"{result.peak_bytes / case.length / 1024:.1f}",
            f"{(result.base_bytes + result.peak_bytes) / GIB:.1f}",
            f"{positions / MIB:,.0f}",
        ]
        lines.append(f"{what} {' | '.join(cells)} |")
    return lines


def _name(case: Case) -> str:
    if case.mode == "forward":
        return case.kind
    extra = ", gradient checkpointing" if case.checkpointing else ""
    return f"{case.kind}, {case.size.num_layers} layers, {case.task}{extra}"


def flatness(results: Sequence[Result]) -> list[str]:
    """For each kind how time and memory a token at the longest text compare with those at the shortest."""
    lines = []
    for kind in dict.fromkeys(result.case.kind for result in results):
        own = [r for r in results if r.case.kind == kind and r.median is not None and r.peak_bytes]
        if len(own) < 2:
            continue
        ratios = [
            (last / own[-1].case.length) / (first / own[0].case.length)
            for first, last in ((own[0].median, own[-1].median), (own[0].peak_bytes, own[-1].peak_bytes))
        ]
        span = f"{own[-1].case.length:,} over {own[0].case.length:,} tokens"
        lines.append(f"- {kind}, a token, {span}: time {ratios[0]:.2f}, memory {ratios[1]:.2f}")
    return lines


def _measure(cases: Sequence[Case], bounds: Bounds, repeats: int, warmup: int) -> list[Result]:
    # One at a time: several loaded models of a million positions would not leave room for one that runs.
    results = []
    for case in cases:
        results += run_cases([case], bounds, repeats=repeats, warmup=warmup, case_seconds=60.0, passive_threads=False)
        typer.echo(table(results)[-1], err=True)
    return results


@app.command()
def main(
    parts: Annotated[str, typer.Option(help="Some of forward, train and deep.")] = ",".join(PARTS),
    kinds: Annotated[str, typer.Option(help="Model kinds, separated by commas.")] = ",".join(FAMILIES),
    lengths: Annotated[str | None, typer.Option(help="Tokens, forward; default: 8192,65536,1048576.")] = None,
    train_length: Annotated[int | None, typer.Option(help="Tokens of the training steps; default: 65536.")] = None,
    max_seconds: Annotated[float, typer.Option(help="Bound for one pass or step.")] = 900.0,
    max_memory_gib: Annotated[
        float | None, typer.Option(help="Bound for one process; default: 80 % of the free memory.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A trial run: a small model, short texts.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .md file for the results.")] = None,
) -> None:
    """Measure the longest texts."""
    chosen, names = split_names(parts), split_names(kinds)
    for part in chosen:
        if part not in PARTS:
            raise ValueError(f"--parts has {part!r}, which is not known: pass some of {', '.join(PARTS)}.")
    check_out([out])
    size, bounds = QUICK if quick else BASE, Bounds(max_seconds, memory_bound(max_memory_gib))
    tokens = split_numbers("lengths", lengths or ("512,4096" if quick else "8192,65536,1048576"))
    lines = [f"{'A small model' if quick else 'Base size'}, float32, one text, one process a case.", ""]
    if "forward" in chosen:
        cases = forward_cases(names, tokens, size)
        # The longest ones run once and without a warm-up, of which each takes minutes.
        results = _measure([c for c in cases if c.length < 2**18], bounds, 3, 1)
        results += _measure([c for c in cases if c.length >= 2**18], bounds, 1, 0)
        lines += ["### Forward, last hidden state", "", *table(results), "", *flatness(results), ""]
    if "train" in chosen:
        cases = train_cases(names, train_length or (1024 if quick else 65536), size)
        # A second step has AdamW's state already, as all later ones have.
        results = _measure(cases, bounds, 1, 1)
        lines += ["### One training step with AdamW, dropout 0.1", "", *table(results), ""]
    if "deep" in chosen:
        cases = deep_cases(names, train_length or (1024 if quick else 65536), size)
        results = _measure(cases, bounds, 1, 0)
        lines += ["### The same with twelve layers and gradient checkpointing, first step", "", *table(results), ""]
    lines.append(environment_line("python benchmarks/long_end.py", sys.argv[1:]))
    typer.echo("\n".join(lines))
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run_script(app)
