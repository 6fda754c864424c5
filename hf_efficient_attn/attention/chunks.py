"""What LSH and local attention share: chunks of tokens that attend neighbouring chunks."""

from typing import Any, ClassVar

from torch import Tensor

from ..functional import chunk_attention, dense_chunk_attention
from .base import SelfAttention


CHUNK_RULES = ("released", "paper")


def chunk_options(options: Any, kind: str) -> dict[str, Any]:
    """The fields `kind_...` of `options`, as `chunk_attention` takes them."""
    return {
        "chunk_length": getattr(options, f"{kind}_attn_chunk_length"),
        "chunks_before": getattr(options, f"{kind}_num_chunks_before"),
        "chunks_after": getattr(options, f"{kind}_num_chunks_after"),
        "released": options.chunk_rule == "released",
    }


def check_chunks(options: Any, kind: str, causal: bool) -> None:
    """Raises `ValueError` for fields `kind_...` of `options` that break a rule; `causal` ones have no chunks behind."""
    chunks = chunk_options(options, kind)
    length, after = chunks["chunk_length"], chunks["chunks_after"]
    if length < 1:
        raise ValueError(f"{kind}_attn_chunk_length = {length}: a chunk has 1 token or more.")
    for name in ("chunks_before", "chunks_after"):
        if chunks[name] < 0:
            raise ValueError(f"{kind}_num_{name} = {chunks[name]}: it must be 0 or more.")
    if causal and after > 0:
        raise ValueError(
            f"{kind}_num_chunks_after = {after} with is_decoder = True: a causal model's tokens attend none of what "
            "follows; set it to 0."
        )
    if options.chunk_rule not in CHUNK_RULES:
        raise ValueError(f"chunk_rule = {options.chunk_rule!r}: choose one of {', '.join(CHUNK_RULES)}.")


class ChunkSelfAttention(SelfAttention):
    """Attention to neighbouring chunks. A subclass names its `kind`, with which the names of its options begin."""

    has_causal_form = True
    kind: ClassVar[str]
    exclude_self: ClassVar[bool] = False
    """Whether a token attends itself only where it may attend nothing else."""

    def __init__(self, config: Any, layer_idx: int, options: Any = None) -> None:
        super().__init__(config, layer_idx, options)
        self.check(self.options, config)
        dropout_p = getattr(self.options, f"{self.kind}_attention_probs_dropout_prob", None)
        self.dropout_p = self.dropout_p if dropout_p is None else float(dropout_p)
        self.chunks = {**chunk_options(self.options, self.kind), "exclude_self": self.exclude_self}

    @classmethod
    def check(cls, options: Any, config: Any) -> None:
        """See `SelfAttention.check`."""
        getattr(options, f"check_{cls.kind}_options")(bool(getattr(config, "is_decoder", False)))

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
