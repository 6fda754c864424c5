"""Fine-tune a tagger of long documents with Trainer: one label for each word.

    python examples/finetune_token_classification.py                          # no data needed, 98 s of CPU time
    python examples/finetune_token_classification.py --dataset tagged.jsonl --tokens-column words --tags-column ner
    python examples/finetune_token_classification.py --dataset conll2003 --tags-column ner_tags --model my-checkpoint

--dataset takes whatever `datasets.load_dataset` can read: a column with lists of words, and one with as many labels,
names or class ids. Without it the documents are source files of Python's standard library, and the labels what each
name refers to: a parameter, a local or global variable, a builtin, something imported, ... which a line far above may
decide. --model takes any folder or Hub name that AutoModelForTokenClassification can load, of this package's families
or another. Without it a small new model of --family is trained, with a tokenizer trained on the words.

Documents longer than --max-length are read in several pieces, each word in one of them. Prints F1 over single words,
of the model and of what a dictionary does: each word's most frequent label.

On several GPUs: accelerate launch examples/finetune_token_classification.py ... On CPU cores shared with other programs
set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, IterableDataset
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_efficient_attn import recipes
from hf_efficient_attn.demo import names_corpus, train_tokenizer


IGNORED = -100  # the label of what is not predicted, as the losses know it
OUTSIDE = ("O", "other")  # labels of words that are none of what is looked for


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__,
        output_dir="tagger",
        epochs=6,
        batch_size=4,
        learning_rate=3e-3,
        tuned_learning_rate=5e-5,
        max_length=1024,
    )
    parser.data.add_argument("--tokens-column", default="tokens", help="lists of words")
    parser.data.add_argument("--tags-column", default="tags", help="lists of labels, as long")
    parser.data.add_argument("--labels", nargs="+", help="all labels, where a stream has names and does not list them")
    parser.add_family("AutoModelForTokenClassification")
    return parser.parse_args()


def number_labels(
    train: Dataset | IterableDataset, held_out: Dataset, column: str, given: list[str] | None
) -> tuple[list[str], dict[Any, int]]:
    """The labels' names in the order of their ids, and the id of what stands in the data."""
    feature = (train.features or {}).get(column)
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return inner.names, {number: number for number in range(inner.num_classes)}
    if given is None and isinstance(train, IterableDataset):
        raise ValueError(f"a stream does not list the labels in column {column!r}: name them all with --labels.")
    if given is None:
        values = sorted({tag for row in train[column] for tag in row})
    else:
        values = recipes.labels_like(given, (tag for row in held_out[column] for tag in row), column)
    return [str(value) for value in values], {value: number for number, value in enumerate(values)}


def tag_pieces(
    side: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, ids: dict[Any, int], args: argparse.Namespace
) -> Dataset | IterableDataset:
    """Each document as pieces of at most `args.max_length` tokens; a word has its label at its first token."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        documents, tags = batch[args.tokens_column], batch[args.tags_column]
        for words, found in zip(documents, tags, strict=True):
            if len(words) != len(found):
                raise ValueError(f"a row has {len(words)} words and {len(found)} labels: give one label a word.")
            if None in words or None in found:
                raise ValueError("a row has a word or a label that is empty (null): remove it.")
            if unknown := set(found) - ids.keys():
                raise ValueError(f"the training side has no label {unknown.pop()!r}: remove the rows, or split anew.")
        encoding = tokenizer(
            documents,
            is_split_into_words=True,
            truncation=True,
            max_length=args.max_length,
            return_overflowing_tokens=True,
        )
        pieces = []
        begun = (-1, -1)  # a long word may go on in the next piece, where it has no label
        for piece, document in enumerate(encoding["overflow_to_sample_mapping"]):
            row = []
            for word in encoding.word_ids(piece):
                new = word is not None and (document, word) > begun
                begun = (document, word) if new else begun
                row.append(ids[tags[document][word]] if new else IGNORED)
            pieces.append(row)
        kept = [name for name in encoding if name != "overflow_to_sample_mapping"]
        return {**{name: encoding[name] for name in kept}, "labels": pieces}

    return side.map(encode, batched=True, remove_columns=recipes.column_names(side))


def word_f1(found: np.ndarray, wanted: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Means of F1 over single words: of the labels alike, and by how often they are; without the outside label."""
    kept = wanted != IGNORED
    inside = [number for number, label in enumerate(labels) if label not in OUTSIDE]
    scores = recipes.label_f1(found[kept], wanted[kept], len(labels))[inside]
    weights = np.array([np.sum(wanted[kept] == number) for number in inside])
    return {
        "f1": float(np.nanmean(scores)),
        "weighted_f1": float(np.nansum(scores * weights) / max(1, weights.sum())),
        "accuracy": float(np.mean(found[kept] == wanted[kept])),
    }


