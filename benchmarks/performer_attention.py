"""FAVOR+ attention alone, without projections and dropout, against performer-pytorch and plain matrix products.

    python benchmarks/performer_attention.py                # forward, 12 heads of 64, 4,096 tokens, 256 features
    python benchmarks/performer_attention.py --backward     # forward and backward
    python benchmarks/performer_attention.py --causal       # the causal form, for which the peer has no CPU kernel

All in one process and in turns, batch 1, float32, with the same projection; before measuring, the outputs are compared.
The products are those of the features of queries and keys, of the state and of the result, head by head: no
exponential, no maximum, no normaliser. Needs the extra `peers`, but with `--causal`.
"""

import statistics
import sys
from typing import Annotated

import torch
import typer
from torch import Tensor

from hf_efficient_attn.bench import (
    check_counts,
    environment_line,
    forward_or_gradients,
    require_extras,
    run_script,
    take_turns,
)
from hf_efficient_attn.functional import orthogonal_features, performer_attention


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def products(query: Tensor, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    """The plain products of FAVOR+: `[heads, length, head_dim]` each, `[features, head_dim]` for the projection."""
    results = []
    for head in range(query.shape[0]):
        state = (key[head] @ projection.T).T @ value[head]
        results.append(query[head] @ projection.T @ state)
    return torch.stack(results)


@app.command()
def main(
    length: Annotated[int, typer.Option(help="Tokens.")] = 4096,
    features: Annotated[int, typer.Option(help="Random features.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 15,
    backward: Annotated[bool, typer.Option("--backward", help="Measure forward and backward together.")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="The causal form, without the peer.")] = False,
) -> None:
    """Measure FAVOR+ attention against performer-pytorch's and against plain matrix products."""
    check_counts(length=length, features=features, heads=heads, repeats=repeats)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3)]
    blocks = torch.randn(-(-features // head_dim), head_dim, head_dim, generator=generator, dtype=torch.float64)
    norms = torch.randn(features, head_dim, generator=generator, dtype=torch.float64)
    projection = orthogonal_features(blocks, norms).float()

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return performer_attention(query, key, value, projection=projection, causal=causal)

    runs = {"performer_attention": forward_or_gradients(ours, tensors, backward)}
    if not causal:
        require_extras("performer_pytorch", extra="peers")
        from performer_pytorch import FastAttention

        peer = FastAttention(head_dim, nb_features=features)
        peer.projection_matrix.copy_(projection)
        with torch.inference_mode():
            short = [tensor / 4 for tensor in tensors[:2]] + tensors[2:]
            difference = (peer(*short) - ours(*short)).abs().max().item()
        typer.echo(
            f"Equal projection, short queries and keys: outputs differ by at most {difference:.1e} (the peer adds "
            "1e-4 to features, which is not little beside those of long ones)."
        )
        if difference > 1e-2:
            raise ValueError(f"the outputs differ by {difference:.1e}, so no ratio between them is given.")
        runs["performer-pytorch"] = forward_or_gradients(peer, tensors, backward)
    if not backward:
        runs["plain products"] = torch.inference_mode()(lambda: products(*(x[0] for x in tensors), projection))

    seconds = take_turns(runs, repeats)
    typer.echo(
        f"{'forward + backward' if backward else 'forward'}{', causal' if causal else ''}, batch 1, {heads} heads of "
        f"{head_dim}, {length:,} tokens, {features} features, float32, no dropout; median (min - max) of {repeats} runs"
    )
    mine = statistics.median(seconds["performer_attention"])
    typer.echo(f"{'':22}{'ms':>9}{'min - max':>20}{'this / ours':>13}")
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"({min(times) * 1e3:.1f} - {max(times) * 1e3:.1f})"
        typer.echo(f"{name:22}{median * 1e3:9.1f}{spread:>20}{median / mine:13.2f}")
    typer.echo(environment_line("python benchmarks/performer_attention.py", sys.argv[1:]))


if __name__ == "__main__":
    run_script(app)
