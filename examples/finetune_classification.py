"""Fine-tune a long-document classifier with Trainer.

    python examples/finetune_classification.py                                  # no data needed, about two minutes
    python examples/finetune_classification.py --dataset reviews.csv --text-column review --label-column stars
    python examples/finetune_classification.py --dataset imdb --model my-checkpoint --max-length 4096 --output-dir out

--dataset takes whatever `datasets.load_dataset` can read, and a folder with one subfolder of .txt files for each label.
Without it the documents are source files of Python's standard library, to be told apart by package. --model takes any
folder or Hub name that AutoModelForSequenceClassification can load, of this package's families or another. Without it a
small new model of --family is trained, with a tokenizer trained on the texts. Batches have documents of like length,
padded to the longest. The share of the most frequent label is printed beside the result.

On several GPUs: accelerate launch examples/finetune_classification.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
from collections import Counter
from typing import Any

import torch
from datasets import ClassLabel, Dataset, IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_efficient_attn import layerwise_parameter_groups, recipes
from hf_efficient_attn.demo import accuracy, stdlib_corpus, train_tokenizer


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__,
        output_dir="finetuned",
        epochs=6,
        batch_size=4,
        learning_rate=2e-3,
        tuned_learning_rate=5e-5,
        max_length=1024,
    )
    parser.data.add_argument("--text-column", default="text")
    parser.data.add_argument("--label-column", default="label", help="strings or whole numbers")
    parser.data.add_argument("--labels", nargs="+", help="all labels, where a stream has names and does not list them")
    parser.add_family("AutoModelForSequenceClassification")
    parser.training.add_argument(
        "--layer-decay",
        type=recipes.share,
        default=1.0,
        help="learning rate of each layer over the next one's, such as 0.8",
    )
    return parser.parse_args()


def number_labels(
    train: Dataset | IterableDataset, held_out: Dataset, args: argparse.Namespace
) -> tuple[list[str], dict[Any, int]]:
    """The labels' names in the order of their ids, and the id of what stands in the data."""
    column = args.label_column
    feature = (train.features or {}).get(column)
    if isinstance(feature, ClassLabel):
        return feature.names, {number: number for number in range(feature.num_classes)}
    if feature is not None and getattr(feature, "dtype", "list").startswith(("float", "list")):
        raise ValueError(f"column {column!r} has to hold strings or whole numbers, but it holds {feature}.")
    if args.labels is None and isinstance(train, IterableDataset):
        raise ValueError(f"a stream does not list the labels in column {column!r}: name them all with --labels.")
    if args.labels is None:
        values = sorted(set(train[column]))
    else:
        values = recipes.labels_like(args.labels, held_out[column], column)
    if unseen := set(held_out[column]) - set(values):
        raise ValueError(f"the labels {sorted(unseen)} are on the evaluation side only: remove them or split anew.")
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def tokenize(
    side: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, ids: dict[Any, int], args: argparse.Namespace
) -> Dataset | IterableDataset:
    """The texts as tokens, at most `args.max_length` of each, and their labels' ids."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if unknown := set(batch[args.label_column]) - ids.keys():
            raise ValueError(f"the label {unknown.pop()!r} is not among {', '.join(map(str, ids))}.")
        encoding = tokenizer(batch[args.text_column], truncation=True, max_length=args.max_length)
        return {**encoding, "labels": [ids[label] for label in batch[args.label_column]]}

    return side.map(encode, batched=True, remove_columns=recipes.column_names(side))


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


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None]:
    """The Trainer and the checkpoint to go on from."""
    checkpoint = recipes.checkpoint_to_resume(args)
    arguments = recipes.training_arguments(args, best="accuracy", greater_is_better=True)
    with arguments.main_process_first():
        if args.dataset:
            sides = recipes.read_sides(args)
            recipes.check_columns(sides, {"--text-column": args.text_column})
            recipes.check_columns(sides, {"--label-column": args.label_column}, None)
        else:
            corpus = stdlib_corpus(args.max_length or args.new_length, max_per_label=30, seed=args.seed)
            sides = corpus.train, corpus.eval
        labels, ids = number_labels(*sides, args)
        train, held_out = recipes.limit_sides(args, *sides)
    tokenizer = recipes.load_tokenizer(
        checkpoint or args.model,
        lambda: train_tokenizer(row[args.text_column] for row in train.take(10_000)),
    )
    set_seed(args.seed)
    model = recipes.make_model(AutoModelForSequenceClassification, args, arguments, tokenizer, labels)
    with arguments.main_process_first():
        data = [tokenize(side, tokenizer, ids, args) for side in (train, held_out)]
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(train)} documents to learn, {recipes.rows_of(held_out)} held out; {len(labels)} labels; "
            f"{model.num_parameters():,} parameters; at most {args.max_length} tokens"
        )
    trainer = LayerwiseTrainer(
        model,
        arguments,
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=recipes.padding_step(args.max_length)),
        compute_metrics=accuracy,
    )
    trainer.layer_decay = args.layer_decay
    return trainer, recipes.checkpoint_to_resume(args, model)


def main() -> None:
    args = read_arguments()
    trainer, checkpoint = prepare(args)
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "accuracy"))
    if not trainer.is_world_process_zero():
        return
    labels = Counter(trainer.eval_dataset["labels"])
    frequent = labels.most_common(1)[0][1] / labels.total()
    print(f"\nHeld-out accuracy {metrics['eval_accuracy']:.1%} on {labels.total()} documents, ", end="")
    print(f"{trainer.model.config.num_labels} labels; the most frequent label has {frequent:.1%}.")
    print(f"\nModel, figures and training.png: {args.output_dir}. To use it:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import pipeline")
    print(f'    pipeline("text-classification", model="{args.output_dir}")("some text", truncation=True)')


if __name__ == "__main__":
    main()
