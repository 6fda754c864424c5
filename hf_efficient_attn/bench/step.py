"""One case's model and what is timed of it: runs in a process of its own, asked through a pipe."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .cases import KINDS, Case
from .memory import PeakMemory, resident_bytes


_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
_PRIMING_LENGTH = 16


def build_step(case: Case) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Build the case's model.

    Returns:
        `step(length)`, which runs one forward pass or one training step on `batch_size` examples of that length, and
        `forget()`, which drops gradients and optimizer state.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    import hf_efficient_attn  # noqa: F401  (registers the families)

    if case.threads is not None:
        torch.set_num_threads(case.threads)
    kind, size = KINDS[case.kind], case.size
    options: dict[str, Any] = {"attention_window": size.attention_window} if kind.windowed else {}
    config = AutoConfig.for_model(
        kind.model_type,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        intermediate_size=size.intermediate_size,
        vocab_size=size.vocab_size,
        max_position_embeddings=max(case.length, _PRIMING_LENGTH) + kind.extra_positions,
        **options,
    )
    extra = {} if kind.attn_implementation is None else {"attn_implementation": kind.attn_implementation}
    model = AutoModelForSequenceClassification.from_config(config, **extra).to(getattr(torch, case.dtype))
    generator = torch.Generator().manual_seed(case.seed)
    # Ids from 5 on: the first ones are special tokens (padding among them) in some of the kinds.
    ids = torch.randint(5, size.vocab_size, (case.batch_size, case.length), generator=generator)
    labels = torch.zeros(case.batch_size, dtype=torch.long)

    if case.mode == "forward":
        model.eval()

        def forward(length: int) -> None:
            with torch.inference_mode():
                model(input_ids=ids[:, :length])

        return forward, lambda: None

    model.train()
    classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = classes[case.optimizer](model.parameters(), lr=1e-4)

    def train(length: int) -> None:
        model(input_ids=ids[:, :length], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()

    return train, forget


def serve(case: Case, connection: Connection) -> None:
    """Build the case's model, send `ready`, then run once for each `"run"` received and send what it took.

    Sends dicts: `{"event": "ready", "base_bytes"}`, `{"event": "run", "seconds", "peak_bytes"}` and
    `{"event": "error", "memory", "message"}`, where `memory` says that an allocation was refused.
    """
    try:
        step, forget = build_step(case)
        # A tiny run first: thread stacks, kernels' code and workspaces are not what a length costs.
        step(min(_PRIMING_LENGTH, case.length))
        forget()
        gc.collect()
        peak = PeakMemory()
        peak.reset()
        base = resident_bytes()
        connection.send({"event": "ready", "base_bytes": base})
        while connection.recv() == "run":
            start = time.perf_counter()
            step(case.length)
            seconds = time.perf_counter() - start
            highest = peak.read()
            above = None if base is None or highest is None else max(highest - base, 0)
            connection.send({"event": "run", "seconds": seconds, "peak_bytes": above})
    except EOFError:  # nobody asks any more
        pass
    except Exception as error:
        # What torch raises when an allocation is refused is a plain RuntimeError: only its text tells.
        text = str(error).lower()
        memory = isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)
        connection.send({"event": "error", "memory": memory, "message": f"{type(error).__name__}: {error}"})
