"""Measuring time and peak memory of models over length, within bounds.

Each case runs in a process of its own; see `run_cases`.
"""

from ..extras import require_extras
from .agreement import check_outputs, output_difference
from .cases import DEVICES, DTYPES, MODES, PASSES, TASKS, Bounds, Case, ModelSize, Result, make_cases
from .environment import environment_line
from .kinds import KINDS, Kind
from .measure import run_cases
from .memory import GIB, MIB, available_bytes
from .options import check_counts, check_folder, check_out, memory_bound, split_names, split_numbers, use_threads
from .ratios import Comparison, ratio_lines
from .report import describe, markdown_tables, plot, print_tables, write_csv
from .study import BASE, Study, agreement_lines, run_script, study_app
from .turns import forward_or_gradients, take_turns


__all__ = [
    "BASE",
    "DEVICES",
    "DTYPES",
    "GIB",
    "KINDS",
    "MIB",
    "MODES",
    "PASSES",
    "TASKS",
    "Bounds",
    "Case",
    "Comparison",
    "Kind",
    "ModelSize",
    "Result",
    "Study",
    "agreement_lines",
    "available_bytes",
    "check_counts",
    "check_folder",
    "check_out",
    "check_outputs",
    "describe",
    "environment_line",
    "forward_or_gradients",
    "make_cases",
    "markdown_tables",
    "memory_bound",
    "output_difference",
    "plot",
    "print_tables",
    "ratio_lines",
    "require_extras",
    "run_cases",
    "run_script",
    "split_names",
    "split_numbers",
    "study_app",
    "take_turns",
    "use_threads",
    "write_csv",
]
