"""Figures of the results into README.md: whatever stands between its marks is made from the csv files.

    python benchmarks/readme_tables.py            # rewrite README.md
    python benchmarks/readme_tables.py --check    # fail if it says something else than the results

A mark is `<!-- results: families-cpu.csv -->`, and the table ends at `<!-- end of results -->`.
"""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hf_efficient_attn.bench import MIB, run_script


ROOT = Path(__file__).resolve().parents[1]
_MARKED = re.compile(r"(<!-- results: (\S+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
_MODES = {"forward": "forward", "train": "training step", "generate": "16 new tokens"}
_BASELINE = "bert"
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a results file.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"README.md names {path.name}, which is not in benchmarks/results: measure, or mend its mark.")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(rows: Sequence[dict[str, str]]) -> str:
    """One line a kind; for each mode and length the time, how many times as fast as BERT it is, and the memory."""
    columns = list(dict.fromkeys((row["mode"], int(row["length"])) for row in rows))
    columns.sort(key=lambda column: (list(_MODES).index(column[0]), column[1]))
    found = {(row["kind"], row["mode"], int(row["length"])): row for row in rows}
    heads = [f"{_MODES[mode]}, {length:,}" for mode, length in columns]
    lines = [f"| | {' | '.join(heads)} |", f"| --- |{' --- |' * len(columns)}"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = [_cell(found.get((kind, *column)), found.get((_BASELINE, *column))) for column in columns]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, str] | None, baseline: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    if not row["seconds_median"]:
        return f"{row['status']}{', predicted' if row['predicted'] == 'True' else ''}"
    seconds = float(row["seconds_median"])
    text = f"{seconds:.3g} s"
    if row["kind"] != _BASELINE and baseline is not None and baseline["seconds_median"]:
        text += f" ({float(baseline['seconds_median']) / seconds:.2f} x)"
    if row["peak_bytes"]:
        memory = float(row["peak_bytes"]) / MIB
        text += f", {memory:,.0f} MiB" if memory >= 10 else f", {memory:.2g} MiB"
    return text


def with_tables(text: str, results: Path) -> str:
    """`text` with the tables of `results` between its marks.

    Raises:
        ValueError: no mark at all, or a file that is not there.
    """
    if not _MARKED.search(text):
        raise ValueError("README.md has no mark <!-- results: NAME.csv --> ... <!-- end of results -->.")
    return _MARKED.sub(lambda found: f"{found[1]}\n{table(rows_of(results / found[2]))}\n\n{found[4]}", text)


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where README.md is behind.")] = False,
) -> None:
    """Put the figures of benchmarks/results into README.md."""
    page = ROOT / "README.md"
    text = page.read_text(encoding="utf-8")
    made = with_tables(text, ROOT / "benchmarks" / "results")
    if made == text:
        typer.echo("README.md says what the results say.")
    elif check:
        sys.exit("README.md says something else than benchmarks/results: python benchmarks/readme_tables.py")
    else:
        page.write_text(made, encoding="utf-8")
        typer.echo("README.md rewritten.")


if __name__ == "__main__":
    run_script(app)
