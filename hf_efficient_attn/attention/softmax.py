"""Full softmax attention, the mechanism that the others approximate."""

from torch import Tensor

from ..functional import dense_attention, softmax_attention
from .base import SelfAttention


class SoftmaxSelfAttention(SelfAttention):
    """Every token attends every token (Vaswani et al. 2017, arXiv 1706.03762), as in BERT. It has no options."""

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
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`."""
        if backend == "sdpa":
            return self.merge(softmax_attention(query, key, value, key_padding_mask, dropout_p=dropout_p)), None
        allowed = None
        if key_padding_mask is not None:
            allowed = key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None]
        mixed, weights = dense_attention(query, key, value, allowed, dropout_p=dropout_p)
        return self.merge(mixed), weights
