"""`hf-efficient-attn run`: programs that do not import the package, run with it, as Python would run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "hf_efficient_attn", "run"]

# What a program sees of how it was started.
SHOW = """
import json, os, sys
seen = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "rank": os.environ.get("RANK")}
seen["package"] = "hf_efficient_attn" in sys.modules
seen["wait"] = os.environ.get("OMP_WAIT_POLICY")
with open(os.environ["SEEN"] + (os.environ.get("RANK") or "0"), "w") as file:
    json.dump(seen, file)
"""

# A program of transformers alone, such as its own examples.
LOADS = """
import argparse
from transformers import AutoConfig, AutoModelForMaskedLM

parser = argparse.ArgumentParser()
parser.add_argument("--model_name_or_path")
folder = parser.parse_args().model_name_or_path
model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(folder))
print("loaded", type(model).__name__)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Runs a command line in `tmp_path`, where `show.py`, `loads.py` and others stand."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "show.py").write_text(SHOW)
    (scripts / "loads.py").write_text(LOADS)
    (scripts / "leaves.py").write_text("import sys\nsys.exit(7)\n")
    (scripts / "breaks.py").write_text("def inner():\n    raise KeyError('what broke')\ninner()\n")
    (scripts / "helps.py").write_text("import argparse\nargparse.ArgumentParser(prog='mine').parse_args()\n")
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__main__.py").write_text(SHOW)
    (tmp_path / "tool" / "__init__.py").write_text("")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": path, "SEEN": str(tmp_path / "seen"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=tmp_path, env=environment | changes, capture_output=True, text=True, timeout=240
        )

    return run


def seen(folder: Path, rank: int = 0) -> dict:
    """What `show.py` wrote down."""
    return json.loads((folder / f"seen{rank}").read_text())


def test_a_script_runs_as_if_python_had_started_it(start, tmp_path: Path) -> None:
    done = start(*COMMAND, "scripts/show.py", "--help", "-m", "x", "--", "run")
    assert done.returncode == 0, done.stderr
    found = seen(tmp_path)
    assert found["argv"] == ["scripts/show.py", "--help", "-m", "x", "--", "run"]
    assert found["path"] == str((tmp_path / "scripts").resolve())
    assert found["name"] == "__main__" and found["package"]
    assert found["wait"] is None  # the environment is the program's own


def test_a_module_runs_as_if_python_had_started_it(start, tmp_path: Path) -> None:
    done = start(*COMMAND, "-m", "tool", "--option", "1")
    assert done.returncode == 0, done.stderr
    found = seen(tmp_path)
    assert found["argv"] == [str((tmp_path / "tool" / "__main__.py").resolve()), "--option", "1"]
    assert found["path"] == str(tmp_path.resolve()) and found["name"] == "__main__" and found["package"]


def test_nothing_is_put_on_a_safe_path(start, tmp_path: Path) -> None:
    done = start(sys.executable, "-P", "-m", "hf_efficient_attn", "run", "scripts/show.py")
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path)["path"] not in (str(tmp_path.resolve()), str((tmp_path / "scripts").resolve()))


def test_exit_codes_tracebacks_and_help_are_the_programs(start) -> None:
    assert start(*COMMAND, "scripts/leaves.py").returncode == 7
    broken = start(*COMMAND, "scripts/breaks.py")
    assert broken.returncode == 1
    assert broken.stderr.endswith("KeyError: 'what broke'\n") and 'breaks.py", line 2, in inner' in broken.stderr
    helped = start(*COMMAND, "scripts/helps.py", "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "there is no script 'absent.py'"),
        (["-m"], "-m needs the name of a module"),
        ([], "Missing argument"),
    ],
)
def test_what_names_no_program_is_an_error_of_one_line(start, arguments: list[str], message: str) -> None:
    done = start(*COMMAND, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_explains_itself(start) -> None:
    done = start(*COMMAND, "--help")
    assert done.returncode == 0 and "accelerate launch" in done.stdout


def test_accelerate_launches_a_program_that_knows_transformers_alone(start, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = {"model_type": "eff_longformer", "vocab_size": 16, "attention_window": 4, **sizes}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    program = ["scripts/loads.py", "--model_name_or_path", "model"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    done = start(*launch, "-m", "hf_efficient_attn", "run", *program)
    assert done.returncode == 0, done.stderr
    assert "loaded EffLongformerForMaskedLM" in done.stdout
    without = start(sys.executable, *program)
    assert without.returncode != 0 and "eff_longformer" in without.stderr


def test_torchrun_starts_two_of_them(start, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = start(*torchrun, "-m", "hf_efficient_attn", "run", "scripts/show.py", "--x", "1")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = seen(tmp_path, rank)
        assert found["rank"] == str(rank) and found["argv"] == ["scripts/show.py", "--x", "1"] and found["package"]
