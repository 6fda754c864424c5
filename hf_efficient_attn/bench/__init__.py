"""Measuring time and peak memory of models over length, within bounds.

Each case runs in a process of its own; see `run_cases`.
"""

from .cases import DTYPES, KINDS, MODES, Bounds, Case, Kind, ModelSize, Result, make_cases
from .extras import require_extras
from .measure import run_cases
from .memory import GIB, MIB, available_bytes
from .report import describe, plot, print_tables, write_csv


__all__ = [
    "DTYPES",
    "GIB",
    "KINDS",
    "MIB",
    "MODES",
    "Bounds",
    "Case",
    "Kind",
    "ModelSize",
    "Result",
    "available_bytes",
    "describe",
    "make_cases",
    "print_tables",
    "plot",
    "require_extras",
    "run_cases",
    "write_csv",
]
