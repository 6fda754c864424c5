"""What is timed of one case: runs in a process of its own, asked through a pipe."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from .cases import Case
from .generation import Generation
from .kinds import KINDS
from .memory import make_meter
from .models import PRIMING_LENGTH, build_inputs, build_labels, build_model


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
_THROWAWAY_LENGTH = 64


class Step(NamedTuple):
    """What there is to do with a case's model.

    Args:
        run: one forward pass, training step or generation at so many tokens.
        forget: drops gradients, optimizer state and caches.
        prepare: what has to be there before the first timed run and is not timed.
        held: bytes that count as its memory in place of the peak; None for the peak.
    """

    run: Callable[[int], None]
    forget: Callable[[], None] = lambda: None
    prepare: Callable[[], None] = lambda: None
    held: Callable[[], int] | None = None


def build_step(case: Case) -> Step:
    """Build the case's model."""
    import torch

    if case.threads is not None:
        torch.set_num_threads(case.threads)
    model, inputs = build_model(case), build_inputs(case)
    if case.compiled:
        model.compile()
    if case.mode == "train":
        return _training(case, model.train(), inputs)
    model.eval()
    if case.mode == "generate":
        generation = Generation(model, inputs, case.length)
        return Step(generation.run, generation.forget, generation.prepare, generation.held)

    def forward(length: int) -> None:
        with torch.inference_mode():
            model(**{name: tensor[:, :length] for name, tensor in inputs.items()})

    return Step(forward)


def _training(case: Case, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Step:
    import torch

    classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = classes[case.optimizer](model.parameters(), lr=1e-4)
    labels = build_labels(case)
    # Reversible models have two streams of states side by side.
    direction = torch.randn(2 * case.size.hidden_size, generator=torch.Generator().manual_seed(case.seed))
    direction = direction.to(case.device, getattr(torch, case.dtype))

    def loss(length: int) -> torch.Tensor:
        batch = {name: tensor[:, :length] for name, tensor in inputs.items()}
        if case.task != "base":
            return model(**batch, labels=labels[:, :length] if case.task == "masked_lm" else labels).loss
        # Every position gets a gradient, at the cost of one product with a vector.
        states = model(**batch).last_hidden_state
        return (states @ direction[: states.shape[-1]]).mean()

    def train(length: int) -> None:
        loss(length).backward()
        optimizer.step()
        optimizer.zero_grad()

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()

    return Step(train, forget)


def serve(case: Case, connection: Connection) -> None:
    """Build the case's model, send `ready`, then run once for each `"run"` received and send what it took.

    Sends dicts: `{"event": "ready", "base_bytes"}`, `{"event": "run", "seconds", "peak_bytes"}` and
    `{"event": "error", "memory", "message"}`, where `memory` says that an allocation was refused.
    """
    try:
        step = build_step(case)
        # A tiny run first: thread stacks, kernels' code and workspaces are not what a length costs.
        if case.compiled and case.device == "cuda":
            # Compiling is work for the CPU, of which there are several: the processes of a group do it side by side.
            step.run(case.length)
            step.forget()
        elif case.compiled:
            pass  # it would compile another graph
        elif KINDS[case.kind].primes:
            step.run(min(PRIMING_LENGTH, case.length))
            step.forget()
        else:
            small = replace(case.size, hidden_size=8 * case.size.num_heads, num_layers=1, intermediate_size=16)
            build_step(replace(case, size=small, length=_THROWAWAY_LENGTH)).run(_THROWAWAY_LENGTH)
        step.prepare()
        gc.collect()
        meter = make_meter(case.device)
        base = meter.start()
        connection.send({"event": "ready", "base_bytes": base})
        while connection.recv() == "run":
            start = time.perf_counter()
            step.run(case.length)
            meter.wait()
            seconds = time.perf_counter() - start
            above = meter.peak_above() if step.held is None else step.held()
            connection.send({"event": "run", "seconds": seconds, "peak_bytes": above})
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        # What torch raises when an allocation is refused is a plain RuntimeError: only its text tells.
        text = str(error).lower()
        memory = isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)
        connection.send({"event": "error", "memory": memory, "message": f"{type(error).__name__}: {error}"})
