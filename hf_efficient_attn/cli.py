"""The command `hf-efficient-attn`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .running import run_program, what_is_wrong


app = typer.Typer(
    help="Efficient-attention Transformers as ordinary Hugging Face models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@contextmanager
def _one_line_errors(*more: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (ValueError, *more) as error:
        typer.echo(f"Error: {' '.join(str(error).split()) if more else error}", err=True)
        raise typer.Exit(2) from None


@app.callback()
def _commands() -> None:
    """Efficient-attention Transformers as ordinary Hugging Face models."""
    # Read when PyTorch is imported, which the commands do (not `run`: its program decides for itself). By default its
    # threads spin while they wait for each other, and on cores shared with other programs they then keep those they
    # wait for from running: up to 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the model, the csv file and the plot.")] = Path(
        "demo-output"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A trial run: few short documents, short lengths.")] = False,
    bench: Annotated[bool, typer.Option(help="Measure time and memory after the training.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the training.")] = 0,
) -> None:
    """Fine-tune an EffLongformer on long documents, check what was saved, and measure it against BERT and Longformer.

    Takes under four minutes on two CPU cores and needs no network.
    The documents are source files of Python's standard library, to be told apart by package.
    """
    with _one_line_errors(OSError):
        typer.echo("Loading PyTorch and Transformers ...")
        from .demo import QUICK, DemoSettings, run_demo

        run_demo(output_dir, settings=QUICK if quick else DemoSettings(), bench=bench, seed=seed)


@app.command()
def bench(
    families: Annotated[str, typer.Option(help="Model kinds, separated by commas.")] = "eff_longformer,longformer,bert",
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "1024,4096,16384",
    modes: Annotated[str, typer.Option(help="Some of forward, train and generate.")] = "forward,train",
    task: Annotated[str, typer.Option(help="classification, base (no head) or masked_lm.")] = "classification",
    windows: Annotated[str, typer.Option(help="Attention windows (total, even), separated by commas.")] = "128",
    hidden_size: Annotated[int, typer.Option(help="Hidden size.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 2,
    intermediate_size: Annotated[int | None, typer.Option(help="Feed-forward width; default: 4 x hidden.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Examples a pass.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="Tokens a pass instead: shorter texts in larger batches.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile, all kinds.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd, for training steps.")] = "adamw",
    repeats: Annotated[int, typer.Option(help="Timed runs of each case.")] = 5,
    max_seconds: Annotated[float, typer.Option(help="Bound for one pass or step.")] = 60.0,
    max_memory_gib: Annotated[
        float | None, typer.Option(help="Bound for one process; default: 80 % of the free memory.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for benchmark.csv and benchmark.png.")] = None,
) -> None:
    """Measure time and peak memory of model kinds over length, each case in a process of its own, within bounds.

    Models that should be equal are compared first; where their outputs differ nothing is measured.
    What goes past a bound is reported as 'over time' or 'over memory'.
    What is predicted to go past, from the shorter lengths, is not started.
    """
    with _one_line_errors():
        from .bench import (
            GIB,
            Bounds,
            ModelSize,
            agreement_lines,
            check_counts,
            check_folder,
            describe,
            make_cases,
            memory_bound,
            plot,
            print_tables,
            require_extras,
            run_cases,
            split_names,
            split_numbers,
            write_csv,
        )

        require_extras("rich", *(["matplotlib"] if output_dir is not None else []))
        check_counts(repeats=repeats)
        if output_dir is not None:
            check_folder("output-dir", output_dir, "benchmark.csv", "benchmark.png")
        wide = 4 * hidden_size if intermediate_size is None else intermediate_size
        sizes = [
            ModelSize(hidden_size, layers, heads, wide, vocab_size, window)
            for window in split_numbers("windows", windows)
        ]
        common = {"batch_size": batch_size, "dtype": dtype, "threads": threads, "optimizer": optimizer, "task": task}
        common |= {"device": device, "checkpointing": checkpointing, "compiled": compiled, "tokens": tokens}
        cases = make_cases(
            split_names(families), split_numbers("lengths", lengths), split_names(modes), sizes, **common
        )
        memory = memory_bound(max_memory_gib)
        bounds = Bounds(max_seconds, memory)
        typer.echo(
            f"{len(cases)} cases, at most {max_seconds:g} s a pass and {memory / GIB:.1f} GiB a process; "
            f"the time is the median of {repeats} runs."
        )
        for line in agreement_lines(cases):
            typer.echo(line)
        results = run_cases(cases, bounds, repeats=repeats, on_result=lambda result: typer.echo(describe(result)))
        print_tables(results)
        if output_dir is not None:
            batch = f"batch {batch_size}" if tokens is None else f"{tokens:,} tokens a pass"
            how = f"{dtype}, {device}{', compiled' if compiled else ''}{', checkpointing' if checkpointing else ''}"
            title = f"hidden size {hidden_size}, {layers} layers, {task}, {batch}, {how}"
            typer.echo(f"csv   {write_csv(results, output_dir / 'benchmark.csv')}")
            typer.echo(f"plot  {plot(results, output_dir / 'benchmark.png', title)}")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder that save_pretrained wrote.")],
    push_to: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it to this repository of the Hub.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write an ONNX program, onnx/model.onnx, instead.")] = False,
    more_inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="With --onnx: one more input, as global_attention_mask; repeatable."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="With --onnx: the operator set, 18 to 23.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="With --onnx: how far outputs may differ; 1e-4.")] = None,
) -> None:
    """Add the model's code to its folder, as one file, to load it without this package; or write an ONNX program.

    Without the package it loads with trust_remote_code=True, and where that is imported in the package's own classes.
    Weights and all other files stay as they are. Exporting again changes nothing.

    With --onnx write an ONNX program instead, for runtimes without PyTorch: dynamic batch and length, compared with the
    model in onnxruntime before it is there. Needs the extra: pip install "hf_efficient_attn\\[onnx]".
    """
    with _one_line_errors(OSError):  # those of the Hub, of a network that is not there and of the disk are such
        given = {"more_inputs": more_inputs, "opset": opset, "tolerance": tolerance}
        given = {name: value for name, value in given.items() if value is not None}
        if onnx:
            if push_to is not None:
                raise ValueError(
                    "--onnx with --push-to: first export --onnx, then export --push-to, which uploads the program too."
                )
            from .onnx.export import export_onnx

            typer.echo(f"onnx  {export_onnx(folder, **given)}")
            return
        if given:
            raise ValueError(f"--{next(iter(given)).replace('more_inputs', 'input')} is an option of --onnx; add that.")
        from .hub.exporting import export_folder, push_folder

        code = export_folder(folder)
        typer.echo(f"code  {folder / code.name}, {len(code.text.splitlines())} lines, sha256 {code.sha256}")
        if push_to is not None:
            typer.echo(f"hub   {push_folder(folder, push_to).commit_url}")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    program: Annotated[list[str], typer.Argument(metavar="SCRIPT|-m MODULE [ARGS]...", help="As python takes them.")],
) -> None:
    """Import this package, then run a script or module with its own arguments.

    For programs that one cannot add an import to, such as
    'accelerate launch -m hf_efficient_attn run train.py --model_name_or_path my-longformer'.
    """
    with _one_line_errors():
        if (problem := what_is_wrong(program)) is not None:
            raise ValueError(problem)
    run_program(program)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub name of a checkpoint.")],
    output_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new model.")],
    to: Annotated[str, typer.Option(help="eff_longformer, ...; from a model of this package longformer, ...")],
    max_length: Annotated[int | None, typer.Option(help="Tokens that the new model reads; default: as before.")] = None,
    positions: Annotated[str, typer.Option(help="tile, interpolate or init, for more positions.")] = "tile",
    option: Annotated[
        list[str] | None, typer.Option(help="Field of the new config, such as attention_window=256; repeatable.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="Class of the weights, if the config names none.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a name on the Hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that OUT holds.")] = False,
) -> None:
    """Convert a checkpoint, BERT's or an original's, into a model of this package, or back.

    What becomes what, and how exactly: model_cards/CONVERSION.md. Prints what was copied, what is new, and how far the
    outputs are from the source's.
    """
    with _one_line_errors():
        from .conversion import convert_folder, read_options

        options = {"positions": positions, "architecture": architecture, "revision": revision, **read_options(option)}
        typer.echo(convert_folder(source, to, output_dir, max_length, force=force, **options))


@app.command()
def pattern(
    what: Annotated[
        str, typer.Argument(metavar="FAMILY", help="Such as eff_big_bird; or the folder of a saved model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .svg or .pdf.")] = Path(
        "pattern.png"
    ),
    length: Annotated[int, typer.Option(help="Tokens of a random text, or patches of a random image.")] = 512,
    layer: Annotated[int, typer.Option(help="The layer, from 0.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="Field of the family's config, such as block_size=32; repeatable.")
    ] = None,
    global_tokens: Annotated[int, typer.Option("--global", help="So many first tokens are global (Longformer).")] = 0,
    weights: Annotated[bool, typer.Option("--weights", help="Weights, where it would be which pairs attend.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the text or image, and of new weights.")] = 0,
    dpi: Annotated[int, typer.Option(help="Points an inch; a head is three inches wide.")] = 100,
) -> None:
    """Draw what attends what in a layer of a family, or of a model that you saved.

    For mechanisms with a pattern the pairs that attend, in a colour for each part of it (window, global, random ...);
    for those that estimate softmax attention the weights that they estimate, of a model with new weights.
    Queries go from top to bottom, keys from left to right. Needs the extra: pip install "hf_efficient_attn\\[demo]".
    """
    with _one_line_errors(OSError):
        from .conversion import read_options
        from .patterns.command import draw_command

        drawn = draw_command(
            what,
            output,
            length,
            options=read_options(option, taken=frozenset()),
            dpi=dpi,
            layer=layer,
            seed=seed,
            weights=weights,
            num_global=global_tokens,
        )
        typer.echo(f"{drawn.title}\npicture  {output}")


def main() -> None:
    """The entry point."""
    program = sys.argv[2:] if sys.argv[1:2] == ["run"] else []
    if program and program[0] != "--help" and what_is_wrong(program) is None:
        run_program(program)  # not inside typer: exit codes, tracebacks and Ctrl-C are the program's own
    else:
        app()


if __name__ == "__main__":
    main()
