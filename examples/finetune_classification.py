"""Fine-tune a long-document classifier with Trainer.

    python examples/finetune_classification.py                                  # no data needed, about two minutes
    python examples/finetune_classification.py --dataset reviews.csv --text-column review --label-column stars
    python examples/finetune_classification.py --dataset imdb --model my-checkpoint --max-length 4096 --output-dir out

--dataset takes whatever `datasets.load_dataset` can read, and a folder with one subfolder of .txt files for each label.
Without it the documents are source files of Python's standard library, to be told apart by package. --model takes any
folder or Hub name that AutoModelForSequenceClassification can load, of this package's families or another. Without it a
small EffLongformer is trained from scratch, with a tokenizer trained on the texts.

On CPU cores shared with other programs set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_efficient_attn import EffLongformerForSequenceClassification, layerwise_parameter_groups
from hf_efficient_attn.demo import accuracy, load_sides, small_config, stdlib_corpus, tokenize_texts, train_tokenizer


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1, for argparse."""
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="csv, tsv, json, jsonl or parquet file; folder; name on the Hub")
    data.add_argument("--dataset-config", help="configuration of a Hub data set that has several")
    data.add_argument("--eval-dataset", help="file with the evaluation side, where --dataset is a file")
    data.add_argument("--train-split", default="train")
    data.add_argument("--eval-split", help="default: validation or test, else a fifth of the training side")
    data.add_argument("--text-column", default="text")
    data.add_argument("--label-column", default="label", help="strings or whole numbers")
    data.add_argument("--max-train-examples", type=count, help="use only so many, for a trial")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="folder or Hub name; default: a new small EffLongformer")
    model.add_argument("--max-length", type=count, help="tokens; default: 1024, or what --model can take")
    training = parser.add_argument_group("training")
    training.add_argument("--output-dir", default="finetuned")
    training.add_argument("--epochs", type=positive, default=6)
    training.add_argument("--batch-size", type=count, default=4)
    training.add_argument("--learning-rate", type=positive, help="default: 2e-3 for a new model, 5e-5 for --model")
    training.add_argument(
        "--layer-decay", type=share, default=1.0, help="learning rate of each layer over the next one's, such as 0.8"
    )
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    training.add_argument("--bf16", action="store_true")
    training.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    training.add_argument("--push-to-hub", action="store_true")
    training.add_argument("--hub-model-id", help="default: the name of --output-dir")
    return parser.parse_args()


def number_labels(splits: DatasetDict, text_column: str, label_column: str) -> tuple[DatasetDict, list[str]]:
    """The splits with labels 0, 1, ..., and the labels' names in that order."""
    for name, split in splits.items():
        for column in (text_column, label_column):
            if column not in split.column_names:
                columns = ", ".join(split.column_names)
                raise SystemExit(
                    f"Error: the {name} side has no column {column!r}, it has {columns}: "
                    "name the columns with --text-column and --label-column."
                )
            if empty := sum(value is None for value in split[column]):
                raise SystemExit(f"Error: column {column!r} is empty in {empty} rows of the {name} side: remove them.")
    feature = splits["train"].features[label_column]
    if isinstance(feature, ClassLabel):
        return splits, feature.names
    if getattr(feature, "dtype", "list").startswith(("float", "list")):
        raise SystemExit(
            f"Error: column {label_column!r} has to hold strings or whole numbers, but it holds {feature}."
        )
    values = sorted(set(splits["train"][label_column]))
    if unseen := set(splits["eval"][label_column]) - set(values):
        raise SystemExit(f"Error: the labels {sorted(unseen)} are on the eval side only: remove them or split anew.")
    ids = {value: index for index, value in enumerate(values)}
    # A new column, as the old one may be of another type.
    for name, split in splits.items():
        numbers = [ids[value] for value in split[label_column]]
        splits[name] = split.remove_columns(label_column).add_column(label_column, numbers)
    return splits, [str(value) for value in values]


