"""Measuring from the caller's side: a process of its own does the work, so that the caller's memory does not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from .cases import Bounds, Case, Result


def run_cases(
    cases: Sequence[Case],
    bounds: Bounds,
    *,
    repeats: int = 5,
    warmup: int = 1,
    case_seconds: float = 30.0,
    total_seconds: float | None = None,
    passive_threads: bool = True,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Measure cases, each in a process of its own, and go on past those that exceed the bounds.

    Neighbouring cases of one length and mode are interleaved: one run each in turn, so that noise hits all of them.

    Args:
        cases: what to measure; shorter lengths first, as `make_cases` orders them, for predictions to work.
        bounds: a process that goes past is ended and reported; a case predicted to go past is not started.
        repeats: timed runs of each case.
        warmup: runs before them that count for the bounds and the peak memory, but not for the time.
        case_seconds: a case stops repeating (after one timed run at least) when its timed runs took that long.
        total_seconds: once the whole took that long, what is not measured yet is left out; None is no limit.
        passive_threads: threads sleep while they wait, which disturbs other programs less; False leaves them as
            PyTorch has them, which is quicker on cores that nobody else uses.
        on_result: called with each result as soon as it is there.

    Returns:
        One result a case, in the order of `cases`.

    Raises:
        ValueError: `repeats` is below 1 or `warmup` below 0.
        RuntimeError: the measuring process itself could not run.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, but a median needs a run: pass 1 or more.")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}, but it is a number of runs: pass 0 or more.")
    job = {
        "cases": [case.to_json() for case in cases],
        "bounds": asdict(bounds),
        "repeats": repeats,
        "warmup": warmup,
        "case_seconds": case_seconds,
        "total_seconds": total_seconds,
    }
    # The measuring process has to find this package where the caller found it, also when it is not installed.
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    results: dict[Case, Result] = {}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_efficient_attn.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**({"OMP_WAIT_POLICY": "PASSIVE"} if passive_threads else {}), **os.environ, "PYTHONPATH": path},
        )
        with process:
            try:
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps(job))
                process.stdin.close()
                for line in process.stdout:
                    result = Result.from_json(json.loads(line))
                    results[result.case] = result
                    if on_result is not None:
                        on_result(result)
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
            last = lines[-1] if lines else "no message"
            raise RuntimeError(f"The measuring process ended with exit code {process.returncode}: {last}")
    return [results[case] for case in cases]
