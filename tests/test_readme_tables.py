"""README's figures are those of the results."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_says_what_the_results_say() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "readme_tables.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


HEAD = "kind,mode,length,status,predicted,seconds_median,peak_bytes\n"
ROWS = [
    "bert,forward,512,ok,False,0.4,2097152",
    "bert,forward,4096,over time,True,,",
    "eff_x,forward,512,ok,False,0.2,52428800",
    "eff_x,forward,4096,ok,False,1.6,",
    "eff_x,generate,512,ok,False,0.0123,104858",
]


def test_a_table_has_times_ratios_memory_and_what_did_not_end(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(HEAD + "\n".join(ROWS) + "\n")
    page = "before\n\n<!-- results: r.csv -->\n\nold\n\n<!-- end of results -->\n\nafter"
    made = tables.with_tables(page, tmp_path)
    assert made.startswith("before") and made.endswith("after") and "old" not in made
    assert "| | forward, 512 | forward, 4,096 | 16 new tokens, 512 |" in made
    assert "| `bert` | 0.4 s, 2 MiB | over time, predicted | - |" in made
    assert "| `eff_x` | 0.2 s (2.00 x), 50 MiB | 1.6 s | 0.0123 s, 0.1 MiB |" in made
    assert tables.with_tables(made, tmp_path) == made


def test_a_page_without_marks_or_a_mark_without_results_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no mark"):
        tables.with_tables("nothing", tmp_path)
    with pytest.raises(ValueError, match="gone.csv, which is not in benchmarks/results"):
        tables.with_tables("<!-- results: gone.csv -->\n\n\n\n<!-- end of results -->", tmp_path)
