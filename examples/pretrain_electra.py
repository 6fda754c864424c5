"""Pretrain an ELECTRA from nothing: a generator and a discriminator together, on any text.

    python examples/pretrain_electra.py                                    # Python's own documentation, a few minutes
    python examples/pretrain_electra.py --dataset my-texts.txt --size small --steps 100000 --output-dir my-electra
    python examples/pretrain_electra.py --dataset my/dataset --tokenizer bert-base-uncased --family eff_nystromformer
    python examples/pretrain_electra.py --output-dir my-electra --resume

--dataset takes whatever `datasets.load_dataset` can read. Without it the text is the English that ships with Python:
its documentation and the docstrings of its standard library. A WordPiece vocabulary is trained on it, unless
--tokenizer names one. --size is one of the published ones with their hyperparameters, or `tiny`. --family is any
encoder of this package. Writes checkpoints, the curves (curves.csv and curves.png), the discriminator (to fine-tune
with examples/finetune_classification.py --model OUT/discriminator --layer-decay 0.8) and the generator.

On several GPUs: accelerate launch examples/pretrain_electra.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import csv
import time
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_efficient_attn
from hf_efficient_attn import (
    ELECTRA_SIZES,
    FAMILIES,
    DataCollatorForReplacedTokenDetection,
    EffElectraForJointPreTraining,
    EffElectraJointConfig,
    ElectraTrainer,
)
from hf_efficient_attn.demo import english_corpus, load_sides, pack_texts, train_wordpieces


# A model for trying things out on two cores.
TINY = {"num_hidden_layers": 3, "hidden_size": 128, "embedding_size": 64, "num_attention_heads": 4}
FIGURES = ("generator_loss", "discriminator_loss", "generator_accuracy", "replaced_recall", "original_recall")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="csv, tsv, json, jsonl, parquet or txt file; folder; name on the Hub")
    data.add_argument("--dataset-config", help="configuration of a Hub data set that has several")
    data.add_argument("--eval-dataset", help="file with the evaluation side, where --dataset is a file")
    data.add_argument("--train-split", default="train")
    data.add_argument("--eval-split", help="default: validation or test, else a twentieth of the training side")
    data.add_argument("--text-column", default="text")
    data.add_argument("--tokenizer", help="folder or Hub name; default: word pieces trained on the texts")
    data.add_argument("--vocab-size", type=int, default=8000, help="of the new word pieces (default: %(default)s)")
    data.add_argument("--whole-word", action="store_true", help="mask whole words")
    model = parser.add_argument_group("model")
    model.add_argument("--size", choices=["tiny", *ELECTRA_SIZES], default="tiny")
    model.add_argument(
        "--family", choices=[name for name, row in FAMILIES.items() if row.detector], default="eff_electra"
    )
    model.add_argument("--objective", choices=["electra", "electra_15", "replace_mlm", "all_tokens_mlm"])
    model.add_argument("--sharing", choices=["embeddings", "all", "none"])
    training = parser.add_argument_group("training; defaults are those of --size")
    training.add_argument("--max-length", type=int, help="tokens of an input (tiny: 128)")
    training.add_argument("--steps", type=int, help="optimizer steps (tiny: 300)")
    training.add_argument("--batch-size", type=int, help="inputs a device and step (tiny: 32)")
    training.add_argument("--accumulate", type=int, default=1, help="batches a step (default: %(default)s)")
    training.add_argument("--learning-rate", type=float, help="(tiny: 1e-3)")
    training.add_argument("--output-dir", type=Path, default=Path("electra"))
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    training.add_argument("--bf16", action="store_true")
    training.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    training.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = ELECTRA_SIZES.get(args.size)
    args.max_length = args.max_length or (size.length if size else 128)
    args.steps = args.steps or (size.train_steps if size else 300)
    args.batch_size = args.batch_size or (size.batch_size if size else 32)
    args.learning_rate = args.learning_rate or (size.learning_rate if size else 1e-3)
    args.mask_probability = size.mask_probability if size else 0.15
    args.warmup = min(size.warmup_steps if size else 50, args.steps // 10)
    for name, least in {"max_length": 8, "steps": 1, "batch_size": 1, "accumulate": 1, "vocab_size": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    if not args.learning_rate > 0:
        parser.error(f"--learning-rate {args.learning_rate}: give a number above 0")
    return args


def load_texts(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The training and the evaluation side, each with the text column."""
    if not args.dataset:
        corpus = english_corpus(seed=args.seed)
        args.text_column = "text"
        return corpus.train, corpus.eval
    try:
        sides = load_sides(
            args.dataset,
            config=args.dataset_config,
            eval_source=args.eval_dataset,
            train_split=args.train_split,
            eval_split=args.eval_split,
            eval_share=0.05,
            seed=args.seed,
        )
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from None
    for side in sides:
        if args.text_column not in side.column_names:
            columns = ", ".join(side.column_names)
            raise SystemExit(
                f"Error: there is no column {args.text_column!r}, only {columns}: name it with --text-column."
            )
        if not all(isinstance(text, str) for text in side[args.text_column]):
            raise SystemExit(f"Error: column {args.text_column!r} has rows that are no text: remove them.")
    return sides


