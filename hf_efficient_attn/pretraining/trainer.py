"""A Trainer for joint pretraining: it logs the parts of the loss and tells the collator the epoch."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .outputs import COUNTS, ratios


class ElectraTrainer(Trainer):
    """transformers' Trainer for `EffElectraForJointPreTraining`.

    It logs, beside the loss, both models' losses, the generator's accuracy, the share of replaced tokens, and precision
    and recall of the discriminator: in training over all batches since the last log, in evaluation over the whole
    evaluation set, on all ranks. A collator that has `set_epoch`, as `DataCollatorForReplacedTokenDetection`, is told
    the epoch: every epoch has other masks, an interrupted run goes on with the ones it would have had, and evaluation
    always has those of epoch 0.

    The model trains with transformers' own Trainer as well, without these.

    Raises:
        ValueError: a model that is no `EffElectraForJointPreTraining`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.model.config
        if config.model_type != "eff_electra_joint":
            raise ValueError(
                f"ElectraTrainer got a {type(self.model).__name__}; it trains EffElectraForJointPreTraining. For other "
                "models take transformers' Trainer."
            )
        self._sums = {True: self._no_counts(), False: self._no_counts()}
        if self._tells_epochs:
            self.add_callback(_EpochOfMasks(self.data_collator))

    @property
    def _tells_epochs(self) -> bool:
        return hasattr(self.data_collator, "set_epoch")

    def _no_counts(self) -> Tensor:
        device = self.args.device
        # Apple's GPUs have no float64.
        return torch.zeros(len(COUNTS), dtype=torch.float if device.type == "mps" else torch.double, device=device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """As in transformers; the counts of the batch are added up."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        counts = outputs["counts"].detach().reshape(-1, len(COUNTS)).sum(dim=0)
        self._sums[model.training] += counts.to(self._sums[model.training].device)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the figures of joint pretraining."""
        front = {"loss": "", "eval_loss": "eval_"}
        for key, prefix in front.items():
            if key in logs:
                training = key == "loss"
                sums = self.accelerator.reduce(self._sums[training], reduction="sum")
                self._sums[training] = self._no_counts()
                detects = self.model.config.detects
                logs |= {f"{prefix}{name}": value for name, value in ratios(sums, detects).items()}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers, with the masks of epoch 0."""
        self._sums[False] = self._no_counts()
        if not self._tells_epochs:
            return super().evaluate(*args, **kwargs)
        epoch = self.data_collator.epoch
        self.data_collator.set_epoch(0)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.data_collator.set_epoch(epoch)


class _EpochOfMasks(TrainerCallback):
    """Tells a collator the epoch, before its first batch is made."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`state.epoch` counts finished epochs, in an interrupted one with a fraction."""
        self.collator.set_epoch(int(state.epoch or 0))
