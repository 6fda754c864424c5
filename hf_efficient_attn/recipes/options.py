"""Options that training scripts share, spelled alike in all of them, and errors in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import HTTPError

from hf_efficient_attn import FAMILIES

from .folder import checkpoint_folders


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    if number == math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
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


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2 ** 32 - 1")
    return int(text)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What is wrong with options, files or data ends the program with `Error: ...`; also a decorator.

    For what comes before the training: an error in the middle of it keeps its traceback.
    """
    try:
        yield
    except (OSError, ValueError, HTTPError) as error:  # the last of the Hub's client, where no answer came
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from None


class RecipeParser(argparse.ArgumentParser):
    """The options of a training script; a script adds its own to the groups `data`, `model` and `training`.

    Args:
        description: the script's docstring.
        output_dir, epochs, batch_size, learning_rate: defaults.
        tuned_learning_rate: default for `--model`; None where there is no difference.
        max_length: default for a new model, in tokens; None for a script without such an option.
        max_steps: default in place of `epochs`.
        streaming: whether there is `--streaming`.

    Example:

    ```python
    >>> parser = RecipeParser(__doc__, output_dir="out", epochs=3, batch_size=8, learning_rate=1e-3)
    >>> parser.data.add_argument("--text-column", default="text")
    >>> args = parser.parse_args()
    ```
    """

    def __init__(
        self,
        description: str | None,
        *,
        output_dir: str,
        batch_size: int | None,
        learning_rate: float | None,
        epochs: float | None = None,
        max_steps: int | None = None,
        tuned_learning_rate: float | None = None,
        max_length: int | None = None,
        streaming: bool = True,
    ) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._rates = (learning_rate, tuned_learning_rate or learning_rate)
        self._length = {"epochs": epochs, "max_steps": max_steps}

        self.data = data = self.add_argument_group("data")
        data.add_argument("--dataset", help="file, folder or name on the Hub; default: data that needs no download")
        data.add_argument("--dataset-config", help="configuration of a Hub data set that has several")
        data.add_argument("--eval-dataset", help="file with the evaluation side, where --dataset is a file")
        data.add_argument("--train-split", default="train")
        data.add_argument("--eval-split", help="default: validation or test, else a share of the training side")
        data.add_argument("--max-train-examples", type=count, help="use only so many rows, for a trial")
        data.add_argument("--max-eval-examples", type=count, help="default: all, of a stream 500")
        if streaming:
            exact = "read --dataset while training; --resume is exact within its first pass"
            data.add_argument("--streaming", action="store_true", help=exact)

        self.model = model = self.add_argument_group("model")
        model.add_argument("--model", help="folder or Hub name to start from; default: a new small one")
        self.set_defaults(new_length=max_length)
        if max_length is not None:
            model.add_argument(
                "--max-length", type=count, help=f"tokens; default: {max_length}, or what --model can take"
            )

        self.training = training = self.add_argument_group("training")
        training.add_argument("--output-dir", type=Path, default=Path(output_dir), help="(default: %(default)s)")
        training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
        training.add_argument("--overwrite", action="store_true", help="begin anew in an --output-dir that holds a run")
        of_steps = "" if max_steps is None else f" (default: {max_steps})"
        training.add_argument("--epochs", type=positive, help=f"default: {epochs or 'by --max-steps'}")
        training.add_argument("--max-steps", type=count, help=f"optimizer steps, in place of epochs{of_steps}")
        training.add_argument("--batch-size", type=count, default=batch_size, help="examples a device and step")
        training.add_argument("--accumulate", type=count, default=1, help="batches an optimizer step (default: 1)")
        training.add_argument("--learning-rate", type=positive, help=self._rate_help())
        training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
        training.add_argument("--bf16", action="store_true")
        training.add_argument("--cpu", action="store_true", help="do not use an accelerator")
        training.add_argument("--seed", type=_seed, default=0)
        training.add_argument("--push-to-hub", action="store_true")
        training.add_argument("--hub-model-id", help="default: the name of --output-dir")

    def add_family(self, head: str, default: str = "eff_longformer") -> None:
        """Add `--family`: the text families that have a class for `head`, an Auto class's name."""
        families = [name for name, row in FAMILIES.items() if row.tokenizer is not None and head in row.heads]
        self.model.add_argument(
            "--family", choices=families, default=default, help="of a new model (default: %(default)s)"
        )

    def _rate_help(self) -> str:
        new, tuned = self._rates
        if new is None:
            return "default: that of the size"
        return f"default: {new:g}" + (f" for a new model, {tuned:g} for --model" if tuned != new else "")

    def error(self, message: str) -> NoReturn:
        """End the program with one line."""
        self.exit(2, f"Error: {message} (--help lists all options)\n")

    def parse_args(self, *given: Any, **options: Any) -> argparse.Namespace:  # type: ignore[override]
        """As in argparse, and checked: nothing of an earlier run is overwritten unasked."""
        args = super().parse_args(*given, **options)
        if args.epochs is not None and args.max_steps is not None:
            self.error("--epochs and --max-steps both say how long to train: give one of them")
        if args.epochs is None and args.max_steps is None:
            args.epochs, args.max_steps = self._length["epochs"], self._length["max_steps"]
        if args.learning_rate is None:
            args.learning_rate = self._rates[args.model is not None]
        args.streaming = getattr(args, "streaming", False)
        if args.streaming and (args.dataset is None or args.max_steps is None):
            self.error("--streaming goes with --dataset and --max-steps, because a stream does not tell its length")
        if args.push_to_hub and args.hub_model_id is None:
            args.hub_model_id = args.output_dir.resolve().name
        self._check_output_dir(args)
        return args

    def _check_output_dir(self, args: argparse.Namespace) -> None:
        folder = args.output_dir
        if folder.exists() and not folder.is_dir():
            self.error(f"--output-dir: {folder} is a file: name a folder")
        if args.resume and args.overwrite:
            self.error("--resume goes on and --overwrite begins anew: give one of them")
        for name in ("model", "generator", "tokenizer"):
            source = Path(getattr(args, name, None) or "")
            if getattr(args, name, None) is None or not source.exists() or not folder.exists():
                continue
            if folder.samefile(source):
                self.error(f"--output-dir and --{name} are both {folder}: name another folder, to keep the {name}")
            if args.overwrite and source.resolve().is_relative_to(folder.resolve()):
                self.error(
                    f"--{name} {source} lies in --output-dir {folder}, where --overwrite begins anew: name another "
                    f"--output-dir, to keep the {name}"
                )
        known = checkpoint_folders(folder)
        if others := [path for path in sorted(folder.glob("checkpoint-*")) if path.is_dir() and path not in known]:
            self.error(f"{others[0]} is no checkpoint of Trainer, which would remove it as an old one: rename it")
        earlier = [*known, *(folder / name for name in WEIGHTS if (folder / name).exists())]
        if earlier and not (args.resume or args.overwrite):
            self.error(
                f"{folder} holds {earlier[0].name} of an earlier run: give --resume to go on, another --output-dir, or "
                "--overwrite"
            )
