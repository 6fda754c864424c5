"""Train a byte-level language model on contexts of 16,384 bytes: a Reformer, from nothing.

    python examples/train_reformer_bytes.py                                # Python's own documentation
    python examples/train_reformer_bytes.py --text book.txt other.txt --steps 2000 --output-dir my-reformer
    python examples/train_reformer_bytes.py --output-dir my-reformer --resume

Without --text it is the language reference that ships with Python. The last tenth is held out. Prints bits per byte
there: of the model, of the bytes' frequencies (unigram) and of bzip2, which has read the rest before. Saves the model
and its tokenizer, and continues a piece of the held-out text. The model reads a context at once, where a byte's place
in the sorted order of an LSH layer depends on later bytes, though it attends none of them: bits are those of this form.

On CPU cores shared with other programs set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import bz2
import math
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_efficient_attn import EffReformerConfig, EffReformerForCausalLM, RedrawRotations, byte_tokenizer


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", nargs="+", type=Path, help="files to learn, any encoding; without: Python's reference"
    )
    parser.add_argument("--context", type=int, default=16384, help="bytes of a context (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=250, help="optimizer steps, one context each (default: %(default)s)"
    )
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4, help="local and LSH ones in turn (default: %(default)s)")
    parser.add_argument("--hashes", type=int, default=1, help="rounds of hashing (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("reformer-bytes"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.layers, arguments.hashes) < 1:
        parser.error("--steps, --layers and --hashes must be 1 or more")
    if arguments.context < 8:
        parser.error(f"--context {arguments.context}: give 8 bytes or more")
    if arguments.hidden_size < 4 or arguments.hidden_size % 4:
        parser.error(f"--hidden-size {arguments.hidden_size}: give a multiple of 4, the number of heads")
    if not arguments.learning_rate > 0 or not 0 <= arguments.seed < 2**32:
        parser.error("--learning-rate must be above 0, and --seed from 0 to 2 ** 32 - 1")
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        parser.error(f"--output-dir: {arguments.output_dir} is a file")
    for path in arguments.text or []:
        if not path.is_file():
            parser.error(f"--text: there is no file {path}")
    return arguments


def read_bytes(paths: list[Path] | None) -> bytes:
    """The files one after the other, or the language reference that ships with Python."""
    if paths:
        return b"\n".join(path.read_bytes() for path in paths)
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


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


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, ids: torch.Tensor, context: int) -> float:
    """Mean over all bytes that have one before them in their context; contexts follow each other."""
    model.eval()
    bits, count = 0.0, 0
    for piece in ids.split(context):
        if len(piece) > 1:
            piece = piece[None].to(model.device)
            bits += model(piece, labels=piece).loss.item() * (piece.shape[1] - 1) / math.log(2)
            count += piece.shape[1] - 1
    return bits / count


def unigram_bits(train: torch.Tensor, test: torch.Tensor) -> float:
    """Bits per byte by how often each byte stands in the training text, each at least once."""
    counts = torch.bincount(train, minlength=258).double() + 1
    return float(-(counts / counts.sum()).log2()[test].mean())


def bzip2_bits(train: bytes, test: bytes) -> float:
    """Bits per byte that the text adds to the training text under bzip2."""
    return 8 * (len(bz2.compress(train + test)) - len(bz2.compress(train))) / len(test)


def main() -> None:
    arguments = read_arguments()
    text = read_bytes(arguments.text)
    tokenizer = byte_tokenizer(model_max_length=arguments.context)
    # What the tokenizer gives for UTF-8, but for bytes of any encoding and without special tokens.
    ids = torch.tensor(list(text), dtype=torch.long) + 2
    split = len(ids) * 9 // 10
    if split < 2 or len(ids) - split < 2:
        raise SystemExit(f"the text has {len(ids)} bytes; give more, of which a tenth can be held out.")

    config = EffReformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        intermediate_size=4 * arguments.hidden_size,
        num_hashes=arguments.hashes,
        max_position_embeddings=arguments.context,
        hidden_dropout_prob=0.0,
        initializer_range=0.08,
        axial_norm_std=0.02,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(arguments.seed)
    model = EffReformerForCausalLM(config)
    print(
        f"{len(ids):,} bytes, {len(ids) - split:,} of them held out; {model.num_parameters():,} parameters, "
        f"{arguments.steps} steps of {min(arguments.context, split):,} bytes"
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output_dir),
            max_steps=arguments.steps,
            per_device_train_batch_size=1,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            weight_decay=0.01,
            adam_beta2=0.98,
            logging_steps=max(1, arguments.steps // 20),
            save_steps=max(1, arguments.steps // 3),
            save_total_limit=1,
            seed=arguments.seed,
            report_to="none",
        ),
        train_dataset=Contexts(ids[:split], arguments.context, arguments.steps, arguments.seed),
        callbacks=[RedrawRotations(every=1)],
    )
    last = get_last_checkpoint(str(arguments.output_dir)) if arguments.resume else None
    if arguments.resume and last is None:
        raise SystemExit(f"--resume: there is no checkpoint in {arguments.output_dir}; leave --resume out.")
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - start
    trainer.save_model()
    tokenizer.save_pretrained(arguments.output_dir)

    model = AutoModelForCausalLM.from_pretrained(arguments.output_dir).to(trainer.args.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output_dir)
    held_out = ids[split:]
    found = bits_per_byte(model, held_out, arguments.context)
    print(f"\nbits per byte, held out   model {found:.3f}   trained in {seconds / 60:.1f} minutes")
    print(f"                        unigram {unigram_bits(ids[:split], held_out):.3f}")
    print(f"                          bzip2 {bzip2_bits(text[:split], text[split:]):.3f}")
    room = min(128, arguments.context // 4)
    prompt = held_out[None, : min(2 * room, len(held_out))].to(model.device)
    torch.manual_seed(arguments.seed)
    continued = model.generate(prompt, max_new_tokens=room, do_sample=True, top_p=0.9, temperature=0.7)[0]
    print(f"\n{tokenizer.decode(prompt[0])} -->{tokenizer.decode(continued[prompt.shape[1] :])}")
    print(f"\nmodel and tokenizer: {arguments.output_dir}")


if __name__ == "__main__":
    main()
