"""One encoder layer and the stack of them. Parameter names of BERT."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..cpu import can_overwrite, dropout, dropout_add, feed_forward, in_reach_of_training, is_plain, is_recorder
from .activations import activation, head_activation
from .chunks import in_chunks, inference_chunk
from .configuration import EffConfig, EffEncoderConfig
from .packing import Documents, attend


AttentionFactory = Callable[[EffConfig, int], nn.Module]
"""Builds the attention module of a layer: `(config, layer_idx)`; its forward returns `(states, weights or None)`."""


def dropped(module: nn.Module, states: Tensor) -> Tensor:
    """`module(states)`, in the quicker way of a CPU where it is torch's own dropout and nobody watches it."""
    return dropout(states, module.p) if module.training and is_plain(module, nn.Dropout) else module(states)


class ResidualOutput(nn.Module):
    """Dense, dropout and residual, after attention and after the feed-forward layer."""

    def __init__(self, config: EffConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))

    def forward(self, sublayer: Tensor, residual: Tensor) -> Tensor:
        """`sublayer` `[batch, length, in_features]` back to `[batch, length, hidden]`, added to `residual`."""
        return self.finish(self.dense(sublayer), residual)

    def finish(self, states: Tensor, residual: Tensor) -> Tensor:
        """What comes after the dense layer: `states` and `residual` `[batch, length, hidden]` -> the same shape."""
        if self.dropout.training and is_plain(self.dropout, nn.Dropout):
            return dropout_add(states, residual, self.dropout.p)
        return residual + self.dropout(states)


class Output(ResidualOutput):
    """The same with the sublayer's norm, after it or before it."""

    def __init__(self, config: EffEncoderConfig, in_features: int) -> None:
        super().__init__(config, in_features)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_norm = config.norm_position == "pre"

    def normed_input(self, hidden_states: Tensor) -> Tensor:
        """What the sublayer reads: the normed states where the norm comes first."""
        return self.LayerNorm(hidden_states) if self.pre_norm else hidden_states

    def finish(self, states: Tensor, residual: Tensor) -> Tensor:
        """See `ResidualOutput.finish`."""
        total = super().finish(states, residual)
        return total if self.pre_norm else self.LayerNorm(total)


