"""What the command `hf-efficient-attn convert` does."""

import inspect
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
        ValueError: see `convert`; also a source that is not found or cannot be read, and a folder that may not be
            written to, before anything is loaded, or cannot be.
    """
    check_folder(output_dir, force, source)
    try:
        conversion = convert(source, to, max_length, **options)
    except OSError as error:  # of transformers: nothing there, or nothing that can be read
        raise ValueError(f"{source}: {error}") from error
    try:
        conversion.save_pretrained(output_dir, force=force)
    except OSError as error:
        raise ValueError(f"{output_dir} cannot be written: {error}") from error
    lines = str(conversion.report).replace(" OUT", f" {output_dir}")
    return f"{lines}\nwritten    {output_dir}"


# Arguments, no fields of a config.
_TAKEN = frozenset(
    name
    for function in (convert, convert_folder)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
)


def read_options(pairs: list[str] | None, taken: frozenset[str] = _TAKEN) -> dict[str, Any]:
    """`name=value` pairs as a dictionary; a value that is JSON is read as such, any other is text.

    Names that are `taken` are arguments of the command or of what it calls.

    Raises:
        ValueError: no `=`, a name twice, or one that is taken.
    """
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier() or name in options:
            raise ValueError(f"--option {pair!r}: give name=value, each name once.")
        if name in taken:
            raise ValueError(
                f"--option {pair!r}: {name} is no field of the config; --help lists the options of the command."
            )
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options
