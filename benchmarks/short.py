"""Short texts: every family against BERT with sdpa, from 64 to 4,096 tokens.

    python benchmarks/short.py                                                # the whole table, about half an hour
    python benchmarks/short.py --threads 1 --clock processor --out short.md   # where others use the cores as well
    python benchmarks/short.py --quick                                        # a trial run with a small model

Two layers, hidden size 768, 12 heads, feed-forward 3,072, vocabulary 30,522, total window 512, blocks of 64 with 3
random ones, 64 landmarks, 256 features, chunks of 64 and one round of hashing; float32. All models of one length and
mode are in one process and take turns. What is printed is the time over BERT's in the same turn, the median of the
turns and their range: below 1 is faster.

Three modes: a forward pass in inference mode; a training step (forward, backward of a mean of the last hidden state,
plain SGD) without dropout; and one with dropout 0.1 of states and attention probabilities, which Performer and Reformer
have of states alone. Performer and Reformer are not softmax attention at any length, so for them the table ends with
the crossover: the shortest text measured from which on they are not slower.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModel, PreTrainedModel

import hf_efficient_attn  # noqa: F401  (registers the families)
from hf_efficient_attn.bench import (
    check_counts,
    check_out,
    environment_line,
    run_script,
    split_names,
    split_numbers,
    take_turns,
    use_threads,
)


BERT = "bert"
FAMILIES = {
    "eff_longformer": {},
    "eff_big_bird": {},
    "eff_nystromformer": {},
    "eff_performer": {},
    "eff_reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False},
}
SAME_FUNCTION_WHEN_SHORT = ("eff_longformer", "eff_big_bird", "eff_nystromformer")
MODES = {"forward": "forward", "train": "training step, no dropout", "dropout": "training step, dropout 0.1"}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ALLOWED = 1.05
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Setting:
    """What all models of a run share."""

    batch: int
    quick: bool

    def model(self, family: str, length: int, dropout: float) -> PreTrainedModel:
        """A model with random weights and room for `length` tokens."""
        width, heads = (64, 2) if self.quick else (768, 12)
        fields = {
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": 2,
            "intermediate_size": 4 * width,
            "vocab_size": 512 if self.quick else 30522,
            # Two of them are reserved in some families.
            "max_position_embeddings": length + 2,
            "hidden_dropout_prob": dropout,
        }
        if family == "eff_reformer":
            fields["attention_head_size"] = width // heads
        elif family != "eff_performer":
            fields["attention_probs_dropout_prob"] = dropout
        config = AutoConfig.for_model(family, **fields, **FAMILIES.get(family, {}))
        return AutoModel.from_config(config, attn_implementation="sdpa")

    def run(self, family: str, length: int, mode: str) -> Callable[[], None]:
        """Some passes, or steps, of a model; as many as make a turn long enough to be timed."""
        model = self.model(family, length, 0.1 if mode == "dropout" else 0.0).train(mode != "forward")
        ids = torch.randint(
            5, model.config.vocab_size, (self.batch, length), generator=torch.Generator().manual_seed(0)
        )
        if mode == "forward":

            def once() -> None:
                with torch.inference_mode():
                    model(input_ids=ids)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

            def once() -> None:
                model(input_ids=ids).last_hidden_state.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        def several() -> None:
            for _ in range(max(1, 256 // (length * self.batch))):
                once()

        return several


def table(rows: dict[tuple[int, str], dict[str, list[float]]], families: list[str]) -> list[str]:
    """The ratios as Markdown, from `(length, mode)` to each family's ratios in the turns."""
    lines = [f"| tokens | | {' | '.join(families)} |", f"| ---: | --- |{' ---: |' * len(families)}"]
    for (length, mode), ratios in rows.items():
        cells = [f"{statistics.median(x):.2f} ({min(x):.2f} - {max(x):.2f})" for x in (ratios[f] for f in families)]
        lines.append(f"| {length:,} | {MODES[mode]} | {' | '.join(cells)} |")
    return lines


def verdicts(rows: dict[tuple[int, str], dict[str, list[float]]], families: list[str]) -> list[str]:
    """For each family and mode the largest ratio, or the crossover."""
    lines = []
    for family in families:
        for mode, words in MODES.items():
            found = {length: statistics.median(x[family]) for (length, at), x in rows.items() if at == mode}
            if not found:
                continue
            if family in SAME_FUNCTION_WHEN_SHORT:
                worst = max(found, key=found.__getitem__)
                slower = [f"{length:,}" for length, ratio in found.items() if ratio > ALLOWED]
                verdict = f"over {ALLOWED} at {', '.join(slower)}" if slower else f"at most {ALLOWED} everywhere"
                lines.append(f"- {family}, {words}: at most {found[worst]:.2f}, at {worst:,} tokens; {verdict}")
                continue
            from_here = [n for n in found if all(ratio <= 1.0 for length, ratio in found.items() if length >= n)]
            verdict = f"not slower from {min(from_here):,} tokens on" if from_here else "slower at every length here"
            lines.append(f"- {family}, {words}: {verdict}")
    return lines


def _check(families: list[str], modes: list[str], clock: str, batch: int, repeats: int, out: Path | None) -> None:
    given = (("families", families, FAMILIES), ("modes", modes, MODES), ("clock", [clock], CLOCKS))
    for name, values, known in given:
        for value in values:
            if value not in known:
                raise ValueError(f"--{name} has {value!r}, which is not known: pass some of {', '.join(known)}.")
    check_counts(batch=batch, repeats=repeats)
    check_out([out])


@app.command()
def main(
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = "64,128,256,512,1024,2048,4096",
    families: Annotated[str, typer.Option(help="Model types, separated by commas.")] = ",".join(FAMILIES),
    modes: Annotated[str, typer.Option(help="Some of forward, train (no dropout) and dropout.")] = ",".join(MODES),
    batch: Annotated[int, typer.Option(help="Examples a pass.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns.")] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or processor: the time that the process had a core, whatever others do.")
    ] = "wall",
    quick: Annotated[bool, typer.Option("--quick", help="A trial run: a small model, two lengths.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .md file for the results.")] = None,
) -> None:
    """Measure every family against BERT with sdpa."""
    chosen, kinds = split_names(modes), split_names(families)
    _check(kinds, chosen, clock, batch, repeats, out)
    use_threads(threads)
    setting, rows = Setting(batch, quick), {}
    for length in split_numbers("lengths", "64,128" if quick else lengths):
        for mode in chosen:
            torch.manual_seed(0)
            runs = {family: setting.run(family, length, mode) for family in (BERT, *kinds)}
            seconds = take_turns(runs, repeats, CLOCKS[clock])
            rows[length, mode] = {
                family: [own / bert for own, bert in zip(seconds[family], seconds[BERT], strict=True)]
                for family in kinds
            }
            medians = ", ".join(f"{family} {statistics.median(x):.2f}" for family, x in rows[length, mode].items())
            typer.echo(f"{length:,} tokens, {MODES[mode]}: {medians}", err=True)
            del runs
            gc.collect()
    lines = [
        f"Time over that of BERT with sdpa, two layers of {'a small' if quick else 'base'} size, batch {batch}, "
        f"float32, {clock} time: median (min - max) of {repeats} turns in one process; below 1 is faster.",
        "",
        *table(rows, kinds),
        "",
        *verdicts(rows, kinds),
        "",
        environment_line("python benchmarks/short.py", sys.argv[1:]),
    ]
    typer.echo("\n".join(lines))
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run_script(app)
