"""Checkpoints of other models as models of this package, and the way back."""

from .command import convert_folder, read_options
from .convert import Conversion, convert
from .report import ConversionReport, Measure
from .table import CONVERSIONS, REVERSALS, Row, find_row, render_tables


__all__ = [
    "CONVERSIONS",
    "REVERSALS",
    "Conversion",
    "ConversionReport",
    "Measure",
    "Row",
    "convert",
    "convert_folder",
    "find_row",
    "read_options",
    "render_tables",
]
