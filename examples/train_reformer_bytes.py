"""Train a byte-level language model on contexts of many thousand bytes: a Reformer, from nothing.

    python examples/train_reformer_bytes.py                                # Python's own documentation
    python examples/train_reformer_bytes.py --text book.txt other.txt --max-steps 2000 --output-dir my-reformer
    python examples/train_reformer_bytes.py --output-dir my-reformer --resume
    python examples/train_reformer_bytes.py --max-length 16384 --max-steps 250 --hidden-size 192 --layers 4   # long

Without --text (files of any encoding) or --dataset (whatever `datasets.load_dataset` can read) it is the language
reference that ships with Python. The last tenth is held out. Prints bits per byte there: of the model, of the bytes'
frequencies (unigram) and of bzip2, which has read the rest before. Saves the best model and its tokenizer, and
continues a piece of the held-out text. --model goes on with what this example saved. The model reads a context at
once, where a byte's place in the sorted order of an LSH layer depends on later bytes, though it attends none of them:
bits are those of this form.

On several GPUs: accelerate launch examples/train_reformer_bytes.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import bz2
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    Trainer,
    set_seed,
)

from hf_efficient_attn import EffReformerConfig, EffReformerForCausalLM, RedrawRotations, byte_tokenizer, recipes


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__,
        output_dir="reformer-bytes",
        max_steps=150,
        batch_size=1,
        learning_rate=4e-3,
        max_length=8192,
        streaming=False,
    )
    parser.data.add_argument("--text", nargs="+", type=Path, help="files to learn, any encoding, in place of --dataset")
    parser.data.add_argument("--text-column", default="text", help="of --dataset")
    parser.model.add_argument(
        "--hidden-size", type=recipes.count, default=128, help="of a new model (default: %(default)s)"
    )
    parser.model.add_argument("--layers", type=recipes.count, default=2, help="local and LSH in turn (default: 2)")
    parser.model.add_argument("--hashes", type=recipes.count, default=1, help="rounds of hashing (default: 1)")
    args = parser.parse_args()
    args.max_length = args.max_length or args.new_length
    if args.max_length < 8:
        parser.error(f"--max-length {args.max_length}: give 8 bytes or more")
    if args.hidden_size % 4:
        parser.error(f"--hidden-size {args.hidden_size}: give a multiple of 4, the number of heads")
    if args.text and args.dataset:
        parser.error("--text and --dataset are two sources: give one of them")
    for path in args.text or []:
        if not path.is_file():
            parser.error(f"--text: there is no file {path}")
    return args


def read_bytes(args: argparse.Namespace) -> tuple[bytes, bytes]:
    """The text to learn and the held-out one."""
    if args.dataset:
        sides = recipes.read_sides(args, eval_share=0.1, txt_rows="paragraph")
        recipes.check_columns(sides, {"--text-column": args.text_column})
        text, held_out = ("\n".join(side[args.text_column]).encode() for side in sides)
    else:
        if args.text:
            whole = b"\n".join(path.read_bytes() for path in args.text)
        else:
            from pydoc_data.topics import topics

            whole = "\n".join(topics[name] for name in sorted(topics)).encode()
        text, held_out = whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]
    if len(text) < 2 or len(held_out) < 2:
        total = len(text) + len(held_out)
        raise ValueError(f"the text has {total} bytes: give more, of which a tenth can be held out.")
    return text, held_out


def as_ids(text: bytes) -> torch.Tensor:
    """What the tokenizer gives for UTF-8, but for bytes of any encoding and without special tokens."""
    return torch.tensor(list(text), dtype=torch.long) + 2


class Contexts(Dataset):
    """Pieces of a text from random places: the same ones for the same seed, whatever came before."""

    def __init__(self, ids: torch.Tensor, context: int, count: int, seed: int) -> None:
        self.ids, self.context, self.count, self.seed = ids, min(context, len(ids)), count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        start = int(torch.randint(len(self.ids) - self.context + 1, (), generator=generator))
        piece = self.ids[start : start + self.context]
        return {"input_ids": piece, "labels": piece}


def following(ids: torch.Tensor, context: int) -> list[dict[str, torch.Tensor]]:
    """Contexts that follow each other through the whole text."""
    return [{"input_ids": piece, "labels": piece} for piece in ids.split(context) if len(piece) > 1]


def byte_figures(prediction: EvalPrediction) -> dict[str, float]:
    """Bits per byte: the mean over all bytes that have one before them in their context."""
    found = recipes.token_figures(prediction)
    return {**found, "bits_per_byte": found["nll"] / math.log(2)}


def unigram_bits(train: torch.Tensor, test: torch.Tensor) -> float:
    """Bits per byte by how often each byte stands in the training text, each at least once."""
    counts = torch.bincount(train, minlength=258).double() + 1
    return float(-(counts / counts.sum()).log2()[test].mean())


def bzip2_bits(train: bytes, test: bytes) -> float:
    """Bits per byte that the text adds to the training text under bzip2."""
    return 8 * (len(bz2.compress(train + test)) - len(bz2.compress(train))) / len(test)


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None, bytes, bytes]:
    """The Trainer, the checkpoint to go on from, and both texts."""
    recipes.checkpoint_to_resume(args)
    text, held_out = read_bytes(args)
    if args.epochs is not None:
        args.max_steps = math.ceil(args.epochs * len(text) / (args.max_length * args.batch_size * args.accumulate))
    arguments = recipes.training_arguments(
        args,
        best="bits_per_byte",
        train_sampling_strategy="sequential",  # they are drawn at random already
        lr_scheduler_type="cosine",
        warmup_steps=args.max_steps // 20,
        weight_decay=0.01,
        ddp_find_unused_parameters=False,
        label_names=["labels"],
    )
    tokenizer = byte_tokenizer(model_max_length=args.max_length)
    set_seed(args.seed)
    if args.model is not None:
        model = EffReformerForCausalLM.from_pretrained(args.model)
        if model.config.vocab_size != len(tokenizer) or model.config.max_input_length < args.max_length:
            raise ValueError(
                f"{args.model} has {model.config.vocab_size} tokens and takes {model.config.max_input_length} of them: "
                f"it has to read {len(tokenizer)}, those of bytes, and --max-length {args.max_length}."
            )
    else:
        config = EffReformerConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            intermediate_size=4 * args.hidden_size,
            num_hashes=args.hashes,
            max_position_embeddings=args.max_length,
            hidden_dropout_prob=0.0,
            initializer_range=0.08,
            axial_norm_std=0.02,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = EffReformerForCausalLM(config)
    if arguments.process_index == 0:
        print(
            f"{len(text):,} bytes to learn, {len(held_out):,} held out; {model.num_parameters():,} parameters, "
            f"{args.max_steps} steps of {args.batch_size} x {min(args.max_length, len(text)):,} bytes"
        )
    contexts = args.max_steps * args.batch_size * args.accumulate * arguments.world_size
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Contexts(as_ids(text), args.max_length, contexts, args.seed),
        eval_dataset=following(as_ids(held_out), args.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=byte_figures,
        preprocess_logits_for_metrics=partial(recipes.token_sums, shift=True),
        callbacks=[RedrawRotations(every=1)],
    )
    return trainer, recipes.checkpoint_to_resume(args, model), text, held_out


def main() -> None:
    args = read_arguments()
    trainer, checkpoint, text, held_out = prepare(args)
    start = time.perf_counter()
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "bits_per_byte"))
    minutes = (time.perf_counter() - start) / 60
    if not trainer.is_world_process_zero():
        return
    ids = as_ids(held_out)
    print(f"\nbits per byte, held out   model {metrics['eval_bits_per_byte']:.3f}   trained in {minutes:.1f} minutes")
    print(f"                        unigram {unigram_bits(as_ids(text), ids):.3f}")
    print(f"                          bzip2 {bzip2_bits(text, held_out):.3f}")
    model = AutoModelForCausalLM.from_pretrained(args.output_dir).to(trainer.args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    room = min(128, args.max_length // 4)
    prompt = ids[None, : 2 * room].to(model.device)
    set_seed(args.seed)
    continued = model.generate(prompt, max_new_tokens=room, do_sample=True, top_p=0.9, temperature=0.7)[0]
    print(f"\n{tokenizer.decode(prompt[0])} -->{tokenizer.decode(continued[prompt.shape[1] :])}")
    print(f"\nModel, tokenizer, figures and training.png: {args.output_dir}")


if __name__ == "__main__":
    main()
