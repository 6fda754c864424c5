"""The demo from end to end: corpus, fine-tuning, saving and loading back, baselines, measurements, summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_efficient_attn.bench import (
    GIB,
    MIB,
    Bounds,
    ModelSize,
    Result,
    available_bytes,
    make_cases,
    plot,
    print_tables,
    require_extras,
    run_cases,
    write_csv,
)

from .baselines import bag_of_tokens_accuracy, majority_accuracy
from .corpus import Corpus, stdlib_corpus
from .training import TimeLimit, finetune


@dataclass(frozen=True)
class DemoSettings:
    """How much the demo does.

    Args:
        max_length: tokens a document.
        num_packages: labels.
        max_per_label: documents of each label and side; None for all.
        epochs: passes over the training side.
        train_seconds: training ends after so long, finished or not.
        bench_lengths: tokens at which time and memory are measured.
        bench_repeats: timed runs of each measurement.
        case_seconds: a measurement stops repeating after so long.
        bounds: of one forward pass or training step; None for 15 s and 6 GiB, less where less memory is free.
        total_seconds: no measurement is started after so long from the demo's start.
        compared: documents on which the loaded model and the pipeline are compared.
    """

    max_length: int = 2048
    num_packages: int = 10
    max_per_label: int | None = 50
    epochs: float = 6
    train_seconds: float = 95.0
    bench_lengths: tuple[int, ...] = (1024, 4096, 16384)
    bench_repeats: int = 3
    case_seconds: float = 4.0
    bounds: Bounds | None = None
    total_seconds: float = 195.0
    compared: int = 32


QUICK = DemoSettings(
    max_length=512,
    num_packages=3,
    max_per_label=8,
    epochs=1,
    bench_lengths=(256, 512),
    bench_repeats=2,
    case_seconds=1.0,
    compared=8,
)


@dataclass
class DemoReport:
    """What the demo found out: accuracies on the held-out side, measurements, files."""

    accuracy: float
    majority: float
    bag_of_tokens: float
    stopped_early: bool
    results: list[Result] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


def run_demo(
    output_dir: str | Path = "demo-output",
    *,
    settings: DemoSettings | None = None,
    bench: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> DemoReport:
    """Run the whole demo on the CPU: under four minutes on two cores with the settings' defaults.

    Args:
        output_dir: gets the folder `model`, and `benchmark.csv` and `benchmark.png`.
        settings: how much to do; `QUICK` is a trial run.
        bench: also measure time and memory.
        seed: of everything random.
        say: receives the lines to show.

    Raises:
        ValueError: a package of the extra `demo` is missing, or the standard library is not there as source files.
        RuntimeError: the saved model does not give the predictions of the trained one.
    """
    require_extras("rich", "matplotlib", "sklearn")
    started = time.monotonic()
    settings = settings or DemoSettings()
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    say("1. Documents: source files of Python's standard library, to be told apart by package")
    corpus = stdlib_corpus(
        settings.max_length, num_packages=settings.num_packages, max_per_label=settings.max_per_label, seed=seed
    )
    say(describe_corpus(corpus))

    say("\n2. Fine-tuning a new EffLongformer classifier")
    limit = settings.train_seconds
    trainer = finetune(corpus, output_dir / "model", epochs=settings.epochs, max_seconds=limit, seed=seed)
    stopped_early = any(c.reached for c in trainer.callback_handler.callbacks if isinstance(c, TimeLimit))
    if stopped_early:
        say(
            f"   Training was ended after {limit:.0f} s, step {trainer.state.global_step} of {trainer.state.max_steps}."
        )
    predicted = trainer.predict(trainer.eval_dataset)
    logits = torch.as_tensor(predicted.predictions)

    say("\n3. Loading it back from disk")
    chosen = range(0, len(corpus.eval), max(len(corpus.eval) // settings.compared, 1))
    difference = check_saved_model(output_dir / "model", corpus.eval.select(chosen), logits[list(chosen)])
    say(
        f"   AutoModelForSequenceClassification and pipeline('text-classification') give the trained model's\n"
        f"   predictions on {len(chosen)} held-out documents (largest difference of a probability {difference:.1e})."
    )

    report = DemoReport(predicted.metrics["test_accuracy"], *_baselines(corpus, trainer), stopped_early)
    report.files["model"] = output_dir / "model"
    say(f"\n   Held-out accuracy, {len(corpus.eval)} documents from files not trained on:")
    say(accuracy_lines(report))

    if bench:
        say("\n4. Time and peak memory of models of this size, one process a measurement")
        remaining = settings.total_seconds - (time.monotonic() - started)
        report.results = _measure(trainer.model.config, corpus, settings, max(remaining, 10.0))
        print_tables(report.results)
        report.files["csv"] = write_csv(report.results, output_dir / "benchmark.csv")
        title = f"hidden size {trainer.model.config.hidden_size}, {trainer.model.config.num_hidden_layers} layers, CPU"
        report.files["plot"] = plot(report.results, output_dir / "benchmark.png", title)

    say(f"\nSummary after {time.monotonic() - started:.0f} s")
    say(accuracy_lines(report))
    if report.results:
        say(speed_lines(report.results))
    say("\n".join(f"   {name:<6} {path}" for name, path in report.files.items()))
    return report


def describe_corpus(corpus: Corpus) -> str:
    """The number of documents of each label on either side, in lines."""
    counts = []
    for index, label in enumerate(corpus.labels):
        train, held_out = (list(side["label"]).count(index) for side in (corpus.train, corpus.eval))
        counts.append(f"{label} {train}+{held_out}")
    return (
        f"   {len(corpus.train)} documents to train on, {len(corpus.eval)} held out (whole files, so that none is on "
        f"both sides),\n   up to {corpus.tokenizer.model_max_length:,} tokens each; "
        f"byte-level BPE tokenizer trained on the training side, {len(corpus.tokenizer):,} tokens.\n"
        f"   train + held out: {', '.join(counts[: len(counts) // 2])},\n   {', '.join(counts[len(counts) // 2 :])}"
    )


def check_saved_model(folder: Path, documents: Dataset, logits: torch.Tensor) -> float:
    """Load the folder with the Auto class and as a pipeline, and compare both with the trained model.

    Args:
        folder: where the model and its tokenizer were saved.
        documents: with columns `text` and `label`.
        logits: the trained model's for these documents, `[documents, labels]`.

    Returns:
        The largest difference of a label's probability.

    Raises:
        RuntimeError: a predicted label differs, or a probability by more than 1e-3.
    """
    texts = list(documents["text"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    loaded = []
    with torch.inference_mode():
        for text in texts:
            loaded.append(model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0])
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    classified = classify(texts, truncation=True, batch_size=4)

    expected, again = logits.softmax(-1), torch.stack(loaded).softmax(-1)
    difference = (again - expected).abs().max().item()
    for row, answer in enumerate(classified):
        difference = max(difference, abs(answer["score"] - expected[row].max().item()))
        names = {model.config.id2label[int(row_scores.argmax())] for row_scores in (expected[row], again[row])}
        if names != {answer["label"]} or difference > 1e-3:
            raise RuntimeError(
                f"Document {row} is classified differently after loading from {folder}: {names | {answer['label']}}, "
                f"probabilities differ by {difference:.1e}. Run the demo again with an empty output folder."
            )
    return difference


def accuracy_lines(report: DemoReport) -> str:
    """The three accuracies, one a line."""
    return (
        f"   EffLongformer            {report.accuracy:6.1%}\n"
        f"   most frequent label      {report.majority:6.1%}\n"
        f"   bag of tokens            {report.bag_of_tokens:6.1%}  "
        "(scikit-learn logistic regression on log(1 + token count))"
    )


def speed_lines(results: list[Result]) -> str:
    """The longest length's measurements, one line a mode."""
    lines = []
    for mode, name in (("forward", "forward pass"), ("train", "training step")):
        chosen = [result for result in results if result.case.mode == mode]
        longest = max((result.case.length for result in chosen), default=0)
        figures = []
        for result in (r for r in chosen if r.case.length == longest):
            memory = "" if result.peak_bytes is None else f", {result.peak_bytes / MIB:,.0f} MiB"
            what = result.verdict if result.median is None else f"{result.median:.2g} s{memory}"
            figures.append(f"{result.case.kind} {what}")
        if figures:
            lines.append(f"   {name} at {longest:,} tokens:\n      {'; '.join(figures)}")
    return "\n".join(lines)


def _baselines(corpus: Corpus, trainer: object) -> tuple[float, float]:
    train, held_out = trainer.train_dataset, trainer.eval_dataset
    labels = list(train["labels"]), list(held_out["labels"])
    ids = list(train["input_ids"]), list(held_out["input_ids"])
    bag = bag_of_tokens_accuracy(ids[0], labels[0], ids[1], labels[1], len(corpus.tokenizer))
    return majority_accuracy(labels[1]), bag


def _measure(config: object, corpus: Corpus, settings: DemoSettings, seconds: float) -> list[Result]:
    from tqdm.auto import tqdm

    window = config.attention_window
    size = ModelSize(
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        attention_window=window if isinstance(window, int) else window[0],
    )
    cases = make_cases(["eff_longformer", "longformer", "bert"], settings.bench_lengths, sizes=[size])
    free = available_bytes()
    bounds = settings.bounds or Bounds(15.0, 6 * GIB if free is None else min(6 * GIB, int(0.6 * free)))
    with tqdm(total=len(cases), desc="Measuring") as bar:
        return run_cases(
            cases,
            bounds,
            repeats=settings.bench_repeats,
            case_seconds=settings.case_seconds,
            total_seconds=seconds,
            on_result=lambda _: bar.update(),
        )
