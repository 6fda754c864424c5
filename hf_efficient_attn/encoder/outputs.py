"""Model outputs that transformers has no general class for."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class EffPreTrainingOutput(ModelOutput):
    """Output of masked-LM with next-sentence prediction.

    Args:
        loss: sum of both losses, where their labels were given.
        prediction_logits: `[batch, length, vocab_size]`.
        seq_relationship_logits: `[batch, 2]`.
        hidden_states: `num_hidden_layers + 1` tensors `[batch, length, hidden]`.
        attentions: `num_hidden_layers` tensors `[batch, heads, length, length]`.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class EffReplacedTokenOutput(ModelOutput):
    """Output of replaced-token detection.

    Args:
        loss: mean binary cross entropy of the attended tokens, where labels were given.
        logits: `[batch, length]`, above 0 = replaced.
        hidden_states: `num_hidden_layers + 1` tensors `[batch, length, hidden]`.
        attentions: `num_hidden_layers` tensors `[batch, heads, length, length]`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
