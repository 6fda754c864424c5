"""Sliding-window attention alone, without projections and dropout, against plain matrix products.

    python benchmarks/window_attention.py                      # forward, 12 heads of 64, 4,096 tokens, radius 256
    python benchmarks/window_attention.py --backward           # forward and backward

What it is compared with, all in one process and in turns, batch 1, float32:

- products of the useful multiply-adds: each query with its 2 * radius + 1 keys, scores and weighted values,
  2 * heads * length * (2 * radius + 1) * head_dim (windows at the ends counted in full). One `torch.bmm` for the scores
  and one for the values a head, over blocks of queries, each block against 2 * radius + 1 rows.
- products of the multiply-adds that a blocked form does: the same with the block + 2 * radius keys around each block.
- full attention, `scaled_dot_product_attention` over all tokens.

Both kinds of products work head by head into buffers made before, on keys that are views and not copied: no mask, no
softmax, no padding. With `--backward` they do the six products of forward and backward (scores, output; gradients of
values, probabilities, queries and keys), three times the multiply-adds; nothing is computed again and no gradients are
summed where windows overlap, while the attention, which keeps no probabilities, computes the scores again.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from hf_efficient_attn.bench import (
    check_counts,
    environment_line,
    forward_or_gradients,
    run_script,
    take_turns,
    use_threads,
)


if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def products(
    query: Tensor, key: Tensor, value: Tensor, *, block: int, keys: int, backward: bool
) -> Callable[[], Tensor]:
    """Plain products of blocks of `block` queries with `keys` rows each, as the module describes them.

    Args:
        query, key, value: `[heads, length, head_dim]`; `length` is a multiple of `block`.
        block: queries of a block.
        keys: rows that each block is multiplied with, from its first query's position on.
        backward: also the four products of the backward pass.

    Returns:
        What runs them all and gives the output, `[heads * blocks, block, head_dim]`.

    Raises:
        ValueError: the length is not a multiple of the block.
    """
    import torch

    heads, length, width = query.shape
    if length % block:
        raise ValueError(f"length is {length}, but the products take whole blocks: pass a multiple of {block}.")
    blocks = length // block
    queries = query.reshape(heads, blocks, block, width)
    # The heads' rows stand behind one another: the last windows of a head run into the next one's.
    rows = [torch.cat([x.reshape(-1, width), x.new_zeros(keys, width)]) for x in (key, value)]
    shape, strides = (heads, blocks, keys, width), (length * width, block * width, width, 1)
    window_keys, window_values = (x.as_strided(shape, strides) for x in rows)
    scores, scores_grad = query.new_empty(2, blocks, block, keys)
    output, output_grad, query_grad = queries.new_empty(3, *queries.shape)
    output_grad.copy_(queries)
    key_grad, value_grad = query.new_empty(2, blocks, keys, width)

    def run() -> Tensor:
        for head in range(heads):
            torch.bmm(queries[head], window_keys[head].mT, out=scores)
            torch.bmm(scores, window_values[head], out=output[head])
            if backward:
                torch.bmm(scores.mT, output_grad[head], out=value_grad)
                torch.bmm(output_grad[head], window_values[head].mT, out=scores_grad)
                torch.bmm(scores_grad, window_keys[head], out=query_grad[head])
                torch.bmm(scores_grad.mT, queries[head], out=key_grad)
        return output.flatten(0, 1)

    return run


def multiply_adds(heads: int, length: int, keys: int, head_dim: int, backward: bool) -> int:
    """Of scores and weighted values, each query with so many keys; three times that with the backward pass."""
    return 2 * heads * length * keys * head_dim * (3 if backward else 1)


def _numbers(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",") if number.strip().isdigit()]
    if not numbers or min(numbers) < 1 or len(numbers) != len(text.split(",")):
        raise ValueError(f"--blocks is {text!r}, but it has to be whole numbers separated by commas: 64,128.")
    return numbers


@app.command()
def main(
    length: Annotated[int, typer.Option(help="Tokens, a multiple of every block.")] = 4096,
    radius: Annotated[int, typer.Option(help="Keys on each side of a query.")] = 256,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 15,
    blocks: Annotated[str, typer.Option(help="Queries a block in the products, separated by commas.")] = "64,128",
    backward: Annotated[bool, typer.Option("--backward", help="Measure forward and backward together.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")] = None,
) -> None:
    """Measure the window attention against plain matrix products and against full attention."""
    check_counts(length=length, radius=radius, heads=heads, head_dim=head_dim, repeats=repeats, threads=threads or 1)
    sizes = _numbers(blocks)
    import torch

    from hf_efficient_attn.functional import sliding_window_attention

    use_threads(threads)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, length, head_dim, generator=generator) for _ in range(3)]

    ours = "sliding_window_attention"
    window = 2 * radius + 1
    runs = {
        ours: forward_or_gradients(lambda q, k, v: sliding_window_attention(q, k, v, radius=radius), tensors, backward)
    }
    counts = {ours: multiply_adds(heads, length, window, head_dim, backward)}
    for block in sizes:
        for words, keys in (("useful products", window), ("blocked products", block + 2 * radius)):
            name = f"{words}, {block} x {keys}"
            plain = products(*(tensor[0] for tensor in tensors), block=block, keys=keys, backward=backward)
            runs[name] = torch.inference_mode()(plain)
            counts[name] = multiply_adds(heads, length, keys, head_dim, backward)
    full = "scaled_dot_product_attention, full"
    runs[full] = forward_or_gradients(torch.nn.functional.scaled_dot_product_attention, tensors, backward)
    counts[full] = multiply_adds(heads, length, length, head_dim, backward)

    what = "forward + backward" if backward else "forward"
    typer.echo(
        f"{what}, batch 1, {heads} heads of {head_dim}, {length:,} tokens, radius {radius}, float32, no dropout; "
        f"median (min - max) of {repeats} runs in turns"
    )
    typer.echo(
        "products: torch.bmm for scores and values"
        + (" and the four of the backward pass" if backward else "")
        + ", head by head, blocks of queries x keys; no mask, no softmax; useful: the keys one query attends to"
    )
    seconds = take_turns(runs, repeats)
    typer.echo(f"{'':36}{'ms':>8}{'min - max':>18}{'10^9 multiply-adds':>20}{'ours / this':>13}")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        spread = f"({min(times) * 1e3:.1f} - {max(times) * 1e3:.1f})"
        figures = (
            f"{medians[name] * 1e3:8.1f}{spread:>18}{counts[name] / 1e9:20.2f}{medians[ours] / medians[name]:13.2f}"
        )
        typer.echo(f"{name:36}{figures}")
    best = min((name for name in medians if name.startswith("useful")), key=medians.__getitem__)
    typer.echo(f"Time over plain products of the useful multiply-adds (the fastest: {best}): ", nl=False)
    typer.echo(f"{medians[ours] / medians[best]:.2f}")
    typer.echo(environment_line("python benchmarks/window_attention.py", sys.argv[1:]))


if __name__ == "__main__":
    run_script(app)
