"""Each mechanism alone, without projections, against its own multiply-adds as plain matrix products.

    python benchmarks/attention_alone.py                    # 12 heads of 64, 4,096 tokens, batch 1, float32
    python benchmarks/attention_alone.py --length 16384
    python benchmarks/attention_alone.py --dtype bfloat16   # for CPUs that have it
    python benchmarks/attention_alone.py --quick            # a trial run: few tokens

All in one process and in turns. The products are those that the formula cannot do without, counted on the pairs that
the mask admits, pairs in blocks of queries, head by head into buffers made before; keys of windows are views. They have
no mask, no softmax, no normaliser, no padding, and gather nothing. With gradients they are the three that belong to
each product (itself, and one for the gradient of each factor), computed once; the attention computes probabilities
again instead of keeping them.

- softmax: `scaled_dot_product_attention`, for comparison.
- longformer: a window of 512 and the token itself. big_bird: blocks of 64, 3 of the window, 2 global, 3 random.
- nystromformer: 64 landmarks, 6 iterations of the inverse. performer: 256 features.
- lsh: chunks of 64 with the one before, one round. Hashing, sorting and gathering of sorted rows, there and back, are
  told apart; the products are those of chunks and hashes.

Dropout 0.1 of the probabilities (of Performer's keys): the time with it over that without, forward and backward, of the
attention alone and of a whole training step of two base-size layers, where all other dropout is the same in both.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, AutoModel

from hf_efficient_attn import functional  # importing registers the families
from hf_efficient_attn.bench import (
    check_out,
    environment_line,
    forward_or_gradients,
    run_script,
    take_turns,
    use_threads,
)


HEADS, WIDTH, RADIUS, BLOCK, RANDOM, LANDMARKS, ITERATIONS, FEATURES, CHUNK = 12, 64, 256, 64, 3, 64, 6, 256, 64
DROPOUT = 0.1
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Pairs:
    """Scores and weighted values of blocks of queries, each with `keys` rows; one block's begin `step` rows on."""

    blocks: int
    queries: int
    keys: int
    step: int = 0

    def run(self, backward: bool, dtype: torch.dtype) -> Callable[[], None]:
        """What does them for one head."""
        base = torch.randn(2, max(0, self.blocks - 1) * self.step + self.keys, WIDTH, dtype=dtype)
        shape, strides = (self.blocks, self.keys, WIDTH), (self.step * WIDTH, WIDTH, 1)
        key, value = (rows.as_strided(shape, strides, rows.storage_offset()) for rows in base)
        query, out, grad, query_grad = torch.randn(4, self.blocks, self.queries, WIDTH, dtype=dtype)
        scores, scores_grad = torch.empty(2, self.blocks, self.queries, self.keys, dtype=dtype)
        key_grad, value_grad = torch.empty(2, self.blocks, self.keys, WIDTH, dtype=dtype)

        def once() -> None:
            torch.bmm(query, key.mT, out=scores)
            torch.bmm(scores, value, out=out)
            if backward:
                torch.bmm(scores.mT, grad, out=value_grad)
                torch.bmm(grad, value.mT, out=scores_grad)
                torch.bmm(scores_grad, key, out=query_grad)
                torch.bmm(scores_grad.mT, query, out=key_grad)

        return once


@dataclass(frozen=True)
class Product:
    """`times` products of `[rows, inner]` with `[inner, columns]`, and those for the gradients of so many factors.

    `exact` ones are in float32 whatever the rest is.
    """

    rows: int
    inner: int
    columns: int
    times: int = 1
    gradients: int = 2
    exact: bool = False

    def run(self, backward: bool, dtype: torch.dtype) -> Callable[[], None]:
        """What does them for one head."""
        dtype = torch.float32 if self.exact else dtype
        left = torch.randn(self.rows, self.inner, dtype=dtype)
        right = torch.randn(self.inner, self.columns, dtype=dtype)
        out, left_grad = torch.empty(self.rows, self.columns, dtype=dtype), torch.empty_like(left)
        right_grad = torch.empty_like(right)

        def once() -> None:
            for _ in range(self.times):
                torch.mm(left, right, out=out)
                if backward and self.gradients > 0:
                    torch.mm(out, right.T, out=left_grad)
                if backward and self.gradients > 1:
                    torch.mm(left.T, out, out=right_grad)

        return once


@dataclass(frozen=True)
class Mechanism:
    """One row.

    Args:
        attend: `(query, key, value, dropout_p)`.
        products: what a head needs.
        at_most: the bound for the forward pass over its products; 1.3 times that with gradients. None for no bound.
    """

    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    products: Sequence[Pairs | Product]
    at_most: float | None


