"""Each mechanism alone on a GPU, without projections, against flash attention; and what its own kernels win.

    python benchmarks/attention_gpu.py                       # 4,096, 16,384 and 65,536 tokens, bfloat16
    python benchmarks/attention_gpu.py --quick --device cpu  # a trial run, whose figures mean nothing

12 heads of 64, 65,536 tokens a pass, shorter texts in larger batches; all in one process and in turns, medians. Options
as in `attention_alone.py`: a window of 512; blocks of 64 with 3 random ones, prepared before, as a model does it once
for all layers; 64 landmarks; 256 features; chunks of 64 with the one before, hashing and sorting included; on a grid as
nearly square as the length allows, windows of 15 by 15 patches. "Flash" is
`torch.nn.functional.scaled_dot_product_attention`, which chooses among torch's fused kernels. "Torch alone" is the same
mechanism under `fused_kernels(False)`, forward and backward.
"""

import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hf_efficient_attn  # noqa: F401  (puts the kernels where the formulas find them)
from hf_efficient_attn import functional
from hf_efficient_attn.bench import (
    check_out,
    environment_line,
    forward_or_gradients,
    run_script,
    split_numbers,
    take_turns,
)


HEADS, WIDTH, RADIUS, BLOCK, RANDOM, LANDMARKS, FEATURES, CHUNK = 12, 64, 256, 64, 3, 64, 256, 64
PATCHES = 7  # on each side
DROPOUT = 0.1
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def mechanisms(length: int, device: torch.device) -> dict[str, Attend]:
    """`(query, key, value, dropout_p)` by name, for texts of `length` tokens; "flash" first."""
    rows = length // BLOCK
    draws = functional.random_draws(0, 0, HEADS, rows, RANDOM, device=device)
    text_blocks = functional.count_text_blocks(None, length, BLOCK, 0, device)
    blocks = functional.pick_random_blocks(draws, text_blocks, ends_are_global=True)
    plan = functional.plan_big_bird(None, length, block_size=BLOCK, random_blocks=blocks)
    projection = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    sizes = (2 ** (2 * length // CHUNK).bit_length() // 2,)
    factors = torch.tensor([sizes], device=device)
    shape = {"heads": HEADS, "head_dim": WIDTH, "rounds": 1, "directions": sizes[0] // 2}
    rotations = functional.hash_rotations(0, 0, 0, **shape, device=device)
    chunks = {"chunk_length": CHUNK, "chunks_before": 1, "chunks_after": 0, "causal": False}
    chunks |= {"released": True, "exclude_self": True}
    rows = max(x for x in range(1, math.isqrt(length) + 1) if length % x == 0)
    grid = {"grid": (rows, length // rows), "radius": PATCHES}

    def lsh(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        buckets = functional.hash_buckets(query, rotations, factors, sizes)
        return functional.chunk_attention(query, key, value, buckets=buckets, dropout_p=dropout_p, **chunks)

    return {
        "flash": lambda q, k, v, p: scaled_dot_product_attention(q, k, v, dropout_p=p),
        "longformer": lambda q, k, v, p: functional.sliding_window_attention(q, k, v, dropout_p=p, radius=RADIUS),
        "big_bird": lambda q, k, v, p: functional.big_bird_attention(
            q, k, v, dropout_p=p, block_size=BLOCK, random_blocks=blocks, plan=plan
        ),
        "nystromformer": lambda q, k, v, p: functional.nystrom_attention(
            q, k, v, dropout_p=p, num_landmarks=LANDMARKS, pinv_iterations=6, scale_per_matrix=True
        ),
        "performer": lambda q, k, v, p: functional.performer_attention(
            q, k, v, dropout_p=p, projection=projection.to(q.dtype)
        ),
        "lsh": lsh,
        "neighborhood": lambda q, k, v, p: functional.grid_window_attention(q, k, v, dropout_p=p, **grid),
    }


def measure(length: int, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[str]:
    """The rows of one length."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(1, tokens // length), length, HEADS, WIDTH)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3)]

    def timed(attend: Attend, dropout_p: float, backward: bool, fused: bool = True) -> Callable[[], None]:
        run = forward_or_gradients(lambda q, k, v: attend(q, k, v, dropout_p), tensors, backward)

        def once() -> None:
            with functional.fused_kernels(fused):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return once

    attends = mechanisms(length, device)
    runs = {}
    for name, attend in attends.items():
        runs[name, "forward"] = timed(attend, 0.0, False)
        runs[name, "both"] = timed(attend, 0.0, True)
        runs[name, "dropout"] = timed(attend, DROPOUT, True)
        if name != "flash":
            runs[name, "torch"] = timed(attend, 0.0, True, fused=False)
    seconds = {key: statistics.median(x) for key, x in take_turns(runs, repeats).items()}
    rows = []
    for name in attends:
        cells = [f"{length:,}", name]
        for what in ("forward", "both", "dropout"):
            own, flash = seconds[name, what], seconds["flash", what]
            cells.append(f"{own * 1e3:.2f}" if name == "flash" else f"{own * 1e3:.2f} ({flash / own:.1f})")
        cells.append("" if name == "flash" else f"{seconds[name, 'torch'] / seconds[name, 'both']:.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


@app.command()
def main(
    lengths: Annotated[str | None, typer.Option(help="Tokens; default: 4096,16384,65536.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens a pass; default: 65536.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial run.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Timed turns.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="A trial run: short texts.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .md file for the results.")] = None,
) -> None:
    """Measure the mechanisms of all families."""
    check_out([out])
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no GPU: pass --device cpu for a trial run.")
    numbers = split_numbers("lengths", lengths or ("512" if quick else "4096,16384,65536"))
    if any(number % BLOCK for number in numbers):
        raise ValueError(f"--lengths has one that is no multiple of {BLOCK}, the size of a block: pass others.")
    lines = [f"{dtype}; milliseconds, in parentheses how many times as fast as flash attention.", ""]
    lines.append("| tokens | mechanism | forward | forward and backward | with dropout | torch alone over it |")
    lines.append(f"| ---: | --- |{' ---: |' * 4}")
    for number in numbers:
        count = tokens or (1024 if quick else 65536)
        rows = measure(number, count, torch.device(device), getattr(torch, dtype), repeats)
        typer.echo("\n".join(rows), err=True)
        lines += rows
    lines += ["", environment_line("python benchmarks/attention_gpu.py", sys.argv[1:], None, device)]
    typer.echo("\n".join(lines))
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run_script(app)
