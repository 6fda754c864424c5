"""The layers of EffReformer against those of reformer-pytorch, in one process, in turns.

    python benchmarks/reformer_peer.py                    # forward, 4,096 tokens, two LSH layers of base size
    python benchmarks/reformer_peer.py --train --hashes 4

Both are reversible, with chunks of 64 tokens, one chunk back, attention across buckets, no dropout, and without
embeddings. Outputs differ, because hash directions do. A training step is forward and backward. Needs the extra
`peers`.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import nn

from hf_efficient_attn import EffReformerConfig, EffReformerModel
from hf_efficient_attn.bench import environment_line, require_extras, run_script, take_turns


WIDTH, HEADS, CHUNK = 768, 12, 64
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def run_of(layers: nn.Module, length: int, train: bool) -> Callable[[], object]:
    """A forward pass or a training step of `layers` on random states."""
    states = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(0))
    if not train:
        return lambda: torch.inference_mode()(layers.eval())(states)
    layers.train()

    def step() -> None:
        layers.zero_grad()
        layers(states.clone().requires_grad_()).mean().backward()

    return step


@app.command()
def main(
    length: Annotated[int, typer.Option(help="Tokens, a multiple of 128.")] = 4096,
    depth: Annotated[int, typer.Option(help="Layers.")] = 2,
    hashes: Annotated[int, typer.Option(help="Rounds of hashing.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 7,
    train: Annotated[bool, typer.Option("--train", help="Forward and backward.")] = False,
) -> None:
    """Time the layers alone."""
    require_extras("reformer_pytorch", extra="peers")
    from reformer_pytorch import Reformer

    config = EffReformerConfig(
        hidden_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        attn_layers=["lsh"],
        num_hashes=hashes,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        max_position_embeddings=length,
    )
    encoder = EffReformerModel(config).encoder

    class Ours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.encoder(states, None)

    peer = Reformer(WIDTH, depth, heads=HEADS, bucket_size=CHUNK, n_hashes=hashes, ff_chunks=1)
    layers = {"EffReformer": Ours(), "reformer-pytorch": peer}
    seconds = take_turns({name: run_of(module, length, train) for name, module in layers.items()}, repeats)
    typer.echo(
        f"{'training step' if train else 'forward'}, batch 1, {length:,} tokens, {depth} LSH layers of width {WIDTH}, "
        f"{hashes} round(s), float32; median (min - max) of {repeats} runs"
    )
    ours = statistics.median(seconds["EffReformer"])
    typer.echo(f"{'':20}{'s':>9}{'min - max':>18}{'this / ours':>13}")
    for name, times in seconds.items():
        median = statistics.median(times)
        spread = f"({min(times):.2f} - {max(times):.2f})"
        typer.echo(f"{name:20}{median:9.2f}{spread:>18}{median / ours:13.2f}")
    typer.echo(environment_line("python benchmarks/reformer_peer.py", sys.argv[1:], None))


if __name__ == "__main__":
    run_script(app)
