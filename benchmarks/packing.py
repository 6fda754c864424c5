"""Packed rows against padded batches: a masked-LM training step on texts of very different length.

    python benchmarks/packing.py                               # EffLongformer, a few minutes on two cores
    python benchmarks/packing.py --model-type eff_performer --max-length 512

The texts are the modules and topics of the English corpus that ships with Python, cut at --max-length tokens. All
batches hold the same texts, --batch-size each; a run goes forward and backward through all of them once:

- padded: batches of random texts, padded to the longest of each.
- by length: texts of similar length in a batch, as Trainer's `train_sampling_strategy="group_by_length"` has them.
- packed: batches of random texts, in rows of at most --max-length tokens.
"""

import random
import statistics
import sys
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, DataCollatorForLanguageModeling, PreTrainedModel

from hf_efficient_attn import FAMILIES, DataCollatorWithPacking
from hf_efficient_attn.bench import environment_line, run_script, take_turns
from hf_efficient_attn.demo import english_corpus, train_wordpieces


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
Batch = dict[str, Tensor]


def trainer_of(model: PreTrainedModel, batches: list[Batch]) -> Callable[[], None]:
    """A run through all batches, forward and backward."""

    def run() -> None:
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()

    return run


@app.command()
def main(
    model_type: Annotated[str, typer.Option(help="A text family of the package.")] = "eff_longformer",
    texts: Annotated[int, typer.Option(help="Texts in all.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Texts of a batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Most tokens of a text and of a packed row.")] = 1024,
    hidden_size: Annotated[int, typer.Option(help="Width; heads of 64, feed-forward four times as wide.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 4,
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 5,
) -> None:
    """Measure a pass through texts in padded batches, in batches by length and in packed rows."""
    for name, number in (("texts", texts), ("batch-size", batch_size), ("repeats", repeats), ("layers", layers)):
        if number < 1:
            raise ValueError(f"--{name} is {number}, but it has to be 1 or more.")
    known = [name for name, family in FAMILIES.items() if family.tokenizer is not None]
    if model_type not in known:
        raise ValueError(f"--model-type is {model_type!r}: choose one of {', '.join(known)}.")
    documents = english_corpus().train["text"]
    tokenizer = train_wordpieces(documents, max_length=max_length)
    chosen = random.Random(0).sample(list(documents), min(texts, len(documents)))
    features = [dict(tokenizer(text, truncation=True, return_special_tokens_mask=True)) for text in chosen]
    lengths = [len(feature["input_ids"]) for feature in features]

    torch.manual_seed(0)
    masking = DataCollatorForLanguageModeling(tokenizer)
    packing = DataCollatorWithPacking(masking, max_length)
    by_length = sorted(features, key=lambda feature: len(feature["input_ids"]))
    starts = range(0, len(features), batch_size)
    kinds = {
        "padded": [masking(features[start : start + batch_size]) for start in starts],
        "by length": [masking(by_length[start : start + batch_size]) for start in starts],
        "packed": [packing(features[start : start + batch_size]) for start in starts],
    }
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        position_offset=0,
    )
    model = AutoModelForMaskedLM.from_config(config).train()
    runs = {kind: trainer_of(model, batches) for kind, batches in kinds.items()}
    seconds = take_turns(runs, repeats)

    quartiles = statistics.quantiles(lengths, n=4) if len(lengths) > 1 else lengths * 3
    typer.echo(
        f"{model_type}, {layers} layers of {hidden_size}, masked LM, forward and backward; {len(features)} texts of "
        f"{min(lengths)} to {max(lengths)} tokens (quartiles {', '.join(f'{x:.0f}' for x in quartiles)}), batches of "
        f"{batch_size}; median (min - max) of {repeats} runs in turns"
    )
    typer.echo(
        f"{'':12}{'rows':>6}{'padding':>9}{'seconds':>9}{'min - max':>18}{'tokens a second':>17}{'padded / this':>15}"
    )
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    for kind, times in seconds.items():
        masks = [batch["attention_mask"] for batch in kinds[kind]]
        padding = 1 - sum(lengths) / sum(mask.numel() for mask in masks)
        spread = f"({min(times):.2f} - {max(times):.2f})"
        typer.echo(
            f"{kind:12}{sum(len(mask) for mask in masks):6}{padding:9.1%}{medians[kind]:9.2f}{spread:>18}"
            f"{sum(lengths) / medians[kind]:17,.0f}{medians['padded'] / medians[kind]:15.2f}"
        )
    typer.echo(environment_line("python benchmarks/packing.py", sys.argv[1:]))


if __name__ == "__main__":
    run_script(app)
