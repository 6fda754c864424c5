"""Starting up: importing the package, the first class, and making a model, each in fresh processes.

    python benchmarks/startup.py

Median seconds of several runs, beside those of the same with transformers alone. `import hf_efficient_attn` loads
neither torch nor model code; what it costs is there whatever else a program does.
"""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_efficient_attn.bench import check_counts, check_out, environment_line, run_script


_CONFIG = "num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=64, vocab_size=99"
STEPS = {
    "python alone": "pass",
    "import transformers": "import transformers",
    "import hf_efficient_attn": "import hf_efficient_attn",
    "import transformers, hf_efficient_attn": "import transformers, hf_efficient_attn",
    "BertConfig of transformers": "from transformers import BertConfig",
    "EffLongformerConfig": "from hf_efficient_attn import EffLongformerConfig",
    "BertModel, made": f"from transformers import BertConfig, BertModel; BertModel(BertConfig({_CONFIG}))",
    "EffLongformerModel, made": "from hf_efficient_attn import EffLongformerConfig, EffLongformerModel; "
    f"EffLongformerModel(EffLongformerConfig({_CONFIG}))",
    "EffReformerModel, made": "from hf_efficient_attn import EffReformerConfig, EffReformerModel; "
    f"EffReformerModel(EffReformerConfig({_CONFIG}))",
}
_TIMED = "import time; start = time.perf_counter(); {}\nprint(time.perf_counter() - start)"
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


def seconds_of(code: str) -> float:
    """Seconds that `code` takes in a fresh process, without starting Python."""
    result = subprocess.run([sys.executable, "-c", _TIMED.format(code)], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


@app.command()
def main(
    repeats: Annotated[int, typer.Option(help="Processes for each.")] = 5,
    out: Annotated[Path | None, typer.Option(help="A .md file for the results.")] = None,
) -> None:
    """Measure how long starting up takes."""
    check_counts(repeats=repeats)
    check_out([out])
    found: dict[str, list[float]] = {name: [] for name in STEPS}
    for turn in range(repeats + 1):
        for name, code in STEPS.items():
            seconds = seconds_of(code)
            if turn:  # the first turn reads files that the others find in memory
                found[name].append(seconds)
    lines = ["| | median s (min - max) |", "| --- | ---: |"]
    for name, seconds in found.items():
        lines.append(f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f}) |")
    lines += ["", environment_line("python benchmarks/startup.py", sys.argv[1:])]
    typer.echo("\n".join(lines))
    if out is not None:
        out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    run_script(app)
