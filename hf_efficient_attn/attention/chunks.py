"""What LSH and local attention share: chunks of tokens that attend neighbouring chunks."""

from typing import Any

from torch import Tensor

from ..functional import chunk_attention, dense_chunk_attention
from .base import SelfAttention


CHUNK_RULES = ("released", "paper")


def check_chunks(kind: str, length: int, before: int, after: int, rule: str, causal: bool) -> None:
    """Raises `ValueError` for options `kind_...` of chunks that break a rule."""
    if length < 1:
        raise ValueError(f"{kind}_attn_chunk_length = {length}: a chunk has 1 token or more.")
    for name, value in (("before", before), ("after", after)):
        if value < 0:
            raise ValueError(f"{kind}_num_chunks_{name} = {value}: it must be 0 or more.")
    if causal and after > 0:
        raise ValueError(
            f"{kind}_num_chunks_after = {after} with is_decoder = True: a causal model's tokens attend none of what "
            "follows; set it to 0."
        )
    if rule not in CHUNK_RULES:
        raise ValueError(f"chunk_rule = {rule!r}: choose one of {', '.join(CHUNK_RULES)}.")


class ChunkSelfAttention(SelfAttention):
    """Attention to neighbouring chunks. A subclass says which ones, as `chunks`, the options of `chunk_attention`."""

    has_causal_form = True
    chunks: dict[str, Any]

    def attend_chunks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        buckets: Tensor | None,
        *,
        dropout_p: float,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Result and weights as `SelfAttention.attend` returns them."""
        options = {"dropout_p": dropout_p, "buckets": buckets, "causal": self.is_causal, **self.chunks}
        if backend == "eager":
            mixed, weights = dense_chunk_attention(query, key, value, key_padding_mask, **options)
            return self.merge(mixed), weights
        return self.merge(chunk_attention(query, key, value, key_padding_mask, **options)), None
