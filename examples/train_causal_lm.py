"""Train a causal language model with Trainer, from nothing or from a checkpoint.

    python examples/train_causal_lm.py                             # Python's documentation, 215 s of CPU time
    python examples/train_causal_lm.py --dataset my-texts.txt --family eff_performer --vocab-size 8000 --epochs 10
    python examples/train_causal_lm.py --dataset my/dataset --model my-checkpoint --streaming --max-steps 10000

--dataset takes whatever `datasets.load_dataset` can read; in a .txt file a document ends at an empty line. Without it
the text is the English that ships with Python: its documentation and the docstrings of its standard library. --model
takes any folder or Hub name that AutoModelForCausalLM can load, of this package's families or another. Without it a
small new model of --family reads bytes, or with --vocab-size a byte-level BPE trained on the texts.

Documents longer than --max-length go on in the next row. Batches have rows of like length, padded to the longest; with
--pack several short documents share a row, without attending each other (in this package's families).
Prints bits per byte of the held-out documents: of the model, of how often each byte stands in the training texts, and
of bzip2, which has read those before. Then the model continues a piece of a held-out document.

On several GPUs: accelerate launch examples/train_causal_lm.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import bz2
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from hf_efficient_attn import RedrawProjections, RedrawRotations, byte_tokenizer, recipes
from hf_efficient_attn.demo import train_tokenizer


# What these families draw at random is drawn anew while they learn.
CALLBACKS = {"eff_performer": RedrawProjections(every=100), "eff_reformer": RedrawRotations(every=1)}


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__,
        output_dir="causal-lm",
        epochs=1,
        batch_size=4,
        learning_rate=3e-3,
        tuned_learning_rate=5e-5,
        max_length=1024,
    )
    parser.data.add_argument("--text-column", default="text")
    parser.data.add_argument("--pack", action="store_true", help="several documents in a row, each on its own")
    parser.add_family("AutoModelForCausalLM")
    parser.model.add_argument("--vocab-size", type=recipes.count, help="tokens of a new byte-level BPE; default: bytes")
    return parser.parse_args()


def make_tokenizer(train: Dataset | IterableDataset, args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Bytes, or the pieces of bytes that the training texts have most."""
    if args.vocab_size is None:
        return byte_tokenizer()
    return train_tokenizer((row[args.text_column] for row in train.take(10_000)), args.vocab_size)


def baseline_bits(train: Dataset | IterableDataset, held_out: Dataset, column: str) -> dict[str, float]:
    """Bits per byte by the bytes' frequencies, each at least once, and what the held-out text adds under bzip2."""
    known = "\n".join(row[column] for row in train.take(10_000)).encode()
    new = "\n".join(held_out[column]).encode()
    counts = np.bincount(np.frombuffer(known, np.uint8), minlength=256) + 1.0
    frequencies = -np.log2(counts / counts.sum())[np.frombuffer(new, np.uint8)].mean()
    return {
        "frequencies": float(frequencies),
        "bzip2": 8 * (len(bz2.compress(known + new)) - len(bz2.compress(known))) / len(new),
    }


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None, dict[str, float], str]:
    """The Trainer, the checkpoint to go on from, bits per byte of the baselines, and a held-out text."""
    checkpoint = recipes.checkpoint_to_resume(args)
    arguments = recipes.training_arguments(args, best="bits_per_byte")
    with arguments.main_process_first():
        train, held_out = recipes.read_texts(args)
    tokenizer = recipes.load_tokenizer(checkpoint or args.model, lambda: make_tokenizer(train, args))
    set_seed(args.seed)
    options = {"hidden_size": 128, "num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "is_decoder": True}
    model = recipes.make_model(AutoModelForCausalLM, args, arguments, tokenizer, **options)
    with arguments.main_process_first():
        rows = [
            recipes.continue_texts(side, tokenizer, args.max_length, args.text_column) for side in (train, held_out)
        ]
    collator = DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=recipes.padding_step(args.max_length))
    if args.pack:
        rows[0] = rows[0].remove_columns("labels")  # made for the packed rows
        packed = recipes.pack(DataCollatorWithPadding(tokenizer), model, args.max_length, causal=True)
        collator = recipes.CollatorOfSides(packed, collator)
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(rows[0])} rows of at most {args.max_length} tokens to learn, "
            f"{recipes.rows_of(rows[1])} held out; {len(tokenizer):,} tokens; {model.num_parameters():,} parameters"
        )
    size = sum(len(text.encode()) for text in held_out[args.text_column])

    def figures(prediction: EvalPrediction) -> dict[str, float]:
        found = recipes.token_figures(prediction)
        return {**found, "bits_per_byte": found["nll"] * found["tokens"] / math.log(2) / size}

    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows[0],
        eval_dataset=rows[1],
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=figures,
        preprocess_logits_for_metrics=partial(recipes.token_sums, shift=True),
        callbacks=[CALLBACKS[name] for name in CALLBACKS if name == model.config.model_type],
    )
    bits = baseline_bits(train, held_out, args.text_column)
    return trainer, recipes.checkpoint_to_resume(args, model), bits, max(held_out[args.text_column], key=len)


def continue_text(folder: Path, text: str, max_length: int, device: torch.device) -> tuple[str, str]:
    """The beginning of a text, and how the saved model goes on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    room = min(200, max_length // 3)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompt = [begin, *tokenizer(text, add_special_tokens=False).input_ids[:room]]
    options = {"max_new_tokens": room, "do_sample": True, "top_p": 0.9, "temperature": 0.7}
    ids = model.generate(torch.tensor([prompt], device=device), **options)[0].tolist()
    return tokenizer.decode(prompt[1:]), tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def main() -> None:
    args = read_arguments()
    trainer, checkpoint, baselines, text = prepare(args)
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "bits_per_byte"))
    if not trainer.is_world_process_zero():
        return
    print("\nbits per byte, held out")
    for name, bits in {"model": metrics["eval_bits_per_byte"], **baselines}.items():
        print(f"  {name:12} {bits:.3f}")
    begun, continued = continue_text(args.output_dir, text, args.max_length, trainer.args.device)
    print(f"\n{begun} -->{continued}")
    print(f"\nModel, figures and training.png: {args.output_dir}. To use it:\n")
    print("    import hf_efficient_attn")
    print("    from transformers import pipeline")
    print(f'    pipeline("text-generation", model="{args.output_dir}")("some text", add_special_tokens=False)')


if __name__ == "__main__":
    main()
