"""Memory of training EffReformer by depth, with reversible layers and without.

    python benchmarks/reformer_depth.py                          # 2 and 12 base-size layers, about six minutes
    python benchmarks/reformer_depth.py --length 4096 --layers 2,6,12

A training step of each depth in a process of its own. Peak memory is above that of the built model: activations and
gradients, and these grow with the number of weights whatever is kept.
"""

import sys
from dataclasses import replace
from typing import Annotated

import typer

from hf_efficient_attn.bench import (
    BASE,
    MIB,
    Bounds,
    describe,
    environment_line,
    make_cases,
    memory_bound,
    run_cases,
    run_script,
    split_names,
    split_numbers,
)


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    length: Annotated[int, typer.Option(help="Tokens.")] = 16384,
    layers: Annotated[str, typer.Option(help="Depths, separated by commas.")] = "2,12",
    kinds: Annotated[str, typer.Option(help="Model kinds, separated by commas.")] = "eff_reformer,eff_reformer_kept",
    repeats: Annotated[int, typer.Option(help="Timed steps of each case.")] = 2,
    max_memory_gib: Annotated[
        float | None, typer.Option(help="Bound for one process; default: 80 % of the free memory.")
    ] = None,
) -> None:
    """Measure a training step by depth, with reversible layers and without."""
    sizes = [replace(BASE, num_layers=depth) for depth in split_numbers("layers", layers)]
    names = split_names(kinds)
    cases = make_cases(names, [length], ["train"], sizes, task="base", optimizer="sgd")
    bounds = Bounds(600.0, memory_bound(max_memory_gib))
    results = run_cases(
        cases,
        bounds,
        repeats=repeats,
        passive_threads=False,
        on_result=lambda result: typer.echo(describe(result)),
    )
    typer.echo(f"\nPeak memory of a training step on {length:,} tokens, over that of {sizes[0].num_layers} layers:")
    for kind in names:
        own = [result for result in results if result.case.kind == kind]
        first = own[0].peak_bytes
        for result in own:
            if result.peak_bytes is None or first is None:
                typer.echo(f"  {kind}, {result.case.size.num_layers} layers: {result.status}")
                continue
            parameters = f"{result.peak_bytes / MIB:,.0f} MiB, {result.peak_bytes / first:.2f} times"
            typer.echo(f"  {kind}, {result.case.size.num_layers} layers: {parameters}")
    typer.echo(environment_line("python benchmarks/reformer_depth.py", sys.argv[1:], None))


if __name__ == "__main__":
    run_script(app)
