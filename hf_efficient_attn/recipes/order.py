"""The order of the training rows, the same on every process and after an interruption."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


class OrderByEpoch(TrainerCallback):
    """Makes the order of `group_by_length` a function of the seed and the epoch.

    Trainer's own draws it from torch's global generator. After dropout on batches of different length the processes'
    generators differ, so that rows are read twice or never; and a run that goes on from the middle of an epoch would
    draw another order than it had, with the same effect.
    """

    def __init__(self) -> None:
        self.epoch = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """`state.epoch` counts finished epochs, in an interrupted one with a fraction."""
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Seed the sampler."""
        batches = getattr(train_dataloader, "batch_sampler", None)
        # Of several processes each takes its share of the batches.
        sampler = getattr(getattr(batches, "batch_sampler", batches), "sampler", None)
        if isinstance(sampler, LengthGroupedSampler):
            seed = args.data_seed if args.data_seed is not None else args.seed
            sampler.generator = torch.Generator().manual_seed(seed * 1_000_003 + self.epoch)
        self.epoch += 1
