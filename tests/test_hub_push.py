"""Models of every family go to a Hub and come back by name, with the real client and a Hub on this machine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

from hf_efficient_attn import FAMILIES


JOBS = Path(__file__).with_name("hub_jobs.py")


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


def run_job(job: str, hub: LoopbackHub, folder: Path, token: str | None = None) -> dict[str, str | None]:
    """Check -> how it failed, or None, from a process of its own: the client reads its address when it is imported."""
    environment = hub.environment(folder / f"home-{job}", token)
    paths = [str(JOBS.parents[1]), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": ":".join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(JOBS), job, hub.url, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{job}.json").read_text(encoding="utf-8"))


def assert_all_hold(results: dict[str, str | None], hub: LoopbackHub) -> None:
    failed = {check: error for check, error in results.items() if error is not None}
    told = [f"--- {check}\n{error}" for check, error in failed.items()]
    assert not failed, "\n".join([f"{len(failed)} of {len(results)}: {', '.join(failed)}", *told, *hub.calls[-40:]])


def test_push_and_load_in_another_process(hub: LoopbackHub, tmp_path: Path) -> None:
    pushed = run_job("push", hub, tmp_path, token="hf_ada")
    assert_all_hold(pushed, hub)
    loaded = run_job("reload", hub, tmp_path)
    assert_all_hold(loaded, hub)
    assert all(any(family in check for check in loaded) for family in FAMILIES)
    # Each push is a commit, whole or not at all: no file stands there without the weights it belongs to.
    assert all("model.safetensors" in repo.at("main")[1] for name, repo in hub.repos.items() if name != "ada/by-hand")


def test_a_push_that_fails(hub: LoopbackHub, tmp_path: Path) -> None:
    """The user sees the error, the folder and what others load stay as they were, and the next push loads."""
    results = run_job("fail", hub, tmp_path, token="hf_ada")
    assert_all_hold(results, hub)
    assert len(results) == 4 + 2 * 5
    assert any("/loopback/upload/" in call and call.endswith(" 500") for call in hub.calls)
    assert any("/commit/main" in call and call.endswith(" 500") for call in hub.calls)
