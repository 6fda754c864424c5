"""What the commands that measure share: lists in options, and the default bound for memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from .memory import GIB, available_bytes


def split_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def split_numbers(option: str, text: str, example: str = "1024,4096") -> list[int]:
    """Whole numbers separated by commas, of the option `--<option>`.

    Raises:
        ValueError: anything else, or nothing; the message shows the `example`.
    """
    try:
        numbers = [int(name) for name in split_names(text)]
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"--{option} is {text!r}, but it has to be whole numbers separated by commas: {example}.")
    return numbers


def check_counts(**numbers: int) -> None:
    """Raises `ValueError` for an option, by its name with underscores, that is below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {number}, but it has to be 1 or more.")


def check_out(files: Iterable[Path | None], kinds: Sequence[str] = (".md",)) -> None:
    """Raises `ValueError` for a file of `--out` that is of none of the `kinds`, or cannot be written."""
    words = f"{', '.join(kinds[:-1])} or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
    for file in files:
        if file is not None and (file.suffix not in kinds or not file.parent.is_dir()):
            raise ValueError(f"--out is {file}, but it has to be a {words} file in a folder that exists.")
        if file is not None:
            check_writable("out", file)


def check_writable(option: str, file: Path) -> None:
    """Raises `ValueError` unless `file` of `--<option>` can be written; changes nothing in it."""
    is_new = not file.exists()
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise ValueError(f"--{option} is {file}, which cannot be written ({error.strerror}): pass another.") from None
    if is_new:
        file.unlink()


def check_folder(option: str, folder: Path, *names: str) -> None:
    """Makes the `folder` of `--<option>`; raises `ValueError` unless files of these `names` can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--{option} is {folder}, which cannot be made ({error.strerror}): pass another.") from None
    for name in names:
        check_writable(option, folder / name)


def use_threads(threads: int | None) -> None:
    """Has torch compute with so many CPU threads, None being its own choice; raises `ValueError` below 1."""
    if threads is None:
        return
    check_counts(threads=threads)
    import torch

    torch.set_num_threads(threads)


def memory_bound(max_memory_gib: float | None) -> int:
    """Bytes one process may use: the number given, else 80 % of the free memory, else 8 GiB."""
    if max_memory_gib is not None:
        if not 0 < max_memory_gib < math.inf:
            raise ValueError(f"--max-memory-gib is {max_memory_gib}, but it has to be a number above 0.")
        return int(max_memory_gib * GIB)
    free = available_bytes()
    return int(8 * GIB if free is None else 0.8 * free)
