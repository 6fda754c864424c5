"""What every task's classes share: the base model under its published name, and a head."""

from typing import Any, ClassVar

from torch import Tensor

from .configuration import EffEncoderConfig
from .inputs import first_token


class TaskModel:
    """A base model under its published name and, in subclasses, a head."""

    base_class: ClassVar[type]
    head_class: ClassVar[type]
    task: ClassVar[str]
    is_causal: ClassVar[bool] = False
    accepts_loss_kwargs = False
    """Read by Trainer: whether the loss divides by `num_items_in_batch` itself."""

    def __init__(self, config: EffEncoderConfig) -> None:
        if config.is_decoder and not self.is_causal:
            raise ValueError(
                f"{type(self).__name__} got is_decoder = True, but its task needs tokens that attend later ones; "
                "load with is_decoder=False."
            )
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.tie_word_embeddings and self._tied_weights_keys:
            # Trainer warns about tied names that a checkpoint lacks, unless they stand here.
            self._keys_to_ignore_on_save = set(self._tied_weights_keys)
        base = self.base_class(config, add_pooling_layer=self._needs_pooler(), task=self.task)
        setattr(self, self.base_model_prefix, base)
        self._add_head(config)
        self.post_init()

    def _needs_pooler(self) -> bool:
        return False

    def _add_head(self, config: EffEncoderConfig) -> None:
        raise NotImplementedError(f"{type(self).__name__} adds no head.")

    def _text_state(
        self, outputs: Any, input_ids: Tensor | None, attention_mask: Tensor | None, pooled: bool
    ) -> Tensor:
        """What stands for a whole text, `[batch, hidden]`: the pooled first token, or its state as it is."""
        if pooled:
            return outputs.pooler_output
        states = outputs.last_hidden_state
        return first_token(states, self.base_model.key_padding_mask(input_ids, attention_mask, states.shape[:2]))
