"""Packages that not everybody needs: the optional dependencies."""

from __future__ import annotations

import importlib.util


def require_extras(*modules: str, extra: str = "demo") -> None:
    """Check that the modules of an extra are there, before any work is done.

    Raises:
        ValueError: one is missing; the message says how to install it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} cannot be imported, but this command needs it: pip install "
            f'"hf_efficient_attn[{extra}]"'
        )
