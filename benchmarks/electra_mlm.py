"""ELECTRA against masked language modelling with equal compute, on the English that ships with Python.

    python benchmarks/electra_mlm.py                                       # about half an hour on two cores
    python benchmarks/electra_mlm.py --steps 100 --seeds 1 --epochs 1      # a trial

Two encoders of one size start from the same weights. One is pretrained as ELECTRA's discriminator for --steps steps;
the other predicts the masked tokens itself, on the same batches, for as many steps as cost the same multiply-adds,
counted on a batch. Both, and an encoder that was not trained, are then judged by packages of the standard library that
the documents of the demo come from: with a linear probe on their frozen states (logistic regression on the mean state
of a text), and by fine-tuning them. A bag of the same tokens is the baseline.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_efficient_attn import (
    DataCollatorForReplacedTokenDetection,
    EffElectraConfig,
    EffElectraForJointPreTraining,
    EffElectraJointConfig,
    EffElectraModel,
    ElectraTrainer,
    layerwise_parameter_groups,
)
from hf_efficient_attn.bench import environment_line, require_extras, run_script
from hf_efficient_attn.demo import (
    accuracy,
    bag_of_tokens_accuracy,
    english_corpus,
    pack_texts,
    stdlib_corpus,
    tokenize_texts,
    train_wordpieces,
)


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
LENGTH, BATCH = 128, 32


def joint(encoder: EffElectraConfig, folder: Path, mlm: bool) -> EffElectraForJointPreTraining:
    """A joint model whose encoder to be judged starts from `folder`: the discriminator, or with `mlm` the generator."""
    size = 1.0 if mlm else 1 / 4
    options = {"stage": "generator", "sharing": "none"} if mlm else {}
    model = EffElectraForJointPreTraining(EffElectraJointConfig.from_discriminator(encoder, size, **options))
    judged = model.generator if mlm else model.discriminator
    judged.base_model.load_state_dict(AutoModel.from_pretrained(folder).state_dict())
    return model


def training(folder: Path, seed: int, **options: Any) -> TrainingArguments:
    """What all trainings share."""
    options = {"logging_steps": 0.2, "save_strategy": "no", "warmup_steps": 0.1, "weight_decay": 0.01, **options}
    return TrainingArguments(
        str(folder), seed=seed, report_to="none", use_cpu=True, dataloader_pin_memory=False, **options
    )


def count_flops(model: EffElectraForJointPreTraining, batch: dict[str, torch.Tensor]) -> int:
    """Floating-point operations of the matrix products of a batch, forward; backward takes twice as many."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")  # plain products, which are counted
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(**batch)
    model.set_attn_implementation(backend)
    return counter.get_total_flops()


