"""What can be measured: sizes, cases, bounds and results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from .kinds import KINDS


PASSES = ("forward", "train")
MODES = (*PASSES, "generate")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "sgd")
TASKS = ("classification", "base", "masked_lm", "causal_lm")
GLOBAL_TOKENS = ("none", "cls")
OK, OVER_MEMORY, OVER_TIME, FAILED, NO_TIME = "ok", "over memory", "over time", "failed", "no time left"


def _one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if value not in names:
        raise ValueError(f"{name} is {value!r}, which is not known: pass one of {', '.join(names)}.")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, but it has to be positive: pass a number above 0.")


@dataclass(frozen=True)
class ModelSize:
    """The size of a model; `attention_window` is the total even width, None for kinds that have no window."""

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 512
    vocab_size: int = 4096
    attention_window: int | None = 128

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                _positive(name, value)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and num_heads {self.num_heads}, but the heads share the hidden "
                "size evenly: pass a hidden_size that is a multiple of num_heads."
            )
        if self.attention_window is not None and self.attention_window % 2:
            raise ValueError(
                f"attention_window is {self.attention_window}, but it counts both sides of a token: pass an even width."
            )


@dataclass(frozen=True)
class Case:
    """One thing to measure: a model kind and size at one length, a forward pass or a training step.

    Args:
        kind: a key of `KINDS`.
        length: tokens in each example; all of them valid, no padding.
        mode: "forward" (eval mode, no gradients), "train" (forward, backward and optimizer step, dropout as the
            config has it) or "generate" (new tokens behind a text of that length that has been read, greedy, with a
            cache, by the kind's causal language model whatever the task).
        size: the model's size.
        dtype: of weights and activations.
        threads: CPU threads; None leaves torch's default.
        batch_size: examples a pass.
        optimizer: "adamw" or "sgd" (plain, without momentum); for "train" only.
        seed: of the token ids and the weights; parameters of one name and shape are equal in all kinds.
        task: "classification"; "masked_lm", with labels for 15 % of the tokens and, where the config has that field,
            `skip_logits=True`; or "base" for the model without a head, whose loss is a mean of its last hidden state.
            With "generate" it is "causal_lm", whatever is given, and else never.
        global_tokens: "cls" for one global token, the first, or "none"; None leaves it to the task's default.
            Kinds without global tokens ignore it.
        checkpointing: gradient checkpointing, for "train".
        compiled: through `torch.compile`; the warm-up compiles. Not for "generate".
        device: "cpu", or "cuda" for torch's current GPU, whose own memory is what counts there.
        attention_dropout: dropout of attention's probabilities in place of what the kind's config has; None leaves it.

    Raises:
        ValueError: a name that is not known, a number that is not positive, or generation by a kind that is not causal.
    """

    kind: str
    length: int
    mode: str = "forward"
    size: ModelSize = field(default_factory=ModelSize)
    dtype: str = "float32"
    threads: int | None = None
    batch_size: int = 1
    optimizer: str = "adamw"
    seed: int = 0
    task: str = "classification"
    global_tokens: str | None = None
    checkpointing: bool = False
    compiled: bool = False
    device: str = "cpu"
    attention_dropout: float | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("mode", self.mode, MODES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("task", self.task, TASKS)
        _one_of("device", self.device, DEVICES)
        _positive("length", self.length)
        _positive("batch_size", self.batch_size)
        if self.global_tokens is not None:
            _one_of("global_tokens", self.global_tokens, GLOBAL_TOKENS)
        if self.threads is not None:
            _positive("threads", self.threads)
        if self.attention_dropout is not None and not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(
                f"attention_dropout is {self.attention_dropout}, which is no probability below 1: pass one, such as 0."
            )
        if KINDS[self.kind].windowed and self.size.attention_window is None:
            raise ValueError(f"{self.kind} needs an attention_window, but its size has None: pass an even width.")
        if self.mode == "generate" and not KINDS[self.kind].causal:
            able = ", ".join(name for name, kind in KINDS.items() if kind.causal)
            raise ValueError(f"{self.kind} has no causal form to generate with: choose among {able}.")
        if self.mode == "generate" and self.compiled:
            raise ValueError("generate is not measured compiled: leave compiled False, or choose other modes.")
        if self.mode == "generate":
            object.__setattr__(self, "task", "causal_lm")
        elif self.task == "causal_lm":
            raise ValueError("task is 'causal_lm', which is that of generation: pass another one, or mode='generate'.")
        if self.checkpointing and self.mode != "train":
            raise ValueError(f"checkpointing is for training, and mode is {self.mode!r}: leave it False.")

    @property
    def series(self) -> Case:
        """The same case without its length, and the number of examples, which may go by the length."""
        return replace(self, length=1, batch_size=1)

    @property
    def label(self) -> str:
        """The kind, with its window where it has one and its global tokens where they were chosen."""
        return self.label_with(window=True, global_tokens=True)

    def label_with(self, *, window: bool, global_tokens: bool) -> str:
        """The kind, with its window, its global tokens or both, where it has them."""
        kind = KINDS[self.kind]
        text = f"{self.kind} w={self.size.attention_window}" if window and kind.windowed else self.kind
        chosen = self.global_tokens if global_tokens and kind.global_tokens else None
        return text if chosen is None else f"{text}, {describe_global_tokens(chosen)}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Case:
        """The case that `to_json` wrote."""
        return cls(**{**data, "size": ModelSize(**data["size"])})


@dataclass(frozen=True)
class Bounds:
    """What one case may use: seconds for one pass or step, bytes of resident memory for its whole process.

    Starting a process and building its model, and in generation reading the text, may take three minutes of their own.
    """

    seconds: float
    memory_bytes: int

    def __post_init__(self) -> None:
        _positive("seconds", self.seconds)
        _positive("memory_bytes", self.memory_bytes)


@dataclass
class Result:
    """What came out of one case.

    Args:
        case: what was measured.
        status: "ok", "over memory", "over time", "failed", or "no time left" where the total time was used up.
        predicted: the case was not started, its status is an extrapolation from smaller lengths.
        seconds: each timed run, in order.
        peak_bytes: peak resident memory of the warm-up and the timed runs, less the resident memory after the model
            was built; of generation the bytes of the cache; None where the system does not tell.
        base_bytes: resident memory after the model was built.
        detail: the reason, for anything but "ok".
    """

    case: Case
    status: str = OK
    predicted: bool = False
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    base_bytes: int | None = None
    detail: str = ""

    @property
    def median(self) -> float | None:
        """Median of the timed runs, in seconds."""
        return statistics.median(self.seconds) if self.status == OK and self.seconds else None

    @property
    def verdict(self) -> str:
        """The status as it is printed."""
        return f"{self.status}, predicted" if self.predicted else self.status

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The result that `to_json` wrote."""
        return cls(**{**data, "case": Case.from_json(data["case"])})


def describe_global_tokens(chosen: str) -> str:
    """The words for a value of `Case.global_tokens`."""
    return "no global" if chosen == "none" else "CLS global"


def ask_driver_for_gpus() -> None:
    """Has torch ask the driver whether there is a GPU; its other way of asking leaves forked processes without one."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def _check_device(device: str) -> None:
    if device != "cuda":
        return
    ask_driver_for_gpus()
    import torch

    if not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch sees no GPU: pass 'cpu'.")


def make_cases(
    kinds: Iterable[str],
    lengths: Iterable[int],
    modes: Iterable[str] = PASSES,
    sizes: Iterable[ModelSize] = (ModelSize(),),
    global_tokens: Iterable[str | None] = (None,),
    tokens: int | None = None,
    **common: Any,
) -> list[Case]:
    """Every combination, ordered so that what is to be compared is measured next to each other.

    Args:
        kinds: keys of `KINDS`.
        lengths: tokens; measured from the shortest to the longest.
        modes: some of `MODES`.
        sizes: model sizes; kinds without a window take those that differ only in their window once.
        global_tokens: values of that field; kinds without global tokens are measured once.
        tokens: tokens a pass, so that shorter texts come in larger batches; None leaves it to `batch_size`.
        common: further fields of `Case`, the same for all.

    Raises:
        ValueError: as for `Case`; "cuda" where there is no GPU.
    """
    cases: dict[Case, None] = {}
    kinds, modes, sizes, global_tokens = list(kinds), list(modes), list(sizes), list(global_tokens)
    checkpointing = common.pop("checkpointing", False)
    for name, given in (("kinds", kinds), ("modes", modes)):
        if not given:
            raise ValueError(f"no {name} are given: pass at least one.")
    for kind in kinds:
        _one_of("kind", kind, KINDS)
    _check_device(common.get("device", "cpu"))
    for length, mode, chosen, kind in product(sorted(set(lengths)), modes, global_tokens, kinds):
        chosen = chosen if KINDS[kind].global_tokens else None
        if tokens is not None:
            common["batch_size"] = max(1, tokens // length)
        common["checkpointing"] = checkpointing and mode == "train"
        for size in sizes if KINDS[kind].windowed else [replace(s, attention_window=None) for s in sizes]:
            cases[Case(kind, length, mode, size, global_tokens=chosen, **common)] = None
    return list(cases)
