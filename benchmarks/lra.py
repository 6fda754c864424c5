"""Quality beside speed: every text family and softmax, trained with one budget on ListOps of Long Range Arena.

    python benchmarks/lra.py                                   # on a CPU: short expressions, about ten minutes
    python benchmarks/lra.py --budget paper                    # 500 to 2,000 tokens, 5,000 steps: for a GPU
    python benchmarks/lra.py --families eff_longformer,eff_electra --steps 200
    python benchmarks/lra.py --out benchmarks/results/lra-cpu.md

Every model has the same size, initial scale, batches, steps, learning rate and seed, and takes its steps in turns with
the others, so that a slow minute of the machine meets all. Examples are drawn from the published grammar, no two of
them equal, the held-out ones of the same lengths as the others. On CUDA models run in bfloat16 autocast, which has not
been tried yet.
"""

import csv
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import hf_efficient_attn
from hf_efficient_attn import FAMILIES
from hf_efficient_attn.bench import check_out, environment_line, run_script, split_names, split_numbers
from hf_efficient_attn.demo import ListOpsExample, draw_listops, listops_tokenizer, small_config


TEXT_FAMILIES = {name: family for name, family in FAMILIES.items() if family.tokenizer is not None}
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class Budget:
    """What every model gets.

    Args:
        net: where its size is from.
        options: fields of the configs, for the families that have them.
        lengths: tokens of the shortest and the longest expression.
        steps, batch_size, learning_rate: of AdamW, warmed up over a tenth of the steps, then down to 0.
        train, held_out: numbers of examples; training goes over them as often as the steps take.
    """

    net: str
    options: dict[str, Any]
    lengths: tuple[int, int]
    steps: int
    batch_size: int
    learning_rate: float
    train: int
    held_out: int