@torch.inference_mode()
def mean_states(model: PreTrainedModel, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The mean of the last states over a text's tokens, `[texts, hidden]`."""
    collate, rows = DataCollatorWithPadding(tokenizer), []
    data = data.select_columns(["input_ids", "attention_mask"])
    for start in range(0, len(data), 64):
        batch = collate([data[index] for index in range(start, min(start + 64, len(data)))])
        states = model.eval()(**batch).last_hidden_state
        keep = batch["attention_mask"][..., None]
        rows.append(((states * keep).sum(1) / keep.sum(1)).numpy())
    return np.concatenate(rows)


def probe(model: PreTrainedModel, sides: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> float:
    """Held-out accuracy of logistic regression on frozen states."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = {name: mean_states(model, side, tokenizer) for name, side in sides.items()}
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.1))
    return linear.fit(features["train"], sides["train"]["labels"]).score(features["eval"], sides["eval"]["labels"])


def fine_tune(
    folder: Path, sides: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase, labels: int, seed: int, epochs: float
) -> float:
    """Held-out accuracy after training the whole encoder, with a learning rate that decays by layer."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    rate = 5e-4
    optimizer = torch.optim.AdamW(layerwise_parameter_groups(model, rate, 0.8, 0.01), lr=rate)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            training(Path(scratch), seed, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=rate),
            train_dataset=sides["train"],
            eval_dataset=sides["eval"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
            optimizers=(optimizer, None),
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


@app.command()
def main(
    steps: Annotated[int, typer.Option(help="Steps of ELECTRA.")] = 1500,
    seeds: Annotated[int, typer.Option(help="Fine-tuning runs of each encoder.")] = 3,
    epochs: Annotated[float, typer.Option(help="Passes of a fine-tuning run.")] = 3,
    hidden_size: Annotated[int, typer.Option(help="Width of the encoder.")] = 128,
    layers: Annotated[int, typer.Option(help="Its layers.")] = 3,
    examples: Annotated[int, typer.Option(help="Documents of each package and side, at most.")] = 100,
    output: Annotated[Path | None, typer.Option(help="Folder to keep the encoders in.")] = None,
) -> None:
    """Pretrain twice with equal compute, and judge both encoders."""
    require_extras("sklearn")
    folder = output or Path(tempfile.mkdtemp())
    corpus = english_corpus()
    tokenizer = train_wordpieces(corpus.train["text"], 8000, LENGTH)
    blocks = pack_texts(corpus.train, tokenizer, LENGTH)
    encoder = EffElectraConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        embedding_size=hidden_size // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=LENGTH,
    )
    set_seed(0)
    EffElectraModel(encoder).save_pretrained(folder / "untrained")

    batch = DataCollatorForReplacedTokenDetection(tokenizer, epoch=0)([blocks[index] for index in range(BATCH)])
    flops = {
        name: count_flops(joint(encoder, folder / "untrained", name == "mlm"), batch) for name in ("electra", "mlm")
    }
    counts = {"electra": steps, "mlm": round(steps * flops["electra"] / flops["mlm"])}
    print(f"{BATCH} x {LENGTH} tokens forward: {flops['electra']:.3g} operations, masked LM {flops['mlm']:.3g}")
    minutes, measured = {"untrained": 0.0}, {}
    for name, count in counts.items():
        set_seed(0)
        model = joint(encoder, folder / "untrained", name == "mlm")
        trainer = ElectraTrainer(
            model,
            training(folder / "runs", 0, max_steps=count, per_device_train_batch_size=BATCH, learning_rate=1e-3),
            train_dataset=blocks,
            eval_dataset=pack_texts(corpus.eval, tokenizer, LENGTH),
            data_collator=DataCollatorForReplacedTokenDetection(tokenizer),
        )
        start = time.perf_counter()
        trainer.train()
        minutes[name] = (time.perf_counter() - start) / 60
        measured[name] = trainer.evaluate()
        (model.generator if name == "mlm" else model.discriminator).base_model.save_pretrained(folder / name)

    documents = stdlib_corpus(LENGTH, max_per_label=examples)
    sides = {
        name: tokenize_texts(side, tokenizer, LENGTH)
        for name, side in (("train", documents.train), ("eval", documents.eval))
    }
    count = [len(side) for side in sides.values()]
    print(f"\n{count[0]} documents of {LENGTH} tokens, {count[1]} held out, {len(documents.labels)} labels")
    ids = [(sides[name]["input_ids"], sides[name]["labels"]) for name in ("train", "eval")]
    print(f"bag of tokens: {bag_of_tokens_accuracy(*ids[0], *ids[1], len(tokenizer)):.1%}\n")
    print("| encoder | steps | minutes | linear probe | fine-tuned (mean, each) |\n| --- | --- | --- | --- | --- |")
    for name in ("untrained", "mlm", "electra"):
        linear = probe(AutoModel.from_pretrained(folder / name), sides, tokenizer)
        tuned = [
            fine_tune(folder / name, sides, tokenizer, len(documents.labels), seed, epochs) for seed in range(seeds)
        ]
        each = ", ".join(f"{value:.1%}" for value in tuned)
        row = f"{counts.get(name, 0)} | {minutes[name]:.1f} | {linear:.1%} | {np.mean(tuned):.1%} ({each})"
        print(f"| {name} | {row} |", flush=True)
    for name, figures in measured.items():
        kept = {key: round(value, 3) for key, value in figures.items() if key.startswith(("eval_gen", "eval_rep"))}
        print(f"\n{name}, held out: {kept}")
    print(environment_line("python benchmarks/electra_mlm.py", sys.argv[1:], None))


if __name__ == "__main__":
    run_script(app)
