"""Callbacks for transformers' Trainer."""

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from .attention.performer import performer_layers


class RedrawProjections(TrainerCallback):
    """Draws the random projections of Performer layers anew in training, every `every` optimizer steps.

    Which ones come is a pure function of the config's `projection_seed`, the layer and the step: the same on every
    rank, and after a resume as without the interruption.

    Args:
        every: optimizer steps from one draw to the next, 1 or more.

    Raises:
        ValueError: `every` below 1; at the start of the training, a model without Performer layers.

    Example:

    ```python
    >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RedrawProjections(every=1000)])
    ```
    """

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every = {every!r}: give the optimizer steps from one draw to the next, 1 or more.")
        self.every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Looks whether there is anything to draw."""
        if not performer_layers(model):
            raise ValueError(
                f"RedrawProjections got a {type(model).__name__} without Performer layers; leave the callback out."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Draws if it is time."""
        if state.global_step % self.every == 0:
            for layer in performer_layers(model):
                layer.redraw_(state.global_step // self.every)
