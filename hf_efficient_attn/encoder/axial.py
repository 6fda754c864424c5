"""Word embeddings with axial positions: a long table as sums of short ones. Parameter names of Reformer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chunks import in_chunks, inference_chunk
from .configuration import EffEncoderConfig
from .layer import dropped


class AxialPositionEmbeddings(nn.Module):
    """A position is a place on a grid; its embedding joins that of its row and that of its column.

    With dropout, whole rows of one axis are dropped, the same for all positions that share them: the last one.

    Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451.
    """

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.shape = tuple(config.axial_pos_shape)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.ones(*(size if place == axis else 1 for place, size in enumerate(self.shape)), width))
            for axis, width in enumerate(config.axial_pos_embds_dim)
        )
        self.dropout_p = float(config.hidden_dropout_prob)

    def forward(self, position_ids: Tensor, batch: int) -> Tensor:
        """`[batch or 1, length]` -> `[batch or 1, length, hidden]`; positions below the product of the shape."""
        parts, step = [], math.prod(self.shape)
        for size, weight in zip(self.shape, self.weights, strict=True):
            step //= size
            place = position_ids // step % size
            parts.append(F.embedding(place, weight.flatten(0, -2)))
        embedded = torch.cat(parts, dim=-1)
        if not self.training or self.dropout_p == 0.0:
            return embedded
        # `place` is that of the last axis.
        kept = F.dropout(embedded.new_ones(batch, self.shape[-1]), self.dropout_p)
        return embedded * kept.gather(1, place.expand(batch, -1))[..., None]


class LearnedPositionEmbeddings(nn.Module):
    """A table of positions."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout_p = float(config.hidden_dropout_prob)

    def forward(self, position_ids: Tensor, batch: int) -> Tensor:
        """`[batch or 1, length]` -> `[batch or 1, length, hidden]`."""
        embedded = self.embedding(position_ids)
        if not self.training or self.dropout_p == 0.0:
            return embedded
        return F.dropout(embedded.expand(batch, -1, -1), self.dropout_p)


class AxialEmbeddings(nn.Module):
    """Word embeddings, dropped on their own, plus positions: no norm and no token types."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = AxialPositionEmbeddings if config.axial_pos_embds else LearnedPositionEmbeddings
        self.position_embeddings = positions(config)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))
        self.chunk_above = config.chunk_above

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """`inputs_embeds` `[batch, length, hidden]`, `position_ids` `[batch or 1, length]` -> like `inputs_embeds`."""
        chunk = inference_chunk(inputs_embeds, self, above=self.chunk_above)
        return in_chunks(self._sum, chunk, inputs_embeds, position_ids)

    def _sum(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        return dropped(self.dropout, inputs_embeds) + self.position_embeddings(position_ids, inputs_embeds.shape[0])