class Intermediate(nn.Module):
    """First half of the feed-forward layer."""

    def __init__(self, config: EffConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, intermediate]`."""
        return self.activation(self.dense(hidden_states))


class Recorded(nn.Module):
    """A module whose outputs transformers records through hooks. The hooks cannot be pickled, so they stay behind."""

    def __getstate__(self) -> dict[str, Any]:
        hooks = OrderedDict((key, hook) for key, hook in self._forward_hooks.items() if not is_recorder(hook))
        return {**self.__dict__, "_forward_hooks": hooks}


class AttentionBlock(Recorded):
    """A mechanism (`self`) and its output projection."""

    def __init__(self, config: EffEncoderConfig, layer_idx: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.self = attention(config, layer_idx)
        self.output = Output(config, config.hidden_size)
        self.chunk_above = config.chunk_above

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None,
        documents: Documents | None = None,
        overwrite: bool = False,
        **context: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`[batch, length, hidden]` -> the same shape, and the weights where the backend has them.

        With `overwrite` the result may take the memory of `hidden_states`.
        """
        given = self.output.normed_input(hidden_states)
        mixed, weights = attend(self.self, given, key_padding_mask, documents, context)
        into = hidden_states if overwrite else mixed if can_overwrite(mixed, self.self, hidden_states) else None
        chunk = inference_chunk(mixed, self.output, above=self.chunk_above)
        return in_chunks(self.output, chunk, mixed, hidden_states, into=into), weights


class FeedForwardLayer(Recorded, GradientCheckpointingLayer):
    """A layer that ends with a feed-forward part: `intermediate`, `output` and `chunk_above`, which a subclass adds."""

    output_class: ClassVar[type[ResidualOutput]] = ResidualOutput
    """What `output` is."""

    def feed_forward_input(self, hidden_states: Tensor) -> Tensor:
        """What the feed-forward part reads of `[batch, length, hidden]`: the same shape."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its feed-forward part reads.")

    def add_feed_forward(self, attended: Tensor, chunk: int = 0, into: Tensor | None = None) -> Tensor:
        """`[batch, length, hidden]` -> the same shape.

        In chunks of so many tokens, 0 for what is quickest; `into` as in `in_chunks`.
        """
        chunk = chunk or inference_chunk(attended, self.intermediate, self.output, above=self.chunk_above)
        return in_chunks(self._feed_forward, chunk, attended, into=into)

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        given = self.feed_forward_input(hidden_states)
        if not self._computes_again(given):
            return self.output(self.intermediate(given), hidden_states)
        first, second = self.intermediate.dense, self.output.dense
        states = feed_forward(given, first.weight, first.bias, second.weight, second.bias, self.intermediate.activation)
        return self.output.finish(states, hidden_states)

    def _computes_again(self, states: Tensor) -> bool:
        """Whether the feed-forward layer may keep less for backward: on a CPU in training, where nobody notices."""
        first, second, act = self.intermediate.dense, self.output.dense, self.intermediate.activation
        parts = (
            (self.intermediate, Intermediate),
            (self.output, self.output_class),
            (first, nn.Linear),
            (second, nn.Linear),
        )
        return (
            in_reach_of_training(states)
            and all(is_plain(module, kind) for module, kind in (*parts, (act, type(act))))
            and first.weight.dtype == second.weight.dtype == states.dtype
            and not any(True for _ in act.parameters())
        )


class EncoderLayer(FeedForwardLayer):
    """Attention, then feed-forward, each with its residual; post-norm as in BERT, or pre-norm."""

    output_class = Output

    def __init__(self, config: EffEncoderConfig, layer_idx: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, layer_idx, attention)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)
        self.chunk_size, self.chunk_above = config.chunk_size_feed_forward, config.chunk_above

    def forward(
        self,
        hidden_states: Tensor,
        key_padding_mask: Tensor | None = None,
        overwrite: bool = False,
        **context: Any,
    ) -> Tensor:
        """`[batch, length, hidden]` -> the same shape; `context` goes to the attention module.

        With `overwrite` the result may take the memory of `hidden_states`.
        """
        attended, _ = self.attention(hidden_states, key_padding_mask, overwrite=overwrite, **context)
        own = overwrite or can_overwrite(attended, self.attention, hidden_states)
        into = attended if own else None
        return self.add_feed_forward(attended, self.chunk_size, into)

    def feed_forward_input(self, hidden_states: Tensor) -> Tensor:
        """See `FeedForwardLayer.feed_forward_input`."""
        return self.output.normed_input(hidden_states)


class Encoder(nn.Module):
    """The stack of layers, with a final norm if they are pre-norm."""

    def __init__(self, config: EffEncoderConfig, attention: AttentionFactory) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config, index, attention) for index in range(config.num_hidden_layers))
        pre_norm = config.norm_position == "pre"
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if pre_norm else None

    def attentions(self) -> list[nn.Module]:
        """The mechanism of each layer."""
        return [layer.attention.self for layer in self.layer]

    def forward(
        self, hidden_states: Tensor, key_padding_mask: Tensor | None, overwrite: bool = False, **context: Any
    ) -> Tensor:
        """`[batch, length, hidden]` -> the same shape.

        With `overwrite` the states of all layers may be in the memory of `hidden_states`: callers up the stack hold on
        to that anyway.
        """
        for layer in self.layer:
            hidden_states = layer(hidden_states, key_padding_mask, overwrite=overwrite, **context)
        return hidden_states if self.LayerNorm is None else self.LayerNorm(hidden_states)


class Pooler(nn.Module):
    """`tanh(dense(first token))`."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activate = head_activation(config.head_act, torch.tanh)

    def forward(self, first_token: Tensor) -> Tensor:
        """`[batch, hidden]` -> `[batch, hidden]`."""
        return self.activate(self.dense(first_token))
