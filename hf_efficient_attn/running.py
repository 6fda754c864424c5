"""Running another program with the package imported, for command lines that cannot add an import to it."""

import os
import runpy
import sys
from collections.abc import Sequence


def what_is_wrong(arguments: Sequence[str]) -> str | None:
    """Why `arguments` name no program, or None; see `run_program`."""
    if arguments[:1] == ["-m"]:
        return None if len(arguments) > 1 else "-m needs the name of a module behind it."
    if not arguments:
        return "there is nothing to run; name a script, or -m and a module, and then its arguments."
    if not os.path.exists(arguments[0]):
        return f"there is no script {arguments[0]!r}; give its path, or -m in front of the name of a module."
    return None


def run_program(arguments: Sequence[str]) -> None:
    """Run a script or module as Python itself would; its families load because the package is imported by now.

    `sys.argv` and `sys.path[0]` are the program's own, and its exit code and exceptions pass through.

    Args:
        arguments: `[script, *its arguments]` or `["-m", module, *its arguments]`.
    """
    as_module = arguments[0] == "-m"
    program, *rest = arguments[1:] if as_module else arguments
    sys.argv[:] = [program, *rest]
    # `python -P` puts nothing there.
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(program))
    if as_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")