def checkpoint_in(folder: Path, model: EffElectraForJointPreTraining) -> str:
    """The last checkpoint, which has to be of such a model."""
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None:
        raise SystemExit(f"Error: {folder} holds no checkpoint to go on from: leave --resume out.")
    weights = Path(last) / "model.safetensors"
    if weights.is_file():
        with safe_open(weights, "pt") as file:
            saved = {name: file.get_slice(name).get_shape() for name in file.keys()}
        shared = model.all_tied_weights_keys
        if saved != {name: list(x.shape) for name, x in model.state_dict().items() if name not in shared}:
            raise SystemExit(f"Error: {last} is of another model: give --resume the options it was begun with.")
    return last


def make_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> EffElectraJointConfig:
    """The config of the joint model."""
    family = getattr(hf_efficient_attn, FAMILIES[args.family].config_name)
    fields = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "max_position_embeddings": args.max_length + 2,
        # Where a family's text begins at a later row, its table needs the rows before it.
        "position_offset": 0,
    }
    options = {name: value for name in ("objective", "sharing") if (value := getattr(args, name))}
    if args.size != "tiny":
        return EffElectraJointConfig.from_size(args.size, family=family, options=options, **fields)
    discriminator = family(**TINY, intermediate_size=512, **fields)
    return EffElectraJointConfig.from_discriminator(discriminator, 1 / 4, **options)


def write_curves(history: list[dict], folder: Path) -> None:
    """The figures of training and evaluation over the steps: a table and, with matplotlib, a picture."""
    names = ["step", "loss", *FIGURES, "eval_loss", *(f"eval_{name}" for name in FIGURES)]
    rows = [entry for entry in history if "loss" in entry or "eval_loss" in entry]
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    try:
        import matplotlib
    except ImportError:
        print("no picture of the curves: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [name for name in FIGURES if any(name in row for row in rows)]
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(3.2 * len(drawn), 3), layout="constrained")
    for axis, name in zip(axes, drawn, strict=True):
        for front, label in (("", "training"), ("eval_", "held out")):
            points = [(row["step"], row[front + name]) for row in rows if front + name in row]
            axis.plot(*zip(*points, strict=True), label=label, marker="." if front else None)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
    axes[0].legend()
    figure.savefig(folder / "curves.png", dpi=120)


def main() -> None:
    args = read_arguments()
    train, held_out = load_texts(args)
    try:
        if args.tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        else:
            tokenizer = train_wordpieces(train[args.text_column], args.vocab_size, args.max_length)
        blocks = [pack_texts(side, tokenizer, args.max_length, args.text_column) for side in (train, held_out)]
        if not all(blocks):
            raise ValueError("there are too few texts for a training and an evaluation side: give more.")
        set_seed(args.seed)
        model = EffElectraForJointPreTraining(make_config(args, tokenizer))
        collator = DataCollatorForReplacedTokenDetection(
            tokenizer, args.mask_probability, whole_word=args.whole_word, seed=args.seed
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from None
    sizes = [part.num_parameters() for part in (model.generator, model.discriminator)]
    print(
        f"{len(blocks[0]):,} blocks of up to {args.max_length} tokens, {len(blocks[1]):,} held out; {len(tokenizer):,} "
        f"tokens; generator {sizes[0]:,} and discriminator {sizes[1]:,} parameters, {model.num_parameters():,} in all"
    )
    trainer = ElectraTrainer(
        model,
        TrainingArguments(
            str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup,
            weight_decay=0.01,
            adam_epsilon=1e-6,
            logging_steps=max(1, args.steps // 30),
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 6),
            save_steps=max(1, args.steps // 6),
            save_total_limit=2,
            bf16=args.bf16,
            use_cpu=args.cpu,
            dataloader_pin_memory=torch.cuda.is_available() and not args.cpu,
            ddp_find_unused_parameters=False,
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=blocks[0],
        eval_dataset=blocks[1],
        processing_class=tokenizer,
        data_collator=collator,
    )
    last = checkpoint_in(args.output_dir, model) if args.resume else None
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    minutes = (time.perf_counter() - start) / 60
    metrics = trainer.evaluate()
    if not trainer.is_world_process_zero():
        return

    model.save_discriminator(args.output_dir / "discriminator")
    model.save_generator(args.output_dir / "generator")
    for name in ("discriminator", "generator"):
        tokenizer.save_pretrained(args.output_dir / name)
    write_curves(trainer.state.log_history, args.output_dir)
    print(f"\nheld out, after {trainer.state.global_step} steps in {minutes:.1f} minutes:")
    for name in ("loss", *FIGURES, "replaced_rate"):
        if f"eval_{name}" in metrics:
            print(f"    {name.replace('_', ' '):20} {metrics[f'eval_{name}']:.3f}")
    print(f"\ncurves.csv, curves.png, generator and discriminator: {args.output_dir}. To use the discriminator:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import AutoModelForSequenceClassification")
    print(f'    AutoModelForSequenceClassification.from_pretrained("{args.output_dir}/discriminator", num_labels=2)')


if __name__ == "__main__":
    main()
