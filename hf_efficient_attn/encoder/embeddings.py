"""Word, position and token-type embeddings."""

import torch
from torch import Tensor, nn

from .chunks import in_chunks, inference_chunk
from .configuration import EffEncoderConfig


def positions_from_mask(
    key_padding_mask: Tensor | None, length: int, first_position: int, device: torch.device, past_length: int = 0
) -> Tensor:
    """Running count of attended tokens from `first_position`: `[batch, length]`, `[1, length]` without a mask.

    The mask covers the `past_length` tokens before the input as well.
    """
    if key_padding_mask is None:
        return torch.arange(past_length, past_length + length, device=device)[None, :] + first_position
    return (key_padding_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past_length:] + first_position


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, layer norm, dropout. Parameter names of BERT."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size > 0 else None
        self.scale = width**0.5 if config.rescale_embeddings else 1.0
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))
        self.chunk_above = config.chunk_above

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """`inputs_embeds` `[batch, length, width]`, ids `[batch or 1, length]` -> `[batch, length, width]`."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids[:1])
        chunk = inference_chunk(inputs_embeds, self, above=self.chunk_above)
        return in_chunks(self._sum, chunk, inputs_embeds, position_ids, token_type_ids)

    def _sum(self, inputs_embeds: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        if self.scale != 1.0:
            inputs_embeds = inputs_embeds * self.scale
        # A device map may have a table elsewhere.
        device = inputs_embeds.device
        embedded = inputs_embeds + self.position_embeddings(position_ids).to(device)
        if self.token_type_embeddings is not None:
            embedded = embedded + self.token_type_embeddings(token_type_ids).to(device)
        return self.dropout(self.LayerNorm(embedded))
