"""A Trainer for joint pretraining: it logs the parts of the loss and tells the collator the epoch."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .outputs import COUNTS, ratios


# Columns that the collator uses up, and the model does not know.
_COLLATED = ("special_tokens_mask", "word_ids")


class ElectraTrainer(Trainer):
    """transformers' Trainer for `EffElectraForJointPreTraining`.

    It logs, beside the loss, both models' losses, the generator's accuracy, the share of replaced tokens, and precision
    and recall of the discriminator, on all ranks: in training over all batches since the last log, in evaluation and
    prediction over the whole set (with several processes, examples repeated to fill their last batches included). A
    collator that has `set_epoch`, as `DataCollatorForReplacedTokenDetection` also inside
    `DataCollatorWithGlobalAttention`, is told the epoch: every epoch has other masks, an interrupted run goes on with
    the ones it would have had, and evaluation always has those of epoch 0. The columns that it uses up,
    `special_tokens_mask` and `word_ids`, are kept for it.

    The model trains with transformers' own Trainer as well, without these.

    Raises:
        ValueError: a model that is no `EffElectraForJointPreTraining`, label smoothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(getattr(self.model, "config", None), "model_type", None) != "eff_electra_joint":
            raise ValueError(
                f"ElectraTrainer got a {type(self.model).__name__}; it trains EffElectraForJointPreTraining. For other "
                "models take transformers' Trainer."
            )
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor = {self.args.label_smoothing_factor}: joint pretraining has no such loss; set "
                "it to 0."
            )
        self._sums = {True: self._no_counts(), False: self._no_counts()}
        self._masking = _masking_collator(self.data_collator)
        if self._masking is not None:
            self.add_callback(EpochOfMasks(self._masking))

    def _no_counts(self) -> Tensor:
        device = self.args.device
        # Apple's GPUs have no float64.
        return torch.zeros(len(COUNTS), dtype=torch.float if device.type == "mps" else torch.double, device=device)

    def _figures(self, training: bool) -> dict[str, float]:
        """Figures of all ranks since the last call."""
        sums = self.accelerator.reduce(self._sums[training], reduction="sum")
        self._sums[training] = self._no_counts()
        config = self.model.config
        return ratios(sums, config.detects and config.stage != "generator")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._masking is not None:
            self._signature_columns = list(dict.fromkeys((*self._signature_columns, *_COLLATED)))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; figures begin anew."""
        self._sums[True] = self._no_counts()
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """As in transformers; the counts of the batch are added up."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        counts = outputs["counts"].detach().reshape(-1, len(COUNTS)).sum(dim=0)
        self._sums[model.training] += counts.to(self._sums[model.training].device)
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the lines on loading."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.model.write_card(self.args.output_dir)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the figures of training."""
        if "loss" in logs:
            logs |= self._figures(training=True)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in transformers, with the masks of epoch 0 and the figures of the set."""
        self._sums[False] = self._no_counts()
        epoch = None if self._masking is None else self._masking.epoch
        if self._masking is not None:
            self._masking.set_epoch(0)
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            if self._masking is not None:
                self._masking.set_epoch(epoch)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._figures(False).items()})
        return output


def _masking_collator(collator: Any) -> Any:
    """The collator that is to be told the epoch, also where another one wraps it; None if there is none."""
    while collator is not None and not hasattr(collator, "set_epoch"):
        collator = getattr(collator, "collator", None)
    return collator


class EpochOfMasks(TrainerCallback):
    """Tells a collator the epoch, before its first batch is made, in any Trainer.

    Every epoch then has other masks, and an interrupted run goes on with the ones it would have had. `ElectraTrainer`
    does it by itself. Of data without a length (a stream) this holds within the first pass: after a later one Trainer
    itself goes on elsewhere, because it counts all steps as those of one epoch.

    Args:
        collator: has `set_epoch`, as `DataCollatorForReplacedTokenDetection`, or any other object that has.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.epoch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`state.epoch` counts finished epochs, in an interrupted one with a fraction."""
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counted here: where data has no length, `state.epoch` is a share of the training."""
        self.collator.set_epoch(self.epoch)
        self.epoch += 1
