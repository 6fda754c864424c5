"""The measuring process: `python -m hf_efficient_attn.bench.worker`, a JSON job on stdin, JSON results on stdout.

It imports the libraries once and runs each case in a child of its own, forked where that is safe, so that a case starts
in a fraction of a second. Itself it never computes anything: it watches the children's time and memory.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .cases import FAILED, NO_TIME, OK, OVER_MEMORY, OVER_TIME, Bounds, Case, Result, ask_driver_for_gpus
from .kinds import KINDS
from .memory import MIB, resident_bytes
from .prediction import predict
from .step import serve


_START_SECONDS = 180.0
_POLL_SECONDS = 0.01
_AT_ONCE = 6  # processes that are alive together; they take turns, so more would only hold memory
# Forking is safe here because nothing has computed yet; macOS's own libraries do not survive it.
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class Child:
    """One process with one case; what happens to it ends up in `result`."""

    def __init__(self, result: Result, bounds: Bounds, deadline: float) -> None:
        self.result = result
        self._bounds = bounds
        self._deadline = deadline
        context = multiprocessing.get_context(_START_METHOD)
        self._caller = os.getppid()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(result.case, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that the child's end of the pipe is its own, and its death is seen here

    def await_ready(self) -> None:
        """Wait until the model is built."""
        answer = self._wait(_START_SECONDS)
        if answer is not None:
            self.result.base_bytes = answer["base_bytes"]

    def run(self, timed: bool) -> None:
        """Let it run once; `timed` runs are kept."""
        try:
            self._connection.send("run")
        except OSError:  # it has ended: the wait finds out how
            pass
        answer = self._wait(self._bounds.seconds)
        if answer is not None:
            self.result.peak_bytes = answer["peak_bytes"]
            if timed:
                self.result.seconds.append(answer["seconds"])

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _wait(self, seconds: float) -> dict[str, Any] | None:
        started = time.monotonic()
        while not self._connection.poll(_POLL_SECONDS):
            if os.getppid() != self._caller:  # killed: nobody wants the results, and nobody else ends the children
                raise SystemExit("the calling process has ended")
            used = resident_bytes(self._process.pid)
            if used is not None and used > self._bounds.memory_bytes:
                limit = self._bounds.memory_bytes / MIB
                return self._stop(OVER_MEMORY, f"{used / MIB:,.0f} MiB resident, bound {limit:,.0f} MiB")
            if time.monotonic() - started > seconds:
                return self._stop(OVER_TIME, f"no end after {seconds:,.1f} s")
            if time.monotonic() > self._deadline:
                # What was measured before stands.
                return self._stop(OK if self.result.seconds else NO_TIME, "the total time is used up")
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            if self._process.exitcode == -9:  # not by us: the system ran short of memory before the bound was reached
                return self._stop(OVER_MEMORY, "ended by the system")
            return self._stop(FAILED, f"its process ended with exit code {self._process.exitcode}")
        if answer["event"] == "error":
            return self._stop(OVER_MEMORY if answer["memory"] else FAILED, answer["message"])
        return answer

    def _stop(self, status: str, detail: str) -> None:
        self._process.kill()
        self.result.status, self.result.detail = status, detail


def measure(
    cases: Sequence[Case],
    bounds: Bounds,
    repeats: int,
    warmup: int,
    case_seconds: float,
    total_seconds: float | None,
    on_result: Callable[[Result], None],
) -> None:
    """Measure the cases, as `run_cases` describes it."""
    deadline = math.inf if total_seconds is None else time.monotonic() + total_seconds
    results: dict[Case, Result] = {}
    for group in _groups(cases):
        children: list[Child] = []
        try:
            for case in group:
                results[case] = predict(case, results.values(), bounds) or Result(case)
                if time.monotonic() > deadline:
                    results[case] = Result(case, NO_TIME, detail="the total time is used up")
                elif not results[case].predicted:
                    children.append(Child(results[case], bounds, deadline))
            for child in children:
                child.await_ready()
            # In turns, so that what slows the machine slows all. A GPU is one's own, and has no room for all of them.
            together = [[child] for child in children] if group[0].device == "cuda" else [children]
            for members in together:
                _take_turns(members, repeats, warmup, case_seconds)
                for child in members:
                    child.end()
        finally:
            for child in children:
                child.end()
        for case in group:
            on_result(results[case])


def _take_turns(children: Sequence[Child], repeats: int, warmup: int, case_seconds: float) -> None:
    for turn in range(warmup + repeats):
        for child in children:
            spent = sum(child.result.seconds)
            if not child.result.detail and spent < case_seconds:
                child.run(timed=turn >= warmup)


def _groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    # What is compared with each other: neighbours that differ in the model only.
    for _, members in groupby(dict.fromkeys(cases), key=lambda case: (case.length, case.mode)):
        group = list(members)
        for start in range(0, len(group), _AT_ONCE):
            yield group[start : start + _AT_ONCE]


def _import_libraries(kinds: set[str]) -> None:
    import torch  # noqa: F401
    import transformers

    import hf_efficient_attn  # noqa: F401  (registers the families)

    transformers.logging.set_verbosity_error()
    for kind in kinds:
        # Looking the class up imports its module, and that is what takes the time.
        config = transformers.AutoConfig.for_model(KINDS[kind].model_type)
        transformers.AutoModelForSequenceClassification._model_mapping[type(config)]


def main() -> None:
    """Read the job from stdin, write one line a result to stdout."""
    # Whatever a library prints must not end up between the results.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = json.load(sys.stdin)
    ask_driver_for_gpus()
    cases = [Case.from_json(case) for case in job["cases"]]

    def write(result: Result) -> None:
        output.write(json.dumps(result.to_json()) + "\n")
        output.flush()

    _import_libraries({case.kind for case in cases})
    measure(
        cases,
        Bounds(**job["bounds"]),
        job["repeats"],
        job["warmup"],
        job["case_seconds"],
        job["total_seconds"],
        write,
    )


if __name__ == "__main__":
    main()
