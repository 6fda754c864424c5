"""The line that says what a measurement was made with."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import PurePath


def environment_line(program: str, arguments: Sequence[str], threads: int | None = None, device: str = "cpu") -> str:
    """Date, versions, CPU threads and the command that was run, without a path of this machine.

    Args:
        program: the command without its arguments, as one types it.
        arguments: its arguments; of an absolute path only the file name is kept.
        threads: CPU threads; None for torch's default.
        device: "cpu", or "cuda" for torch's current GPU, which is named.
    """
    import torch

    threads = torch.get_num_threads() if threads is None else threads
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    command = f"{program} {shlex.join(_without_folder(argument) for argument in arguments)}".strip()
    return (
        f"{date.today()}; torch {torch.__version__}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}, {gpu}{threads} CPU thread{'s' * (threads != 1)}; {command}"
    )


def _without_folder(argument: str) -> str:
    option, sign, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + sign + (PurePath(value).name if PurePath(value).is_absolute() else value)
