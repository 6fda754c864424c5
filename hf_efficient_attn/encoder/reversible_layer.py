"""Layers of reversible residuals and the stack of them. Parameter names of Reformer."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from ..cpu import TOKENS_AT_ONCE
from .activations import activation
from .chunks import TOKENS_FOR_MEMORY, in_chunks
from .configuration import EffEncoderConfig
from .layer import AttentionFactory, Recorded, dropped
from .packing import Documents, attend
from .reversible import ReversibleTape, reversible_step


class AttentionOutput(nn.Module):
    """Back to the width of the encoder, and dropout."""

    def __init__(self, config: EffEncoderConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))

    def forward(self, mixed: Tensor) -> Tensor:
        """`[batch, length, in_features]` -> `[batch, length, hidden]`."""
        return dropped(self.dropout, self.dense(mixed))


class ReversibleAttention(Recorded):
    """Norm, a mechanism (`self_attention`) and its output projection."""

    def __init__(self, config: EffEncoderConfig, layer_idx: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attention = attention(config, layer_idx)
        width = self.self_attention.num_attention_heads * self.self_attention.head_dim
        self.output = AttentionOutput(config, width)

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None,
        documents: Documents | None = None,
        **context: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[batch, length, hidden]` -> the same shape, and the weights where the backend has them."""
        normed = self.layer_norm(hidden_states)
        mixed, weights = attend(self.self_attention, normed, key_padding_mask, documents, context)
        return self.output(mixed), weights


class FeedForwardDense(nn.Module):
    """First half of the feed-forward branch; dropout before the activation, as published."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))
        self.activation = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, intermediate]`."""
        return self.activation(dropped(self.dropout, self.dense(hidden_states)))


class FeedForwardOutput(nn.Module):
    """Second half of the feed-forward branch."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, intermediate]` -> `[batch, length, hidden]`."""
        return dropped(self.dropout, self.dense(hidden_states))


class FeedForward(nn.Module):
    """The feed-forward branch, which works on each token alone."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = FeedForwardDense(config)
        self.output = FeedForwardOutput(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> the same shape."""
        return self.output(self.dense(self.layer_norm(hidden_states)))


class ReversibleLayer(Recorded):
    """`y1 = x1 + attention(x2)`, `y2 = x2 + feed_forward(y1)`."""

    def __init__(self, config: EffEncoderConfig, layer_idx: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.attention = ReversibleAttention(config, layer_idx, attention)
        self.feed_forward = FeedForward(config)
        self.chunk_size, self.chunk_above = config.chunk_size_feed_forward, config.chunk_above

    def chunk(self, states: Tensor) -> int:
        """Tokens that the feed-forward branch takes at a time; 0 for all at once."""
        if self.chunk_size or torch.compiler.is_compiling():
            return self.chunk_size
        if states.device.type != "cpu":
            return TOKENS_FOR_MEMORY if states.shape[1] > self.chunk_above else 0
        # The inner states of a long text are fresh memory, which costs more than the work in it.
        return TOKENS_AT_ONCE

    def forward(
        self,
        x2: Tensor,
        x1: Tensor,
        key_padding_mask: Tensor | None = None,
        tape: ReversibleTape | None = None,
        **context: Any,
    ) -> tuple[Tensor, Tensor]:
        """`[batch, length, hidden]` each -> `y2` and `y1`; `context` goes to the attention module.

        With a `tape` nothing is kept for the backward pass, in which the layer is computed again.
        """
        chunk = self.chunk(x2)
        if tape is None:
            y1 = x1 + self.attention(x2, key_padding_mask, **context)[0]
            return x2 + in_chunks(self.feed_forward, chunk, y1), y1
        replay: dict[Any, Any] = {}

        def attend(states: Tensor) -> Tensor:
            return self.attention(states, key_padding_mask, replay=replay, **context)[0]

        modules = (self.attention, self.feed_forward)
        y1, y2 = reversible_step(attend, self.feed_forward, x1, x2, tape, modules, chunk)
        return y2, y1


class ReversibleEncoder(nn.Module):
    """The stack of reversible layers: both streams begin as the input, and end side by side under a norm."""

    gradient_checkpointing = False
    """Set by transformers; reversible layers need it only where they are not reversed."""

    recorded: ClassVar[dict[str, OutputRecorder]] = {
        "hidden_states": OutputRecorder(ReversibleLayer, index=0),
        "attentions": OutputRecorder(ReversibleAttention, index=1),
    }
    """What `_can_record_outputs` of its models is."""

    def __init__(self, config: EffEncoderConfig, attention: AttentionFactory) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ReversibleLayer(config, index, attention) for index in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))
        self.reversible = config.reversible

    def attentions(self) -> list[nn.Module]:
        """The mechanism of each layer."""
        return [layer.attention.self_attention for layer in self.layers]

    def forward(
        self, hidden_states: Tensor, key_padding_mask: Tensor | None, reverse: bool = True, **context: Any
    ) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, 2 * hidden]`.

        `reverse` allows to compute states again in the backward pass, but for the last layer's; a cache would notice.
        """
        reverse = reverse and self.reversible and context.get("past_key_values") is None
        tape = ReversibleTape() if reverse and torch.is_grad_enabled() and not torch.compiler.is_compiling() else None
        x1 = x2 = hidden_states
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            if tape is None and self.gradient_checkpointing and self.training:
                x2, x1 = self._gradient_checkpointing_func(layer.__call__, x2, x1, key_padding_mask, **context)
            else:
                # The last layer's backward pass comes first: to keep its states costs memory that the others take, too.
                x2, x1 = layer(x2, x1, key_padding_mask, tape if number < last else None, **context)
        return dropped(self.dropout, self.layer_norm(torch.cat([x1, x2], dim=-1)))
