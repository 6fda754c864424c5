"""One pre-norm layer of a vision encoder and the stack of them. Parameter names of ViT."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cpu import can_overwrite
from .activations import activation
from .chunks import in_chunks, inference_chunk
from .layer import AttentionFactory, FeedForwardLayer, Intermediate, Recorded, ResidualOutput
from .vision_configuration import EffVisionConfig


class Packing(NamedTuple):
    """Each example's own tokens moved to the front, for mechanisms that go by a token's place among its own.

    Images of different width leave holes in a batch: row by row, every line of a narrow one ends in padding.

    Args:
        order: `[batch, length]`, the token that stands at each place.
        place: `[batch, length]`, where each token stands.
        mask: bool `[batch, length]`, the places of own tokens.
    """

    order: Tensor
    place: Tensor
    mask: Tensor

    def pack(self, states: Tensor) -> Tensor:
        """`[batch, length, hidden]` in the order of places."""
        return _take(states, self.order, 1)

    def unpack(self, states: Tensor) -> Tensor:
        """`[batch, length, hidden]` in the order of tokens again."""
        return _take(states, self.place, 1)

    def unpack_weights(self, weights: Tensor) -> Tensor:
        """Attention weights `[batch, heads, length, length]` in the order of tokens again."""
        return _take(_take(weights, self.place, 2), self.place, 3)


def pack_tokens(key_padding_mask: Tensor) -> Packing:
    """The packing of bool `[batch, length]`."""
    order = (~key_padding_mask).long().argsort(dim=1, stable=True)
    return Packing(order, order.argsort(dim=1), key_padding_mask.gather(1, order))


def _take(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """`tensor` with the entries `index` `[batch, length]` along `dim`."""
    shape = [index.shape[0]] + [1] * (tensor.dim() - 1)
    shape[dim] = index.shape[1]
    return tensor.gather(dim, index.view(shape).expand_as(tensor))


class VisionAttentionBlock(Recorded):
    """A mechanism (`attention`) and its output projection."""

    def __init__(self, config: EffVisionConfig, layer_idx: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.attention = attention(config, layer_idx)
        self.output = ResidualOutput(config, config.hidden_size)
        self.chunk_above = config.chunk_above

    def forward(
        self,
        normed: Tensor,
        residual: Tensor,
        key_padding_mask: Tensor | None,
        packing: Packing | None = None,
        **context: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`normed` and `residual` `[batch, length, hidden]` -> the same shape, and the weights where there are some."""
        if packing is None:
            mixed, weights = self.attention(normed, key_padding_mask, **context)
        else:
            mixed, weights = self.attention(packing.pack(normed), packing.mask, **context)
            mixed = packing.unpack(mixed)
            weights = None if weights is None else packing.unpack_weights(weights)
        into = mixed if can_overwrite(mixed, self.attention, normed) else None
        chunk = inference_chunk(mixed, self.output, above=self.chunk_above)
        return in_chunks(self.output, chunk, mixed, residual, into=into), weights


class VisionLayer(FeedForwardLayer):
    """Attention, then feed-forward, each with its norm before and its residual."""

    def __init__(self, config: EffVisionConfig, layer_idx: int, attention: AttentionFactory) -> None:
        super().__init__()
        self.attention = VisionAttentionBlock(config, layer_idx, attention)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, config.intermediate_size)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.chunk_size, self.chunk_above = config.chunk_size_feed_forward, config.chunk_above

    def forward(self, hidden_states: Tensor, key_padding_mask: Tensor | None = None, **context: Any) -> Tensor:
        """`[batch, length, hidden]` -> the same shape; `context` goes to the attention module."""
        normed = self.layernorm_before(hidden_states)
        attended, _ = self.attention(normed, hidden_states, key_padding_mask, **context)
        into = attended if can_overwrite(attended, self.attention, hidden_states) else None
        return self.add_feed_forward(attended, self.chunk_size, into)

    def feed_forward_input(self, hidden_states: Tensor) -> Tensor:
        """See `FeedForwardLayer.feed_forward_input`."""
        return self.layernorm_after(hidden_states)


class VisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: EffVisionConfig, attention: AttentionFactory) -> None:
        super().__init__()
        self.layer = nn.ModuleList(VisionLayer(config, index, attention) for index in range(config.num_hidden_layers))

    def attentions(self) -> list[nn.Module]:
        """The mechanism of each layer."""
        return [layer.attention.attention for layer in self.layer]

    def forward(self, hidden_states: Tensor, key_padding_mask: Tensor | None, **context: Any) -> Tensor:
        """`[batch, length, hidden]` -> the same shape."""
        for layer in self.layer:
            hidden_states = layer(hidden_states, key_padding_mask, **context)
        return hidden_states


class VisionPooler(nn.Module):
    """Dense and activation on what stands for an image."""

    def __init__(self, config: EffVisionConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = activation(config.pooler_act)

    def forward(self, state: Tensor) -> Tensor:
        """`[batch, hidden]` -> `[batch, pooler_output_size]`."""
        return self.activation(self.dense(state))


def mean_of_patches(states: Tensor, patch_mask: Tensor | None) -> Tensor:
    """Mean of `[batch, patches, hidden]` over each image's own patches, bool `[batch, patches]`: `[batch, hidden]`."""
    if patch_mask is None:
        return states.mean(dim=1)
    kept = torch.where(patch_mask[:, :, None], states, 0.0)
    return kept.sum(dim=1) / patch_mask.sum(dim=1, keepdim=True).clamp(min=1)