class LayerwiseTrainer(Trainer):
    """Trainer with a learning rate that falls by the factor `layer_decay` from layer to layer, from the head down."""

    layer_decay = 1.0

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The optimizer that the arguments ask for, over groups with a rate each."""
        if self.optimizer is None and self.layer_decay < 1.0:
            rates = (self.args.learning_rate, self.layer_decay, self.args.weight_decay)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(layerwise_parameter_groups(self.model, *rates), **options)
        return super().create_optimizer(*args)


def main() -> None:
    args = read_arguments()

    # Data: two sides with a text and a label column.
    if args.dataset:
        try:
            train, held_out = load_sides(
                args.dataset,
                config=args.dataset_config,
                eval_source=args.eval_dataset,
                train_split=args.train_split,
                eval_split=args.eval_split,
                seed=args.seed,
            )
        except ValueError as error:
            raise SystemExit(f"Error: {error}") from None
        splits, labels = number_labels(DatasetDict(train=train, eval=held_out), args.text_column, args.label_column)
    else:
        corpus = stdlib_corpus(args.max_length or 1024, max_per_label=30, seed=args.seed)
        splits, labels = DatasetDict(train=corpus.train, eval=corpus.eval), corpus.labels
    if args.max_train_examples:
        size = min(args.max_train_examples, len(splits["train"]))
        splits["train"] = splits["train"].shuffle(seed=args.seed).select(range(size))

    # Model and tokenizer: what --model names, or new ones.
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if args.model:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = AutoConfig.from_pretrained(args.model, **names)
        # Models of this package say how long an input may be; elsewhere the tokenizer knows.
        known = getattr(config, "max_input_length", getattr(config, "max_position_embeddings", None))
        longest = min(tokenizer.model_max_length, known or tokenizer.model_max_length)
        max_length = args.max_length or longest
        if max_length > longest:
            raise SystemExit(f"Error: --max-length is {max_length}, but {args.model} takes {longest} tokens at most.")

        # A head for another number of labels is replaced by a new one.
        load = partial(
            AutoModelForSequenceClassification.from_pretrained, args.model, config=config, ignore_mismatched_sizes=True
        )
    else:
        max_length = args.max_length or 1024
        tokenizer = train_tokenizer(splits["train"][args.text_column], max_length=max_length)
        load = partial(EffLongformerForSequenceClassification, small_config(tokenizer, labels, max_length))

    def build() -> PreTrainedModel:
        model = load()
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    data = {
        name: tokenize_texts(split, tokenizer, max_length, args.text_column, args.label_column)
        for name, split in splits.items()
    }

    trainer = LayerwiseTrainer(
        model_init=build,  # a function: Trainer seeds before it calls it
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate or (5e-5 if args.model else 2e-3),
            warmup_steps=0.1,  # a share of all steps
            adam_beta2=0.98,
            bf16=args.bf16,
            use_cpu=args.cpu,
            dataloader_pin_memory=torch.cuda.is_available() and not args.cpu,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            logging_steps=20,
            report_to="none",
            seed=args.seed,
            push_to_hub=args.push_to_hub,
            hub_model_id=args.hub_model_id,
        ),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.layer_decay = args.layer_decay
    checkpoint = None
    if args.resume:
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if checkpoint is None:
            raise SystemExit(f"Error: {args.output_dir} holds no checkpoint to go on from: leave --resume out.")
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()  # the model, its config and the tokenizer: all that from_pretrained and pipeline need
    if args.push_to_hub:
        trainer.push_to_hub()

    print(f"\nHeld-out accuracy {metrics['eval_accuracy']:.1%} on {len(data['eval'])} documents, {len(labels)} labels.")
    print(f"Saved in {args.output_dir}. To use it:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import pipeline")
    print(f'    pipeline("text-classification", model="{args.output_dir}")("some text", truncation=True)')


if __name__ == "__main__":
    main()
