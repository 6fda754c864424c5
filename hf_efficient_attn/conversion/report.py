"""What a conversion did and how far its outputs are from the source's."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


SAMPLE_TEXT = (
    "The harbour was still dark when the first boats came in. Nobody on the quay spoke much; they tied the ropes, "
    "counted the crates, and wrote the numbers into a book that had belonged to the father of the man who kept it "
    "now. Later, when the sun stood over the roofs, buyers would come down from the town and ask what the night had "
    "brought, and the answer would be the same as ever: less than last year, and more than they had feared. "
)

_OUTPUTS = (
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "end_logits",
    "reconstruction",
    "pooler_output",
)


@dataclass(frozen=True)
class Measure:
    """The distance of both models on one sample.

    Args:
        size: tokens of the sample text, or pixels of the sample image.
        hidden_states: largest relative error of a layer's states, `||ours - source|| / ||source||`.
        outputs: relative error of each output of the head.
        exact_here: the table promises equality at this size.
    """

    size: str
    hidden_states: float
    outputs: dict[str, float]
    exact_here: bool


@dataclass
class ConversionReport:
    """What was converted; `str(report)` is what the command prints.

    Args:
        source, target: model types.
        source_class, target_class: class names.
        verdict, why: the row of the table.
        copied: number of tensors copied.
        new: weight -> how it starts.
        left_out: weights of the source that the target has no place for.
        notes: what else a reader should know.
        measured: distances on samples, the shorter first.
        next_steps: what to do.
    """

    source: str
    target: str
    source_class: str
    target_class: str
    verdict: str
    why: str
    copied: int = 0
    new: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: list[Measure] = field(default_factory=list)
    next_steps: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.source} ({self.source_class}) -> {self.target} ({self.target_class})",
            f"outputs    {self.verdict}, {self.why.replace('`', '')}",
            f"copied     {self.copied} tensors",
        ]
        lines += [f"new        {count} tensors: {how}" for how, count in Counter(self.new.values()).items()]
        if self.left_out:
            lines.append(f"left out   {', '.join(self.left_out)}")
        lines += [f"note       {note}" for note in self.notes]
        for measure in self.measured:
            outputs = "".join(f", {name} {error:.1e}" for name, error in measure.outputs.items())
            promise = "exact" if measure.exact_here else "approximate"
            states = f"hidden states {measure.hidden_states:.1e}"
            lines.append(f"error      at {measure.size} ({promise}): {states}{outputs} (relative)")
        lines += [f"next       {step}" for step in self.next_steps]
        return "\n".join(lines)


@torch.no_grad()
def measure(
    source: PreTrainedModel,
    ours: PreTrainedModel,
    inputs: dict[str, Tensor],
    size: str,
    exact: bool,
    head_differs: bool = False,
) -> Measure:
    """Compare two models in evaluation on `inputs`; `head_differs` says that only the states are to be equal.

    Raises:
        ValueError: outputs differ where they are promised to be equal.
    """
    theirs, mine = (model(**inputs, output_hidden_states=True) for model in (source, ours))
    states = [_distance(a, b) for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True)]
    if "last_hidden_state" in mine:
        states.append(_distance(mine.last_hidden_state, theirs.last_hidden_state))
    outputs = {}
    for name in _OUTPUTS:
        # A head for pretraining that becomes a masked-LM head says it by another name.
        other = "prediction_logits" if name == "logits" and theirs.get(name) is None else name
        if mine.get(name) is not None and theirs.get(other) is not None:
            outputs[name] = _distance(mine[name], theirs[other])
    worst = max(states if head_differs else [*states, *outputs.values()])
    if exact and not worst < 1e-3:
        raise ValueError(
            f"the converted model differs by {worst:.1e} (relative) at {size}, where it should be exact. Nothing was "
            "written. Please report the source: this is an error of the conversion."
        )
    return Measure(size, max(states), outputs, exact)


def _distance(ours: Tensor, source: Tensor) -> float:
    """`||ours - source|| / ||source||`; the padding that some originals leave behind the text is cut off."""
    if ours.dim() > 2:
        source = source[:, : ours.shape[1]]
    difference = (ours - source).double().norm()
    return float(difference / source.double().norm().clamp(min=1e-12))


def sample_ids(tokenizer: Any, config: Any, length: int, text: str | None) -> Tensor:
    """`[1, length]` ids of a sample text, repeated as needed; without a tokenizer drawn ones, never a pad id."""
    if tokenizer is not None:
        words = text or SAMPLE_TEXT
        count = 1
        while True:
            ids = tokenizer(words * count, truncation=True, max_length=length)["input_ids"]
            # A text without tokens would never fill a sample.
            if len(ids) >= length or count > 16 * length:
                break
            count *= 2
        if len(ids) == length and max(ids) < config.vocab_size:
            return torch.tensor([ids])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, length), generator=generator)
    special = {getattr(config, name, None) for name in ("pad_token_id", "sep_token_id")}
    free = next(number for number in range(config.vocab_size) if number not in special)
    for token in special:
        ids = ids.masked_fill(ids == token, free) if token is not None else ids
    return ids


def text_inputs(model: nn.Module, ids: Tensor, *, choices: int, marks_global: bool) -> dict[str, Tensor]:
    """The arguments for one text; so many `choices` for multiple choice, and where asked a global first token."""
    # No mask: there is no padding, and transformers' Nystromformer fails with one.
    inputs = {"input_ids": ids}
    if marks_global:
        inputs["global_attention_mask"] = torch.zeros_like(ids)
        inputs["global_attention_mask"][:, 0] = 1
    if choices > 0:
        inputs = {name: torch.stack([x.roll(n, 1) for n in range(choices)], dim=1) for name, x in inputs.items()}
    return {name: x.to(model.device) for name, x in inputs.items()}