BUDGETS = {
    "cpu": Budget(
        "that of Nystromformer's authors' re-run",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
        | {"hidden_dropout_prob": 0.0},
        lengths=(100, 256),
        steps=600,
        batch_size=32,
        learning_rate=1e-3,
        train=19_200,
        held_out=2000,
    ),
    "paper": Budget(
        "that of Long Range Arena",
        {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024}
        | {"initializer_range": 0.02, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        | {"attention_window": 512, "block_size": 64, "num_random_blocks": 3, "num_landmarks": 64}
        | {"num_features": 256, "num_hashes": 2},
        lengths=(500, 2000),
        steps=5000,
        batch_size=32,
        learning_rate=1e-4,
        train=96_000,
        held_out=2000,
    ),
}

# Accuracy on ListOps of 2,000 tokens: Tay et al. 2020 (arXiv 2011.04006, table 1), and the re-run of Xiong et al. 2021
# (arXiv 2102.03902) with a smaller net. A family without a row has none there.
PUBLISHED = {
    "eff_electra": (36.37, 37.10),
    "eff_longformer": (35.63, None),
    "eff_big_bird": (36.05, None),
    "eff_nystromformer": (None, 37.15),
    "eff_performer": (18.01, 18.80),
    "eff_reformer": (37.27, 19.05),
}
OTHERS = (
    "Other published rows: Local 15.82, Linear Transformer 16.13, Sparse Transformer 17.07, Sinkhorn 33.67, Linformer "
    "35.70 (re-run: 37.25), Synthesizer 36.99."
)
CAVEATS = (
    "The published figures are of 500 to 2,000 tokens and of other nets, code and training: they stand here for "
    "orientation. At those lengths the guess from the first operator alone is right in 36.7% (12,000 examples, counted "
    "on 12,000 others), the most frequent label in 17.2%; most published models are near the one or the other. "
    "EffLongformer has more parameters because its global token has projections of its own."
)
HEADER = ("model", "accuracy", "parameters", "s a step", "last loss", "LRA", "re-run")


@dataclass
class Runner:
    """A model in training.

    Args:
        model: what is trained.
        optimizer: its AdamW.
        seconds: of each step.
        losses: of each step.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    seconds: list[float]
    losses: list[float]


def build(family: str, budget: Budget, seed: int) -> PreTrainedModel:
    """The family's classifier, of the budget's size."""
    known = {field.name for field in fields(getattr(hf_efficient_attn, TEXT_FAMILIES[family].config_name))}
    options = {name: value for name, value in budget.options.items() if name in known}
    options |= {"position_offset": 0, "embedding_size": None}  # one position table; embeddings as wide as the states
    config = small_config(listops_tokenizer(), [str(n) for n in range(10)], budget.lengths[1] + 1, family, **options)
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config)


def encode(examples: Sequence[ListOpsExample]) -> tuple[list[Tensor], Tensor]:
    """Each example's ids behind those of `[CLS]`, as bytes; and the labels."""
    tokenizer = listops_tokenizer()
    ids = tokenizer.get_vocab()
    rows = [torch.tensor([tokenizer.cls_token_id, *map(ids.get, e.tokens)], dtype=torch.uint8) for e in examples]
    return rows, torch.tensor([example.label for example in examples])


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's examples: all in a new order, again and again."""
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        del order[:size]


def inputs_of(rows: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, `[batch, longest]`."""
    ids = pad_sequence(list(rows), batch_first=True).long().to(device)  # 0 is [PAD]
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def train(
    runners: dict[str, Runner], rows: list[Tensor], labels: Tensor, budget: Budget, device: torch.device, seed: int
) -> None:
    """Every model on every batch, in turns."""
    warm_up, started = max(1, budget.steps // 10), time.perf_counter()
    for step, chosen in enumerate(batches(len(rows), budget.batch_size, budget.steps, seed)):
        inputs = inputs_of([rows[index] for index in chosen], device)
        target = labels[chosen].to(device)
        rate = budget.learning_rate * min((step + 1) / warm_up, (budget.steps - step) / max(1, budget.steps - warm_up))
        for runner in runners.values():
            torch.manual_seed(seed * budget.steps + step)  # dropout does not depend on which other models there are
            for group in runner.optimizer.param_groups:
                group["lr"] = rate
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = runner.model(**inputs, labels=target).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(runner.model.parameters(), 1.0)
            runner.optimizer.step()
            runner.optimizer.zero_grad()
            runner.losses.append(loss.item())  # which waits for the device, so that the time is that of the step
            runner.seconds.append(time.perf_counter() - start)
        if (step + 1) % max(1, budget.steps // 10) == 0:
            spent = time.perf_counter() - started
            means = ", ".join(f"{name} {recent_loss(runner, budget):.3f}" for name, runner in runners.items())
            print(f"step {step + 1:,} of {budget.steps:,}, {spent / 60:.1f} min; loss: {means}", flush=True)


def recent_loss(runner: Runner, budget: Budget) -> float:
    """Mean loss of the last tenth of all steps."""
    return statistics.mean(runner.losses[-max(1, budget.steps // 10) :])


@torch.inference_mode()
def accuracy(model: PreTrainedModel, rows: list[Tensor], labels: Tensor, device: torch.device) -> float:
    """Share of `rows` whose label the model finds."""
    model.eval()
    right = 0
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(rows), 50):
        chosen = order[start : start + 50]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**inputs_of([rows[index] for index in chosen], device)).logits
        right += int((logits.argmax(-1).cpu() == labels[chosen]).sum())
    return right / len(rows)


def guesses(training: Sequence[ListOpsExample], held_out: Sequence[ListOpsExample]) -> tuple[float, float]:
    """Accuracy of the label most frequent in training, and of the one most frequent after each first token."""
    whole = Counter(example.label for example in training)
    by_first: dict[str, Counter[int]] = {}
    for example in training:
        by_first.setdefault(example.tokens[0], Counter())[example.label] += 1
    most = whole.most_common(1)[0][0]
    best = {first: counts.most_common(1)[0][0] for first, counts in by_first.items()}
    right = sum(best.get(example.tokens[0], most) == example.label for example in held_out)
    return sum(example.label == most for example in held_out) / len(held_out), right / len(held_out)


def label_of(family: str, model: PreTrainedModel) -> str:
    """The family's name, and that it is the one with exact attention."""
    return f"softmax ({family})" if getattr(model.config, "attention", None) == "softmax" else family


def chosen_budget(name: str, steps: int | None, lengths: str | None) -> Budget:
    """The budget of that name, with other steps or lengths where given; raises `ValueError` for what is none."""
    if name not in BUDGETS:
        raise ValueError(f"--budget is {name!r}: choose one of {', '.join(BUDGETS)}.")
    budget, changed = BUDGETS[name], {}
    if steps is not None:
        if steps < 1:
            raise ValueError(f"--steps is {steps}: give 1 or more.")
        # Short runs need no more examples than they read.
        changed |= {"steps": steps, "train": min(max(budget.train, 96_000), steps * budget.batch_size)}
    if lengths is not None:
        pair = split_numbers("lengths", lengths, "100,256")
        if len(pair) != 2:
            raise ValueError(f"--lengths is {lengths!r}: give two numbers, the shortest and the longest: 100,256.")
        changed["lengths"] = (pair[0], pair[1])
    return Budget(**{**{field.name: getattr(budget, field.name) for field in fields(budget)}, **changed})


def chosen_families(text: str | None) -> list[str]:
    """Softmax first, then the others by the table; or those of the option."""
    names = sorted(TEXT_FAMILIES, key=lambda name: name != "eff_electra") if text is None else split_names(text)
    for name in names:
        if name not in TEXT_FAMILIES:
            raise ValueError(f"--families has {name!r}: choose from {', '.join(TEXT_FAMILIES)}.")
    if not names:
        raise ValueError(f"--families is {text!r}: give names separated by commas.")
    return list(dict.fromkeys(names))


@app.command()
def main(
    families: Annotated[str | None, typer.Option(help="Families, separated by commas; default: all.")] = None,
    budget: Annotated[str | None, typer.Option(help="cpu or paper; default: paper on a GPU.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; default: the budget's.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Shortest and longest, 100,256; default: the budget's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, weights, order and dropout.")] = 0,
    out: Annotated[list[Path] | None, typer.Option(help="File for the results, .csv or .md; may be repeated.")] = None,
) -> None:
    """Train every family with one budget on ListOps, and say what each has learned."""
    check_out(out or [], (".csv", ".md"))
    started = time.perf_counter()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    plan = chosen_budget(budget or ("paper" if where.type == "cuda" else "cpu"), steps, lengths)
    models = {family: build(family, plan, seed).to(where) for family in chosen_families(families)}

    drawn = list(islice(draw_listops(*plan.lengths, seed=seed), plan.held_out + plan.train))
    held_out, training = drawn[: plan.held_out], drawn[plan.held_out :]
    size = plan.options
    setting = (
        f"ListOps of {plan.lengths[0]:,} to {plan.lengths[1]:,} tokens; {plan.steps:,} steps of {plan.batch_size}, "
        f"AdamW, learning rate {plan.learning_rate:g}, {len(training):,} examples, {len(held_out):,} held out; net: "
        f"{plan.net} ({size['num_hidden_layers']} layers, hidden size {size['hidden_size']}, "
        f"{size['num_attention_heads']} heads, feed-forward {size['intermediate_size']:,}); {where.type}, "
        f"{'bfloat16 autocast' if where.type == 'cuda' else 'float32'}, seed {seed}."
    )
    if plan.lengths != BUDGETS["paper"].lengths:
        setting += " Long Range Arena has 500 to 2,000 tokens: this is a shorter task."
    print(setting, flush=True)

    runners = {}
    for family, model in models.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=plan.learning_rate, weight_decay=0.01)
        runners[label_of(family, model)] = Runner(model, optimizer, [], [])
    rows, labels = encode(training)
    train(runners, rows, labels, plan, where, seed)

    rows, labels = encode(held_out)
    table = []
    for (name, runner), family in zip(runners.items(), models, strict=True):
        share = accuracy(runner.model, rows, labels, where)
        published = ("-" if value is None else f"{value:.2f}" for value in PUBLISHED.get(family, (None, None)))
        error = (share * (1 - share) / len(rows)) ** 0.5
        seconds = statistics.median(runner.seconds)
        count = sum(parameter.numel() for parameter in runner.model.parameters())
        figures = (f"{share:.1%} +- {error:.1%}", f"{count:,}", f"{seconds:.3f}", f"{recent_loss(runner, plan):.3f}")
        table.append((name, *figures, *published))
    most, operator = guesses(training, held_out)
    lines = [
        f"| {' | '.join(HEADER)} |",
        "| --- |" + " ---: |" * (len(HEADER) - 1),
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        f"Without a model: by chance 10.0%, the most frequent label {most:.1%}, the one most frequent after the first "
        f"operator {operator:.1%}.",
        "Accuracy on the held-out examples with its standard error; s a step: the median, forward, backward and "
        "update, in turns; last loss: its mean over the last tenth of the steps. LRA: Tay et al. 2020; re-run: Xiong "
        "et al. 2021.",
        f"All together took {(time.perf_counter() - started) / 60:.1f} minutes, {time.process_time() / 60:.1f} of CPU "
        "time.",
        f"{CAVEATS} {OTHERS}",
        "",
        environment_line("python benchmarks/lra.py", sys.argv[1:]),
    ]
    print("\n" + "\n".join(lines))
    for file in out or []:
        if file.suffix == ".md":
            file.write_text("\n".join(["# ListOps with one budget", "", setting, "", *lines, ""]), encoding="utf-8")
            continue
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([HEADER, *table])


if __name__ == "__main__":
    run_script(app)
