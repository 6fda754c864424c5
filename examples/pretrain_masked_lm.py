"""Pretrain a masked language model with Trainer, from nothing or from a checkpoint.

    python examples/pretrain_masked_lm.py                                     # Python's own documentation
    python examples/pretrain_masked_lm.py --dataset my-texts.txt --family eff_big_bird --max-length 4096 --epochs 10
    python examples/pretrain_masked_lm.py --dataset my/dataset --model my-checkpoint --streaming --max-steps 10000

--dataset takes whatever `datasets.load_dataset` can read; in a .txt file a document ends at an empty line. Without it
the text is the English that ships with Python: its documentation and the docstrings of its standard library. --model
takes any folder or Hub name that AutoModelForMaskedLM can load, of this package's families or another. Without it a
small new model of --family is trained, with word pieces trained on the texts.

Documents longer than --max-length are cut into several rows. Batches have rows of like length, padded to the longest;
with --pack several short documents share a row, without attending each other (in this package's families). Masks are
drawn anew in every epoch, and are always the same on the held-out side. Prints how many masked tokens are found there
and the perplexity, of the model and of the tokens' frequencies.

On several GPUs: accelerate launch examples/pretrain_masked_lm.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import math
from collections import Counter

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_efficient_attn import DataCollatorForReplacedTokenDetection, EpochOfMasks, recipes
from hf_efficient_attn.demo import train_wordpieces


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__,
        output_dir="masked-lm",
        epochs=2,
        batch_size=8,
        learning_rate=2e-3,
        tuned_learning_rate=5e-5,
        max_length=256,
    )
    parser.data.add_argument("--text-column", default="text")
    parser.data.add_argument(
        "--mask", type=recipes.share, default=0.15, help="share of the tokens (default: %(default)s)"
    )
    parser.data.add_argument("--whole-word", action="store_true", help="mask whole words")
    parser.data.add_argument("--pack", action="store_true", help="several documents in a row, each on its own")
    parser.add_family("AutoModelForMaskedLM")
    parser.model.add_argument(
        "--vocab-size", type=recipes.count, default=4000, help="of new word pieces (default: %(default)s)"
    )
    return parser.parse_args()


def mask_held_out(rows: Dataset, mask: DataCollatorForReplacedTokenDetection) -> Dataset:
    """The rows with the masks of epoch 0, the same in every evaluation."""
    mask.set_epoch(0)
    masked = []
    for row in rows:
        batch = mask([row])
        tokens = batch["attention_mask"][0].bool()  # without the padding to a multiple
        masked.append({name: batch[name][0, tokens].tolist() for name in ("input_ids", "labels")})
    if not any(label >= 0 for row in masked for label in row["labels"]):
        raise ValueError(
            "nothing is masked on the evaluation side, of little or no text: give more, or a larger --mask."
        )
    return Dataset.from_list(masked)


def frequency_figures(train: Dataset | IterableDataset, held_out: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The figures of guessing every masked token by how often each token stands in the training texts."""
    counts = Counter(token for row in train.take(10_000) for token in row["input_ids"])
    smoothed = np.array([counts[token] + 1.0 for token in range(len(tokenizer))])
    smoothed[tokenizer.all_special_ids] = 1e-3
    labels = np.array([label for row in held_out["labels"] for label in row])
    masked = labels[labels >= 0]
    nll = -np.log(smoothed / smoothed.sum())[masked].mean()
    return {"accuracy": float(np.mean(masked == smoothed.argmax())), "perplexity": math.exp(nll)}


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None, dict[str, float]]:
    """The Trainer, the checkpoint to go on from, and the figures of the tokens' frequencies."""
    checkpoint = recipes.checkpoint_to_resume(args)
    arguments = recipes.training_arguments(args, best="nll")
    with arguments.main_process_first():
        train, held_out = recipes.read_texts(args)
    tokenizer = recipes.load_tokenizer(
        checkpoint or args.model,
        lambda: train_wordpieces((row[args.text_column] for row in train.take(10_000)), args.vocab_size),
    )
    set_seed(args.seed)
    model = recipes.make_model(AutoModelForMaskedLM, args, arguments, tokenizer, hidden_size=96)
    mask = DataCollatorForReplacedTokenDetection(
        tokenizer,
        args.mask,
        args.whole_word,
        mask_share=0.9,
        pad_to_multiple_of=None if args.pack else recipes.padding_step(args.max_length),
        seed=args.seed,
    )
    with arguments.main_process_first():
        rows = [recipes.cut_texts(side, tokenizer, args.max_length, args.text_column) for side in (train, held_out)]
    rows[1] = mask_held_out(rows[1], mask)
    learn = recipes.pack(mask, model, args.max_length) if args.pack else mask
    pad = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=recipes.padding_step(args.max_length))
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(rows[0])} rows of at most {args.max_length} tokens to learn, "
            f"{recipes.rows_of(rows[1])} held out; {len(tokenizer):,} tokens; {model.num_parameters():,} parameters"
        )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        data_collator=recipes.CollatorOfSides(learn, pad),
        compute_metrics=recipes.token_figures,
        preprocess_logits_for_metrics=recipes.token_sums,
        callbacks=[EpochOfMasks(mask)],
    )
    return trainer, recipes.checkpoint_to_resume(args, model), frequency_figures(*rows, tokenizer)


def main() -> None:
    args = read_arguments()
    trainer, checkpoint, frequencies = prepare(args)
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "accuracy"))
    if not trainer.is_world_process_zero():
        return
    print("\nmasked tokens, held out   found   perplexity")
    model = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    for name, found in {"model": model, "frequencies": frequencies}.items():
        print(f"  {name:20} {found['accuracy']:10.1%} {found['perplexity']:12.1f}")
    print(f"\nModel, figures and training.png: {args.output_dir}. To use it:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import pipeline")
    print(f'    pipeline("fill-mask", model="{args.output_dir}")("some {trainer.processing_class.mask_token} text")')


if __name__ == "__main__":
    main()
