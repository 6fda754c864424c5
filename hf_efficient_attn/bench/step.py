"""One case's model and what is timed of it: runs in a process of its own, asked through a pipe."""

from __future__ import annotations

import gc
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from .cases import Case
from .kinds import KINDS
from .memory import PeakMemory, resident_bytes


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")
_PRIMING_LENGTH = 16
_THROWAWAY_LENGTH = 64
_BY_DEFAULT = {("classification", None), ("classification", "cls"), ("base", None), ("base", "none")}


def build_model(case: Case) -> PreTrainedModel:
    """The case's model, with weights that depend on the seed and their names only."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    import hf_efficient_attn  # noqa: F401  (registers the families)

    kind, size = KINDS[case.kind], case.size
    positions = max(case.length, _PRIMING_LENGTH)
    sizes = {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.intermediate_size * 2 // 3 if kind.gated else size.intermediate_size,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": positions + kind.extra_positions,
    }
    layers = {
        name: [pattern[i % len(pattern)] for i in range(size.num_layers)] for name, pattern in kind.layer_fields.items()
    }
    config = AutoConfig.for_model(
        kind.model_type,
        **{kind.size_fields.get(name, name): value for name, value in sizes.items()},
        **layers,
        **({kind.window_field: size.attention_window} if kind.windowed else {}),
        **({kind.length_field: case.length} if kind.length_field else {}),
        **kind.fields,
    )
    auto_class = AutoModel if case.task == "base" else AutoModelForSequenceClassification
    extra = {} if kind.attn_implementation is None else {"attn_implementation": kind.attn_implementation}
    model = auto_class.from_config(config, **extra)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(parameter, name.removeprefix(f"{model.base_model_prefix}."), case.seed, positions)
    return model.to(getattr(torch, case.dtype))


def _draw(parameter: torch.Tensor, name: str, seed: int, positions: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name.endswith("position_embeddings.weight"):
        # Reserved rows stand before the first position.
        parameter[:-positions] = 0.0
        parameter = parameter[-positions:]
    is_norm = parameter.dim() == 1 and name.endswith("weight")
    parameter.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)


def build_inputs(case: Case) -> dict[str, torch.Tensor]:
    """What the case's model is called with, each `[batch_size, length]`."""
    import torch

    generator = torch.Generator().manual_seed(case.seed)
    # Ids from 5 on: the first ones are special tokens (padding among them) in some of the kinds.
    ids = torch.randint(5, case.size.vocab_size, (case.batch_size, case.length), generator=generator)
    inputs = {"input_ids": ids}
    # Base models have no global token unless they are given some; classifiers choose the first by themselves.
    if KINDS[case.kind].global_tokens and (case.task, case.global_tokens) not in _BY_DEFAULT:
        inputs["global_attention_mask"] = torch.zeros_like(ids)
        inputs["global_attention_mask"][:, 0] = int(case.global_tokens == "cls")
    return inputs


def build_step(case: Case) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Build the case's model.

    Returns:
        `step(length)`, which runs one forward pass or one training step on `batch_size` examples of that length, and
        `forget()`, which drops gradients and optimizer state.
    """
    import torch

    if case.threads is not None:
        torch.set_num_threads(case.threads)
    model, inputs = build_model(case), build_inputs(case)

    if case.mode == "forward":
        model.eval()

        def forward(length: int) -> None:
            with torch.inference_mode():
                model(**{name: tensor[:, :length] for name, tensor in inputs.items()})

        return forward, lambda: None

    model.train()
    classes = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = classes[case.optimizer](model.parameters(), lr=1e-4)
    labels = torch.zeros(case.batch_size, dtype=torch.long)
    # Reversible models have two streams of states side by side.
    direction = torch.randn(2 * case.size.hidden_size, generator=torch.Generator().manual_seed(case.seed))
    direction = direction.to(getattr(torch, case.dtype))

    def loss(length: int) -> torch.Tensor:
        batch = {name: tensor[:, :length] for name, tensor in inputs.items()}
        if case.task == "classification":
            return model(**batch, labels=labels).loss
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

    return train, forget


def serve(case: Case, connection: Connection) -> None:
    """Build the case's model, send `ready`, then run once for each `"run"` received and send what it took.

    Sends dicts: `{"event": "ready", "base_bytes"}`, `{"event": "run", "seconds", "peak_bytes"}` and
    `{"event": "error", "memory", "message"}`, where `memory` says that an allocation was refused.
    """
    try:
        step, forget = build_step(case)
        # A tiny run first: thread stacks, kernels' code and workspaces are not what a length costs.
        if KINDS[case.kind].primes:
            step(min(_PRIMING_LENGTH, case.length))
            forget()
        else:
            small = replace(case.size, hidden_size=8 * case.size.num_heads, num_layers=1, intermediate_size=16)
            build_step(replace(case, size=small, length=_THROWAWAY_LENGTH))[0](_THROWAWAY_LENGTH)
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
