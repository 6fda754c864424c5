"""Local attention of Reformer: chunks of the text that attend themselves and their neighbours."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import dense_attention
from .chunks import ChunkSelfAttention, check_chunks


if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .cache import WindowCacheLayer


@dataclass(kw_only=True)
class LocalOptions:
    """Options of local attention, with the names and defaults of published configs.

    Args:
        local_attn_chunk_length: tokens of a chunk.
        local_num_chunks_before, local_num_chunks_after: neighbouring chunks that a chunk attends besides itself.
        chunk_rule: `"released"`: the last chunk is also the one before the first, as in the released code, which a
            causal model does not notice; `"paper"`: nothing is before the first chunk.
    """

    local_attn_chunk_length: int = 64
    local_num_chunks_before: int = 1
    local_num_chunks_after: int = 0
    chunk_rule: str = "released"

    def check_local_options(self, causal: bool) -> None:
        """Raises `ValueError` for a value that breaks a rule; `causal` ones have no chunks behind."""
        check_chunks(self, "local", causal)


class LocalSelfAttention(ChunkSelfAttention):
    """Chunks of each example's own tokens, counted from its first (Kitaev et al. 2020, arXiv 2001.04451).

    A chunk attends itself and neighbouring ones; in the causal form no token attends a later one.
    """

    options_class = LocalOptions
    kind = "local"

    def make_cache_layer(self) -> "WindowCacheLayer":
        """An empty cache: as far back as a chunk's last token attends."""
        from .cache import WindowCacheLayer  # loads transformers' caches: not for a config or an encoder

        return WindowCacheLayer(max(1, (self.chunks["chunks_before"] + 1) * self.chunks["chunk_length"] - 1))

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        *,
        dropout_p: float,
        backend: str,
        past_key_values: "Cache | None" = None,
        **context: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`."""
        if past_key_values is not None:
            past_length = past_key_values.get_seq_length(self.layer_idx)
            key, value = past_key_values.update(key, value, self.layer_idx)
            if past_length > 0:
                seen = past_length + query.shape[2]
                mixed, weights = self._step(query, key, value, key_padding_mask, seen, dropout_p)
                return mixed, weights if backend == "eager" else None
        return self.attend_chunks(query, key, value, key_padding_mask, None, dropout_p=dropout_p, backend=backend)

    def _step(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, seen: int, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        """The last tokens of `seen`, of which the cache has kept some: chunks count from the first of all."""
        queries, kept = query.shape[2], key.shape[2]
        if key_padding_mask is None:
            rank = torch.arange(seen - kept, seen, device=key.device)[None]
            valid = torch.ones_like(rank, dtype=torch.bool)
        else:
            rank, valid = (x[:, -kept:] for x in (key_padding_mask.long().cumsum(dim=1) - 1, key_padding_mask))
        own, length = rank[:, -queries:, None], self.chunks["chunk_length"]
        distance = own // length - rank[:, None, :] // length
        allowed = (rank[:, None, :] <= own) & (distance <= self.chunks["chunks_before"])
        allowed = allowed & valid[:, None, :] & valid[:, -queries:, None]
        mixed, weights = dense_attention(query, key, value, allowed[:, None], dropout_p=dropout_p)
        return self.merge(mixed), weights
