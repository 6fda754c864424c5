"""Runs that SIGKILL ended and that were begun again reach the weights of a run that nobody disturbed, exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from resume_runs import FIRST, KILLED_IN_WRITING, ROWS, SECOND, THIRD, WHOLE, half_written


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What resume_runs.py leaves: a folder a row."""
    folder = tmp_path_factory.mktemp("resume")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(here / "resume_runs.py"), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    # Of the runs' own errors, the test of their row tells.
    (folder / "errors.txt").write_text(result.stderr)
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_killed_twice_and_begun_again(row: str, runs: Path) -> None:
    folder = runs / row
    ends = json.loads((folder / "ends.json").read_text())
    wanted = {WHOLE: 0, FIRST: -signal.SIGKILL, SECOND: -signal.SIGKILL, THIRD: 0}
    assert ends == wanted, (runs / "errors.txt").read_text()

    said = {name: json.loads((folder / f"{name}.json").read_text()) for name in wanted}
    out = folder / "killed"
    assert said[WHOLE] == said[FIRST] == {"found": None, "said": []}
    assert said[SECOND] == {"found": str(out / "checkpoint-3"), "said": []}
    # Half a checkpoint was there, and was named.
    assert said[THIRD]["found"] == str(out / "checkpoint-6") and len(said[THIRD]["said"]) == 1
    assert f"{KILLED_IN_WRITING} is passed over" in said[THIRD]["said"][0]
    assert f"{half_written(row)}: " in said[THIRD]["said"][0]

    undisturbed, resumed = (torch.load(folder / f"{name}.pt", weights_only=True) for name in (WHOLE, THIRD))
    assert undisturbed["drew"], "nothing was drawn in training, so nothing was shown"
    assert undisturbed["weights"].keys() == resumed["weights"].keys()
    differ = [name for name, x in resumed["weights"].items() if not torch.equal(undisturbed["weights"][name], x)]
    assert not differ, f"{len(differ)} of {len(resumed['weights'])} tensors differ, such as {differ[0]}"
