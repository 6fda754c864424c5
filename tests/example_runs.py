"""Runs the examples, in a process of their own as a user does, or here, where a run costs no start of its own."""

import contextlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import psutil
import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
LIMIT = 130  # seconds


def run_example(name: str, folder: Path, *options: Any, processes: int = 1) -> str:
    """Run `examples/<name>.py --cpu` in `folder`, with the data sets' cache there; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [sys.executable, *(several if processes > 1 else [])]
    command = [*start, str(EXAMPLES / f"{name}.py"), "--cpu", *map(str, options)]
    environment["PYTHONFAULTHANDLER"] = "1"
    found = _run(command, folder, environment)
    assert found is not None, f"{name} did not end; where it was is in the warnings"
    code, printed, errors = found
    assert code == 0, errors
    return printed


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str] | None:
    """Exit code and what was printed; None, with a warning that says where each process was, if it does not end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as run:
        try:
            printed, errors = run.communicate(timeout=LIMIT)
            return run.returncode, printed, errors
        except subprocess.TimeoutExpired:
            workers = psutil.Process(run.pid).children(recursive=True)
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(signal.SIGABRT)  # the handler writes where it was
            psutil.wait_procs(workers, timeout=5)
            for process in (*workers, run):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            warnings.warn(f"{command} did not end:\n{run.communicate()[1][-6000:]}", stacklevel=3)
            return None


@contextlib.contextmanager
def _as_a_program(name: str, folder: Path, options: tuple[Any, ...]) -> Iterator[tuple[io.StringIO, io.StringIO]]:
    printed = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(EXAMPLES / f"{name}.py"), "--cpu", *map(str, options)])
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        for module in (datasets.config, huggingface_hub.constants):
            patch.setattr(module, "HF_HUB_OFFLINE", True)
        with contextlib.redirect_stdout(printed[0]), contextlib.redirect_stderr(printed[1]):
            yield printed


def run_here(name: str, folder: Path, *options: Any) -> str:
    """Like `run_example`, in this process."""
    with _as_a_program(name, folder, options) as (stdout, _):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return stdout.getvalue()


def error_of(name: str, folder: Path, *options: Any) -> str:
    """The one line with which an example ends on wrong input, run in this process."""
    with _as_a_program(name, folder, options) as (_, stderr), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    # argparse writes its line itself and exits with a number.
    line = stderr.getvalue().strip() if isinstance(stop.value.code, int) else str(stop.value.code)
    assert line.startswith("Error: ") and "\n" not in line, line
    return line


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file with one JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def check_outputs(folder: Path, *figures: str) -> dict[str, float]:
    """What every example leaves in its output folder is there; the evaluation's figures."""
    assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    assert (folder / "training.png").stat().st_size > 2000
    header = (folder / "training.csv").read_text().splitlines()[0].split(",")
    found = json.loads((folder / "eval_results.json").read_text())
    for name in figures:
        assert f"eval_{name}" in found and f"eval_{name}" in header
    assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
    return found


def damage_last_checkpoint(folder: Path) -> tuple[Path, int]:
    """Cut the newest checkpoint's optimizer in half; that checkpoint, and the step of the one before."""
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    newest = folder / f"checkpoint-{steps[-1]}"
    file = newest / "optimizer.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return newest, steps[-2]
