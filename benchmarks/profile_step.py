"""Where the time of one training step goes, family by family.

    python benchmarks/profile_step.py                                # all families at 4,096 tokens
    python benchmarks/profile_step.py --families eff_longformer,bert --length 16384
    python benchmarks/profile_step.py --quick                        # a trial run with a small model

Two layers of base size, batch 1, float32, dropout 0.1 (Performer and Reformer have it of states alone), forward,
backward of the mean square of the last hidden state, and plain SGD. Shares of the processor time that torch's profiler
sees in operators, without what they call: products of matrices (by where they are called: in the linear layers, or in
batches, which is attention), softmax, activation and norm, dropout's random numbers, copies, and the rest. What is left
of the step's time is Python and the profiler itself.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModel

import hf_efficient_attn  # noqa: F401  (registers the families)
from hf_efficient_attn.bench import check_counts, check_out, environment_line, run_script, split_names


FAMILIES = ("bert", "eff_longformer", "eff_big_bird", "eff_nystromformer", "eff_performer", "eff_reformer")
GROUPS = {
    "linear layers": ("aten::mm", "aten::addmm", "aten::linear"),
    "batched products": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::matmul"),
    "sdpa": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "softmax": ("aten::_softmax", "aten::softmax", "aten::log_softmax", "aten::logsumexp"),
    "activation, norm": (
        "aten::gelu",
        "aten::relu",
        "aten::native_layer_norm",
        "aten::layer_norm",
        "aten::native_batch",
    ),
    "random numbers": ("aten::bernoulli", "aten::native_dropout", "aten::random", "aten::rand"),
    "copies, gathering": ("aten::copy", "aten::cat", "aten::index", "aten::gather", "aten::scatter", "aten::fill"),
    "elementwise": (
        "aten::mul",
        "aten::add",
        "aten::sub",
        "aten::div",
        "aten::exp",
        "aten::where",
        "aten::masked",
        "aten::sum",
    ),
}
OTHER = "the rest"
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def group_of(operator: str) -> str:
    """The group that an operator's name belongs to: that of the longest name that it begins with."""
    found = [(len(name), group) for group, names in GROUPS.items() for name in names if operator.startswith(name)]
    return max(found)[1] if found else OTHER


def shares(family: str, length: int, width: int) -> tuple[float, dict[str, float]]:
    """Seconds of one step without the profiler, and each group's share of what the profiler saw in operators."""
    heads = width // 64 or 1
    fields = {"attention_probs_dropout_prob": 0.1} if family not in ("eff_performer", "eff_reformer") else {}
    if family == "eff_reformer":
        fields = {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "attention_head_size": width // heads}
    config = AutoConfig.for_model(
        family,
        hidden_size=width,
        num_attention_heads=heads,
        num_hidden_layers=2,
        intermediate_size=4 * width,
        max_position_embeddings=length + 2,
        vocab_size=1024,
        hidden_dropout_prob=0.1,
        **fields,
    )
    model = AutoModel.from_config(config).train()
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=1e-4), torch.randint(5, 1024, (1, length))

    def step() -> None:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            totals[group_of(event.key)] += event.self_cpu_time_total
    whole = sum(totals.values())
    return seconds, {group: totals[group] / whole for group in (*GROUPS, OTHER)}


@app.command()
def main(
    families: Annotated[str, typer.Option(help="Model types, separated by commas.")] = ",".join(FAMILIES),
    length: Annotated[int, typer.Option(help="Tokens.")] = 4096,
    quick: Annotated[bool, typer.Option("--quick", help="A trial run: a small model, 256 tokens.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .md file for the results.")] = None,
) -> None:
    """Profile one training step of each family."""
    check_counts(length=length)
    check_out([out])
    length, width = (256, 64) if quick else (length, 768)
    columns = (*GROUPS, OTHER)
    lines = [
        f"One training step at {length:,} tokens, two layers of width {width}: shares of the time in operators.",
        "",
    ]
    lines += [f"| | s | {' | '.join(columns)} |", f"| --- | ---: |{' ---: |' * len(columns)}"]
    for family in split_names(families):
        seconds, found = shares(family, length, width)
        lines.append(f"| {family} | {seconds:.2f} | {' | '.join(f'{found[x]:.0%}' for x in columns)} |")
        typer.echo(lines[-1], err=True)
    lines += ["", environment_line("python benchmarks/profile_step.py", sys.argv[1:])]
    typer.echo("\n".join(lines))
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run_script(app)
