"""Callbacks for transformers' Trainer."""

from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from .attention.lsh import lsh_layers
from .attention.performer import performer_layers


class ModelCardCallback(TrainerCallback):
    """Has the cards of what is saved say how the model did: notes the figures of each evaluation on the model.

    With `load_best_model_at_end` those of the best checkpoint stay.

    Example:

    ```python
    >>> trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=held_out, callbacks=[ModelCardCallback()])
    >>> model.card_data = {"datasets": "stanfordnlp/imdb", "license": "mit"}  # what only you know
    ```
    """

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Notes the figures."""
        self._note(model, kwargs["metrics"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """The best weights have been loaded by now."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            for row in state.log_history:
                if row["step"] == state.best_global_step and any(name.startswith("eval_") for name in row):
                    self._note(model, row)

    @staticmethod
    def _note(model: nn.Module, figures: dict[str, Any]) -> None:
        numbers = {name: value for name, value in figures.items() if isinstance(value, Real)}
        model.card_data = {**(getattr(model, "card_data", None) or {}), "metrics": numbers}


class _Redraw(TrainerCallback):
    """Draws what is random in `layers` of `kind` anew every `every` optimizer steps."""

    layers: ClassVar[Callable[[nn.Module], list[Any]]]
    kind: ClassVar[str]

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every = {every!r}: give the optimizer steps from one draw to the next, 1 or more.")
        self.every = every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Looks whether there is anything to draw."""
        if not self.layers(model):
            raise ValueError(
                f"{type(self).__name__} got a {type(model).__name__} without {self.kind} layers; leave the callback "
                "out."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Draws if it is time."""
        if state.global_step % self.every == 0:
            self.redraw(model, state.global_step // self.every)

    def redraw(self, model: nn.Module, count: int) -> None:
        """Puts what comes after `count` redraws in place."""
        for layer in self.layers(model):
            layer.redraw_(count)


class RedrawProjections(_Redraw):
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

    layers = staticmethod(performer_layers)
    kind = "Performer"


class RedrawRotations(_Redraw):
    """Gives LSH layers (Reformer) other hash directions in training, every `every` optimizer steps.

    Which ones come is a pure function of the config's `hash_seed`, the layer, the round and the step: the same on every
    rank, and after a resume as without the interruption. They are no weights and are not saved: between two steps,
    where models are evaluated and saved, a model has the first ones, as it will have when it is loaded. The released
    code draws at every step.

    Args:
        every: optimizer steps from one draw to the next, 1 or more.

    Raises:
        ValueError: `every` below 1; at the start of the training, a model without LSH layers.

    Example:

    ```python
    >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[RedrawRotations(every=1)])
    ```
    """

    layers = staticmethod(lsh_layers)
    kind = "LSH"

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Puts the step's directions in place."""
        self.redraw(model, state.global_step // self.every)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Puts the first ones back."""
        self.redraw(model, 0)