def mechanisms(length: int, dtype: torch.dtype) -> dict[str, Mechanism]:
    """All rows, for texts of `length` tokens."""
    device = torch.device("cpu")
    draws = functional.random_draws(0, 0, HEADS, length // BLOCK, RANDOM, device=device)
    blocks = functional.pick_random_blocks(
        draws, functional.count_text_blocks(None, length, BLOCK, 0, device), ends_are_global=True
    )
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(FEATURES // WIDTH, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    lengths = torch.randn(FEATURES, WIDTH, generator=generator, dtype=torch.float64)
    projection = functional.orthogonal_features(square, lengths).to(dtype)
    factors, sizes, rotations = _hash(length)

    def lsh(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        buckets = functional.hash_buckets(query, rotations, factors, sizes)
        return functional.chunk_attention(query, key, value, buckets=buckets, dropout_p=dropout_p, **LSH)

    window = {"radius": RADIUS}
    bird = {"block_size": BLOCK, "random_blocks": blocks}
    return {
        "softmax": Mechanism(
            lambda q, k, v, p: functional.softmax_attention(q, k, v, dropout_p=p),
            [Pairs(length // 128, 128, length)],
            None,
        ),
        "longformer": Mechanism(
            lambda q, k, v, p: functional.sliding_window_attention(q, k, v, dropout_p=p, **window),
            [Pairs(length // 128, 128, 2 * RADIUS + 1, 128)],
            1.7,
        ),
        "big_bird": Mechanism(
            lambda q, k, v, p: functional.big_bird_attention(q, k, v, dropout_p=p, **bird),
            [Pairs(length // BLOCK - 2, BLOCK, (5 + RANDOM) * BLOCK, BLOCK), Pairs(2, BLOCK, length)],
            1.6,
        ),
        "nystromformer": Mechanism(
            lambda q, k, v, p: functional.nystrom_attention(
                q, k, v, dropout_p=p, num_landmarks=LANDMARKS, pinv_iterations=ITERATIONS, scale_per_matrix=True
            ),
            [
                Pairs(length // 128, 128, LANDMARKS),
                Pairs(1, LANDMARKS, length),
                Product(LANDMARKS, LANDMARKS, LANDMARKS, 2 + 4 * ITERATIONS, exact=True),
            ],
            2.0,
        ),
        "performer": Mechanism(
            lambda q, k, v, p: functional.performer_attention(q, k, v, dropout_p=p, projection=projection),
            [
                Product(length, WIDTH, FEATURES, 2, gradients=1),
                Product(FEATURES, length, WIDTH),
                Product(length, FEATURES, WIDTH),
            ],
            1.8,
        ),
        "lsh": Mechanism(
            lsh,
            [
                Pairs(length // CHUNK, CHUNK, 2 * CHUNK, CHUNK),
                Product(length, WIDTH, rotations.shape[-1], gradients=0),
            ],
            None,
        ),
    }


LSH: dict[str, Any] = {
    "chunk_length": CHUNK,
    "chunks_before": 1,
    "chunks_after": 0,
    "causal": False,
    "released": True,
    "exclude_self": True,
}


def _hash(length: int) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Bucket factors, their room, and directions, of one table of two buckets a chunk."""
    sizes = (2 ** (2 * length // CHUNK).bit_length() // 2,)
    shape = {"heads": HEADS, "head_dim": WIDTH, "rounds": 1, "directions": sizes[0] // 2}
    return torch.tensor([sizes]), sizes, functional.hash_rotations(0, 0, 0, **shape, device=torch.device("cpu"))


def lsh_parts(length: int, tensors: list[Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds of what LSH attention does around its chunks."""
    factors, sizes, rotations = _hash(length)
    query, key, value = (x[0].flatten(0, 1) for x in tensors)
    buckets = functional.hash_buckets(tensors[0], rotations, factors, sizes)
    order = buckets.argsort(dim=-1, stable=True)
    rows = (order[0, :, 0] + length * torch.arange(HEADS)[:, None]).flatten()
    back = torch.empty_like(rows).scatter(0, rows, torch.arange(len(rows)))

    def gather() -> None:
        for x in (query, key, value):
            torch.index_select(x, 0, rows)
        torch.index_select(value, 0, back)

    runs = {
        "hashing": lambda: functional.hash_buckets(tensors[0], rotations, factors, sizes),
        "sorting": lambda: buckets.argsort(dim=-1, stable=True),
        "gathering": gather,
    }
    with torch.inference_mode():
        seconds = take_turns(runs, repeats)
    return {name: statistics.median(x) * 1e3 for name, x in seconds.items()}


def products_of(mechanism: Mechanism, backward: bool, dtype: torch.dtype) -> Callable[[], None]:
    """All products of all heads, each head with its own numbers."""
    runs = [part.run(backward, dtype) for _ in range(HEADS) for part in mechanism.products]

    def once() -> None:
        for run in runs:
            run()

    return torch.inference_mode()(once)


STEPS = {
    "longformer": ("eff_longformer", {}),
    "big_bird": ("eff_big_bird", {}),
    "nystromformer": ("eff_nystromformer", {}),
    "performer": ("eff_performer", {}),
    "lsh": ("eff_reformer", {"attn_layers": ["lsh"], "axial_pos_embds": False, "attention_head_size": WIDTH}),
}


def training_step(name: str, length: int, dropout_p: float, dtype: torch.dtype) -> Callable[[], None]:
    """One step of two base-size layers."""
    model_type, fields = STEPS[name]
    config = AutoConfig.for_model(
        model_type,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=2,
        intermediate_size=4 * HEADS * WIDTH,
        max_position_embeddings=length + 2,
        vocab_size=1024,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=dropout_p,
        **fields,
    )
    model = AutoModel.from_config(config).to(dtype).train()
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=1e-4), torch.randint(5, 1024, (1, length))

    def once() -> None:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return once


def _ratio(seconds: dict[str, list[float]], over: str, under: str) -> tuple[float, str]:
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    median = statistics.median(ratios)
    return median, f"{median:.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def _tensors(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(dtype) for _ in range(3)]


def measure(
    name: str, mechanism: Mechanism, length: int, dtype: torch.dtype, repeats: int, step_repeats: int
) -> tuple[str, list[str]]:
    """The row of one mechanism, and what of it is over a bound."""
    tensors = _tensors(length, dtype)

    def attend(dropout_p: float) -> Callable[..., Tensor]:
        return lambda query, key, value: mechanism.attend(query, key, value, dropout_p)

    runs = {
        "forward": forward_or_gradients(attend(0.0), tensors, False),
        "products": products_of(mechanism, False, dtype),
        "gradients": forward_or_gradients(attend(0.0), tensors, True),
        "dropout": forward_or_gradients(attend(DROPOUT), tensors, True),
        "all products": products_of(mechanism, True, dtype),
    }
    seconds = take_turns(runs, repeats)
    forward, both = _ratio(seconds, "forward", "products"), _ratio(seconds, "gradients", "all products")
    dropout = _ratio(seconds, "dropout", "gradients")
    cells = [f"{statistics.median(seconds[x]) * 1e3:.1f}" for x in ("forward", "products")]
    bound = "-" if mechanism.at_most is None else f"{mechanism.at_most}"
    cells += [forward[1], bound, both[1], "-" if mechanism.at_most is None else f"{1.3 * mechanism.at_most:.2f}"]
    over, found = [], [("forward", forward[0], mechanism.at_most)]
    found.append(("with gradients", both[0], None if mechanism.at_most is None else 1.3 * mechanism.at_most))
    step = None
    if name in STEPS and step_repeats:
        steps = {str(p): training_step(name, length, p, dtype) for p in (0.0, DROPOUT)}
        step = _ratio(take_turns(steps, step_repeats), str(DROPOUT), "0.0")
        found += [("dropout, attention alone", dropout[0], 2.0), ("dropout, whole step", step[0], 1.3)]
    over += [f"{name}, {what}: {value:.2f} is over {most:.2f}" for what, value, most in found if most and value > most]
    cells += [dropout[1], "-" if step is None else step[1]]
    return f"| {name} | {' | '.join(cells)} |", over


@app.command()
def main(
    length: Annotated[int, typer.Option(help="Tokens, a multiple of 128.")] = 4096,
    repeats: Annotated[int, typer.Option(help="Turns of the attention alone.")] = 9,
    step_repeats: Annotated[int, typer.Option(help="Turns of the training steps; 0 for none.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's own choice.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A trial run: 1,024 tokens, two turns, no training step.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A .md file for the results.")] = None,
) -> None:
    """Measure every mechanism against its own matrix products."""
    if quick:
        length, repeats, step_repeats = 1024, 2, 0
    if length < 1024 or length % 128:
        raise ValueError(f"--length is {length}, but blocks are whole: pass a multiple of 128, from 1024 on.")
    if repeats < 1 or step_repeats < 0:
        raise ValueError(f"--repeats is {repeats} and --step-repeats {step_repeats}: pass 1 or more, and 0 or more.")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}: pass float32 or bfloat16.")
    check_out([out])
    kind = getattr(torch, dtype)
    use_threads(threads)
    lines = [
        f"{length:,} tokens, {HEADS} heads of {WIDTH}, batch 1, {dtype}: ms, and ratios as the median (min - max) of "
        f"{repeats} turns in one process, of {step_repeats} for the step.",
        "",
        "| | forward ms | products ms | forward over products | at most | with gradients | at most "
        "| dropout, attention alone (2.0) | dropout, whole step (1.3) |",
        f"| --- |{' ---: |' * 8}",
    ]
    over = []
    for name, mechanism in mechanisms(length, kind).items():
        row, above = measure(name, mechanism, length, kind, repeats, step_repeats)
        typer.echo(row, err=True)
        lines.append(row)
        over += above
    tensors = _tensors(length, kind)
    parts = ", ".join(f"{name} {ms:.1f} ms" for name, ms in lsh_parts(length, tensors, repeats).items())
    lines += ["", f"- lsh, part of its forward pass: {parts}"]
    lines += [f"- {line}" for line in over] or ["- nothing is over its bound"]
    lines += ["", environment_line("python benchmarks/attention_alone.py", sys.argv[1:])]
    typer.echo("\n".join(lines))
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run_script(app)
