"""EffLongformer against transformers' Longformer, BERT and ModernBERT: time and peak memory of base-size layers.

    python benchmarks/longformer.py                                    # the whole table, about 20 minutes on two cores
    python benchmarks/longformer.py --lengths 4096 --out results.md    # a part of it, also into a file
    python benchmarks/longformer.py --quick                            # a trial run with a small model

Two layers, hidden size 768, 12 heads, feed-forward 3,072, total window 512, batch 1, float32. First it checks that
models that should be equal are, with equal weights; if they are not, it ends there. Each case then runs in a process of
its own, and cases of one length take turns, so that noise hits all of them. Needs the extra `demo`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hf_efficient_attn.bench import (
    KINDS,
    MIB,
    MODES,
    Bounds,
    Case,
    Comparison,
    ModelSize,
    Result,
    check_outputs,
    describe,
    environment_line,
    make_cases,
    markdown_tables,
    memory_bound,
    print_tables,
    ratio_lines,
    require_extras,
    run_cases,
    split_names,
    split_numbers,
    write_csv,
)


OURS, IN_TREE, BERT, MODERN = "eff_longformer", "longformer", "bert", "modernbert"
BASE = ModelSize(768, 2, 12, 3072, 30522, attention_window=512)
SMALL = ModelSize(64, 2, 2, 256, 4096, attention_window=64)
LENGTHS, QUICK_LENGTHS = "1024,2048,4096,16384", "1024,4096"
GLOBAL_TOKENS = ("none", "cls")

TARGETS = (
    Comparison("speed", "forward", 4096, OURS, IN_TREE, at_least=1.7, goal=2.0),
    Comparison("speed", "train", 4096, OURS, IN_TREE, at_least=1.5),
    Comparison("memory", "forward", 4096, OURS, IN_TREE, at_most=0.5),
    Comparison("memory", "train", 4096, OURS, IN_TREE, at_most=0.55),
    Comparison("speed", "forward", 4096, OURS, BERT, at_least=1.3),
    Comparison("speed", "train", 4096, OURS, BERT, at_least=3.0),
    *(Comparison("speed", mode, 4096, OURS, MODERN) for mode in MODES),
    *(Comparison("time", mode, 1024, OURS, BERT, at_most=1.15) for mode in MODES),
    *(Comparison("speed", mode, length, OURS, BERT, at_least=1.0) for length in (2048, 16384) for mode in MODES),
    *(Comparison("time", mode, 16384, OURS, OURS, other_length=4096, at_most=4.3) for mode in MODES),
)
NOTES = (
    "Base models without a head. A training step is forward, the backward pass of a mean of the last hidden state, and "
    "plain SGD without momentum, so that it is the model that is measured. Dropout as each config has it by default "
    "(0.1; ModernBERT none). Peak memory is resident memory above that of the built model: activations, and in a "
    "training step gradients too. Ratios are of medians; in parentheses their range over the turns. "
    "Threads wait for each other as PyTorch has it by default."
)

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def _check_files(files: Sequence[Path]) -> None:
    for file in files:
        if file.suffix not in (".csv", ".md") or not file.parent.is_dir():
            raise ValueError(f"--out is {file}, but it has to be a .csv or .md file in a folder that exists.")


def _check_lines(cases: Sequence[Case]) -> list[str]:
    return [
        f"Equal weights, {case.length:,} tokens: {case.label}, differs from {KINDS[case.kind].same_as} by at most "
        f"{difference:.1e}."
        for case, difference in check_outputs(cases)
    ]


def _notes(cases: Sequence[Case]) -> list[str]:
    kinds = dict.fromkeys(case.kind for case in cases)
    return [NOTES, *(f"{kind}: {KINDS[kind].note}." for kind in kinds if KINDS[kind].note)]


def _ratio_section(results: Sequence[Result], targets: bool) -> list[str]:
    lines = ratio_lines(results, TARGETS, targets=targets)
    if not lines:
        return [
            "No ratio: nothing that the targets speak of was measured (eff_longformer and another at 4,096 tokens)."
        ]
    heading = "Ratios of eff_longformer" + ("" if targets else " (a trial run with a small model, so no targets)")
    return [f"{heading}:", *(f"- {line}" for line in lines)]


@app.command()
def main(
    lengths: Annotated[str | None, typer.Option(help=f"Tokens, separated by commas; default: {LENGTHS}.")] = None,
    kinds: Annotated[str, typer.Option(help="Model kinds, separated by commas.")] = ",".join(
        (OURS, IN_TREE, BERT, MODERN)
    ),
    modes: Annotated[str, typer.Option(help="forward, train or both.")] = ",".join(MODES),
    repeats: Annotated[int, typer.Option(help="Timed runs of each case.")] = 5,
    vocab_size: Annotated[
        int | None, typer.Option(help=f"Tokens of the vocabulary; default: {BASE.vocab_size}.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")] = None,
    case_seconds: Annotated[float, typer.Option(help="A case stops repeating after so long.")] = 45.0,
    max_seconds: Annotated[float, typer.Option(help="Bound for one pass or step.")] = 180.0,
    max_memory_gib: Annotated[
        float | None, typer.Option(help="Bound for one process; default: 80 % of the free memory.")
    ] = None,
    out: Annotated[list[Path] | None, typer.Option(help="File for the results, .csv or .md; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A trial run: a small model, no targets.")] = False,
) -> None:
    """Measure EffLongformer against transformers' Longformer, BERT with sdpa and ModernBERT with sdpa."""
    require_extras("rich")
    _check_files(out or [])
    size = SMALL if quick else BASE
    if vocab_size is not None:
        size = replace(size, vocab_size=vocab_size)
    lengths = lengths or (QUICK_LENGTHS if quick else LENGTHS)
    common = {"task": "base", "optimizer": "sgd", "threads": threads}
    cases = make_cases(
        split_names(kinds), split_numbers("lengths", lengths), split_names(modes), [size], GLOBAL_TOKENS, **common
    )
    bounds = Bounds(max_seconds, memory_bound(max_memory_gib))

    setting = (
        f"{size.num_layers} layers, hidden size {size.hidden_size}, {size.num_heads} heads, feed-forward "
        f"{size.intermediate_size:,}, total window {size.attention_window}, vocabulary {size.vocab_size:,}, batch 1, "
        f"float32; median of up to {repeats} runs, fewer once they took {case_seconds:g} s; at most {max_seconds:g} s "
        f"a pass and {bounds.memory_bytes / MIB:,.0f} MiB a process."
    )
    typer.echo(setting)
    checks = _check_lines(cases)
    typer.echo("\n".join(checks))
    results = run_cases(
        cases,
        bounds,
        repeats=repeats,
        case_seconds=case_seconds,
        passive_threads=False,
        on_result=lambda result: typer.echo(describe(result)),
    )
    typer.echo()
    print_tables(results)
    ending = [*_notes(cases), *checks, "", *_ratio_section(results, targets=not quick), ""]
    ending.append(environment_line("python benchmarks/longformer.py", sys.argv[1:], threads))
    typer.echo("\n".join(ending))
    for file in out or []:
        if file.suffix == ".csv":
            write_csv(results, file)
        else:
            file.write_text("\n".join([setting, "", markdown_tables(results), *ending, ""]), encoding="utf-8")


if __name__ == "__main__":
    try:
        app()
    except ValueError as error:
        sys.exit(f"Error: {error}")
