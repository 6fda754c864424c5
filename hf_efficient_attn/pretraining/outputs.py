"""What joint pretraining returns, and the counts behind its figures."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput


COUNTS = (
    "texts",
    "generator_loss",
    "discriminator_loss",
    "tokens",
    "masked",
    "generator_correct",
    "replaced",
    "replaced_found",
    "replaced_missed",
    "original_found",
    "original_missed",
)
"""Entries of a vector of counts: sums, so that those of batches, steps and ranks add up. Both losses are those of a
batch times its texts; the last four are 0 where the discriminator does not detect replaced tokens."""


def ratios(counts: Tensor, detects: bool = True) -> dict[str, float]:
    """Figures of a vector of counts: both losses as means over texts, and shares between 0 and 1.

    `generator_accuracy` is the share of masked tokens for which the generator's first choice is right, `replaced_rate`
    that of all tokens that were replaced. With `detects` precision and recall follow, of replaced and of original
    tokens; a share of nothing is 0.
    """
    sums = dict(zip(COUNTS, counts.tolist(), strict=True))

    def share(part: float, rest: float) -> float:
        return part / (part + rest) if part + rest > 0 else 0.0

    texts = max(1.0, sums["texts"])
    found = {
        "generator_loss": sums["generator_loss"] / texts,
        "discriminator_loss": sums["discriminator_loss"] / texts,
        "generator_accuracy": sums["generator_correct"] / max(1.0, sums["masked"]),
        "replaced_rate": sums["replaced"] / max(1.0, sums["tokens"]),
    }
    if detects:
        # What is called replaced and is not, is an original that was missed; and the other way round.
        found["replaced_precision"] = share(sums["replaced_found"], sums["original_missed"])
        found["replaced_recall"] = share(sums["replaced_found"], sums["replaced_missed"])
        found["original_precision"] = share(sums["original_found"], sums["replaced_missed"])
        found["original_recall"] = share(sums["original_found"], sums["original_missed"])
    return found


@dataclass
class EffElectraJointOutput(ModelOutput):
    """Output of joint pretraining.

    Args:
        loss: `generator_loss + loss_weight * discriminator_loss`; None without labels.
        discriminator_logits: `[batch, length]`, above 0 = replaced; None for objectives that predict tokens.
        is_replaced: `[batch, length]` int64, 1 = replaced, 0 = original, -100 at padding.
        generator_loss: mean over masked tokens.
        discriminator_loss: mean over the tokens that the objective takes, without its weight.
        corrupted_ids: `[batch, length]`, what the discriminator read.
        counts: sums of this batch, see `COUNTS`; `ratios` makes figures of them.
    """

    loss: torch.Tensor | None = None
    discriminator_logits: torch.Tensor | None = None
    is_replaced: torch.Tensor | None = None
    generator_loss: torch.Tensor | None = None
    discriminator_loss: torch.Tensor | None = None
    corrupted_ids: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """`ratios` of this batch."""
        return ratios(self.counts, self.discriminator_logits is not None)