def dictionary_f1(
    train: Dataset | IterableDataset,
    held_out: Dataset,
    labels: list[str],
    ids: dict[Any, int],
    args: argparse.Namespace,
) -> dict[str, float]:
    """The same figures of giving each word its most frequent label, and new words that of rare words."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for row in train.take(10_000):
        for word, tag in zip(row[args.tokens_column], row[args.tags_column], strict=True):
            counts[word][tag] += 1
    rare = Counter(tag for tags in counts.values() if tags.total() == 1 for tag in tags)
    unknown = (rare or sum(counts.values(), Counter())).most_common(1)[0][0]
    best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    found = [best.get(word, unknown) for row in held_out[args.tokens_column] for word in row]
    wanted = [tag for row in held_out[args.tags_column] for tag in row]
    return word_f1(*(np.array([ids[tag] for tag in tags]) for tags in (found, wanted)), labels)


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None, dict[str, float]]:
    """The Trainer, the checkpoint to go on from, and the figures of the dictionary."""
    checkpoint = recipes.checkpoint_to_resume(args)
    arguments = recipes.training_arguments(args, best="f1", greater_is_better=True)
    with arguments.main_process_first():
        if args.dataset:
            sides = recipes.read_sides(args)
            kinds = {"--tokens-column": args.tokens_column, "--tags-column": args.tags_column}
            recipes.check_columns(sides, kinds, list)
        else:
            sides = names_corpus(max_per_package=12, seed=args.seed)
        train, held_out = recipes.limit_sides(args, *sides)
    labels, ids = number_labels(train, held_out, args.tags_column, args.labels)
    tokenizer = recipes.load_tokenizer(
        checkpoint or args.model,
        lambda: train_tokenizer((word for row in train.take(10_000) for word in row[args.tokens_column]), 4096),
    )
    set_seed(args.seed)
    model = recipes.make_model(AutoModelForTokenClassification, args, arguments, tokenizer, labels)
    with arguments.main_process_first():
        pieces = [tag_pieces(side, tokenizer, ids, args) for side in (train, held_out)]
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(train)} documents to learn, {recipes.rows_of(held_out)} held out; {len(labels)} labels; "
            f"{model.num_parameters():,} parameters; pieces of at most {args.max_length} tokens"
        )

    def figures(prediction: EvalPrediction) -> dict[str, float]:
        return word_f1(prediction.predictions, prediction.label_ids, labels)

    trainer = Trainer(
        model,
        arguments,
        train_dataset=pieces[0],
        eval_dataset=pieces[1],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(
            tokenizer, pad_to_multiple_of=recipes.padding_step(args.max_length)
        ),
        compute_metrics=figures,
        preprocess_logits_for_metrics=recipes.best_labels,
    )
    return trainer, recipes.checkpoint_to_resume(args, model), dictionary_f1(train, held_out, labels, ids, args)


def main() -> None:
    args = read_arguments()
    trainer, checkpoint, dictionary = prepare(args)
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "f1"))
    if not trainer.is_world_process_zero():
        return
    print("\nheld out            F1   weighted F1   accuracy")
    model = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    for name, found in {"model": model, "dictionary": dictionary}.items():
        print(f"  {name:12} {found['f1']:7.1%} {found['weighted_f1']:13.1%} {found['accuracy']:10.1%}")
    print(f"\nModel, figures and training.png: {args.output_dir}. To use it:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import pipeline")
    print(f'    pipeline("token-classification", model="{args.output_dir}")("some text")')


if __name__ == "__main__":
    main()
