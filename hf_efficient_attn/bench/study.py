"""A study: one family of ours against others, with targets, as a script of its own in `benchmarks/`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ..extras import require_extras
from .agreement import check_outputs
from .cases import PASSES, Bounds, Case, ModelSize, Result, make_cases
from .environment import environment_line
from .kinds import KINDS
from .measure import run_cases
from .memory import MIB
from .options import check_out, memory_bound, split_names, split_numbers
from .ratios import Comparison, ratio_lines
from .report import describe, markdown_tables, plot, print_tables, write_csv


BASE = ModelSize(768, 2, 12, 3072, 30522, attention_window=512)
SMALL = ModelSize(64, 2, 2, 256, 4096, attention_window=64)
PASS_NOTES = (
    "Base models without a head. A training step is forward, the backward pass of a mean of the last hidden state, and "
    "plain SGD without momentum, so that it is the model that is measured. Dropout as each config has it by default "
    "(0.1) but where a note says otherwise. Peak memory is resident memory above that of the built model: activations, "
    "and in a training step gradients too. Ratios are of medians; in parentheses their range over the turns. "
    "Threads wait for each other as PyTorch has it by default."
)
GPU_NOTE = "On a GPU memory is what torch has given out of the GPU's, and kinds are measured one after another."
GENERATION_NOTES = (
    "Causal language models, greedy. The text is read, and some tokens are generated, before the first timed run, "
    "which goes on from there; memory is that of all tensors of the cache, its room for more tokens included. Ratios "
    "are of medians; in parentheses their range over the turns."
)


@dataclass(frozen=True)
class Study:
    """What a script measures by default.

    Args:
        script: its name in `benchmarks/`.
        kinds: keys of `KINDS`; the first is the one that the study is about.
        targets: the ratios to form.
        lengths, quick_lengths: tokens, separated by commas.
        global_tokens: choices of global tokens; None leaves them to the task.
        modes: what is measured, some of `MODES`.
    """

    script: str
    kinds: tuple[str, ...]
    targets: tuple[Comparison, ...]
    lengths: str = "1024,2048,4096,16384"
    quick_lengths: str = "1024,4096"
    global_tokens: tuple[str | None, ...] = (None,)
    modes: tuple[str, ...] = PASSES


def study_app(study: Study) -> typer.Typer:
    """The script's command: base-size layers by default, a small model with `--quick`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

    @app.command(help=f"Measure {study.kinds[0]} against {', '.join(study.kinds[1:])}.")
    def main(
        lengths: Annotated[
            str | None, typer.Option(help=f"Tokens, separated by commas; default: {study.lengths}.")
        ] = None,
        kinds: Annotated[str, typer.Option(help="Model kinds, separated by commas.")] = ",".join(study.kinds),
        modes: Annotated[str, typer.Option(help="Some of forward, train and generate.")] = ",".join(study.modes),
        repeats: Annotated[int, typer.Option(help="Timed runs of each case.")] = 5,
        vocab_size: Annotated[
            int | None, typer.Option(help=f"Tokens of the vocabulary; default: {BASE.vocab_size}.")
        ] = None,
        layers: Annotated[int, typer.Option(help="Layers.")] = BASE.num_layers,
        tokens: Annotated[
            int | None, typer.Option(help="Tokens a pass: shorter texts in larger batches; default: one text.")
        ] = None,
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile, all kinds.")] = False,
        attention_dropout: Annotated[
            float | None, typer.Option(help="Dropout of attention's probabilities, all kinds; default: their configs'.")
        ] = None,
        threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")] = None,
        case_seconds: Annotated[float, typer.Option(help="A case stops repeating after so long.")] = 45.0,
        max_seconds: Annotated[float, typer.Option(help="Bound for one pass or step.")] = 180.0,
        max_memory_gib: Annotated[
            float | None, typer.Option(help="Bound for one process; default: 80 % of the free memory.")
        ] = None,
        out: Annotated[
            list[Path] | None, typer.Option(help="File for the results, .csv, .md or .png; may be repeated.")
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A trial run: a small model, no targets.")] = False,
    ) -> None:
        require_extras("rich")
        check_out(out or [], (".csv", ".md", ".png"))
        if any(file.suffix == ".png" for file in out or []):
            require_extras("matplotlib")
        size = replace(SMALL if quick else BASE, num_layers=layers)
        if vocab_size is not None:
            size = replace(size, vocab_size=vocab_size)
        numbers = split_numbers("lengths", lengths or (study.quick_lengths if quick else study.lengths))
        common = {"task": "base", "optimizer": "sgd", "threads": threads}
        common |= {"dtype": dtype, "device": device, "compiled": compiled, "tokens": tokens}
        common["attention_dropout"] = attention_dropout
        cases = make_cases(split_names(kinds), numbers, split_names(modes), [size], study.global_tokens, **common)
        bounds = Bounds(max_seconds, memory_bound(max_memory_gib))
        windowed = any(KINDS[case.kind].windowed for case in cases)
        batch = "batch 1" if tokens is None else f"{tokens:,} tokens a pass"
        how = f"{batch}, {dtype}{', compiled' if compiled else ''}"
        how += "" if attention_dropout is None else f", attention dropout {attention_dropout:g}"
        setting = _setting(size, bounds, repeats, case_seconds, windowed, how)
        typer.echo(setting)
        checks = agreement_lines(cases)
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
        ending = [*_notes(cases), *checks, "", *_ratio_section(study, results, targets=not quick), ""]
        ending.append(environment_line(f"python benchmarks/{study.script}.py", sys.argv[1:], threads, device))
        typer.echo("\n".join(ending))
        for file in out or []:
            if file.suffix == ".csv":
                write_csv(results, file)
            elif file.suffix == ".png":
                plot(results, file)
            else:
                file.write_text("\n".join([setting, "", markdown_tables(results), *ending, ""]), encoding="utf-8")

    return app


def run_script(app: typer.Typer) -> None:
    """Run a script's command; wrong input ends it with one line."""
    try:
        app()
    except ValueError as error:
        sys.exit(f"Error: {error}")


def _setting(size: ModelSize, bounds: Bounds, repeats: int, case_seconds: float, windowed: bool, how: str) -> str:
    window = f" total window {size.attention_window}," if windowed else ""
    return (
        f"{size.num_layers} layers, hidden size {size.hidden_size}, {size.num_heads} heads, feed-forward "
        f"{size.intermediate_size:,},{window} vocabulary {size.vocab_size:,}, {how}; median of up to "
        f"{repeats} runs, fewer once they took {case_seconds:g} s; at most {bounds.seconds:g} s a pass and "
        f"{bounds.memory_bytes / MIB:,.0f} MiB a process."
    )


def agreement_lines(cases: Sequence[Case]) -> list[str]:
    """One for each kind that has the outputs of another one; raises `ValueError` where it does not."""
    return [
        f"Equal weights, {case.length:,} tokens: {case.label}, differs from {KINDS[case.kind].same_as} by at most "
        f"{difference:.1e}."
        for case, difference in check_outputs(cases)
    ]


def _notes(cases: Sequence[Case]) -> list[str]:
    kinds = dict.fromkeys(case.kind for case in cases)
    modes = {case.mode for case in cases}
    notes = [PASS_NOTES] if modes & set(PASSES) else []
    notes += [GENERATION_NOTES] if "generate" in modes else []
    notes += [GPU_NOTE] if any(case.device == "cuda" for case in cases) else []
    return [*notes, *(f"{kind}: {KINDS[kind].note}." for kind in kinds if KINDS[kind].note)]


def _ratio_section(study: Study, results: Sequence[Result], targets: bool) -> list[str]:
    ours = study.kinds[0]
    lines = ratio_lines(results, study.targets, targets=targets)
    if not lines:
        return [f"No ratio: nothing that the targets speak of was measured ({ours} and another at 4,096 tokens)."]
    several = len({comparison.kind for comparison in study.targets}) > 1
    heading = ("Ratios" if several else f"Ratios of {ours}") + (
        "" if targets else " (a trial run with a small model, so no targets)"
    )
    return [f"{heading}:", *(f"- {line}" for line in lines)]
