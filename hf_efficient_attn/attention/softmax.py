"""Full softmax attention, the mechanism that the others approximate."""

from torch import Tensor

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
        return self.attend_fully(query, key, value, key_padding_mask, dropout_p, backend)
