"""What the command `hf-efficient-attn convert` does."""

import json
from pathlib import Path
from typing import Any

from .convert import convert
from .saving import check_folder


def convert_folder(
    source: str, to: str, output_dir: Path, max_length: int | None = None, *, force: bool = False, **options: Any
) -> str:
    """`convert` a folder or a name on the Hub, write `output_dir`, and return the report with its name in it.

    Raises:
        ValueError: see `convert`; also a source that is not found, and a folder that may not be written to, before
            anything is loaded.
    """
    check_folder(output_dir, force, source)
    try:
        conversion = convert(source, to, max_length, **options)
        conversion.save_pretrained(output_dir, force=force)
    except OSError as error:  # of transformers: nothing there, or nothing that can be read
        raise ValueError(f"{source}: {error}") from error
    lines = str(conversion.report).replace(" OUT", f" {output_dir}")
    return f"{lines}\nwritten    {output_dir}"


# What `convert` has options of its own for.
_TAKEN = frozenset(("source", "to", "max_length", "positions", "architecture", "revision", "force", "processor"))


def read_options(pairs: list[str] | None, taken: frozenset[str] = _TAKEN) -> dict[str, Any]:
    """`name=value` pairs as a dictionary; a value that is JSON is read as such, any other is text.

    Names that are `taken` the command has options of its own for.

    Raises:
        ValueError: no `=`, or a name twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier() or name in options:
            raise ValueError(f"--option {pair!r}: give name=value, each name once.")
        if name in taken:
            raise ValueError(f"--option {pair!r}: the command has this one itself; see --help.")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options
