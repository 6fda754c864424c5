"""The few shapes of published task heads. A family picks one a task; parameter names are the published ones."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .activations import activation, head_activation
from .chunks import in_chunks
from .configuration import EffEncoderConfig


class LMBias(nn.Module):
    """Vocabulary projection with its bias kept beside it, the way masked-LM heads are published."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.decoder = nn.Linear(config.embedding_size or config.hidden_size, config.vocab_size)
        # Published heads tie the projection's bias to this one; without tying it would be idle.
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.tie_word_embeddings else None

    def set_decoder(self, decoder: nn.Linear) -> None:
        """Replace the vocabulary projection, after a resize."""
        self.decoder = decoder
        if self.bias is not None:
            self.bias = decoder.bias


class RobertaLMHead(LMBias):
    """dense, gelu, `layer_norm`, decoder: RoBERTa and Longformer."""

    attribute: ClassVar[str] = "lm_head"
    projection: ClassVar[str] = "lm_head"
    ties_embeddings: ClassVar[bool] = True

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__(config)
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.activate = head_activation(config.head_act, nn.functional.gelu)

    @property
    def vocabulary(self) -> LMBias:
        """The part that is tied to the embeddings."""
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, vocab_size]`."""
        return self.decoder(self.layer_norm(self.activate(self.dense(hidden_states))))


class PlainLMHead(nn.Module):
    """The vocabulary projection alone: Reformer, whose states are twice as wide as its embeddings."""

    attribute: ClassVar[str] = "lm_head"
    projection: ClassVar[str] = "lm_head"
    ties_embeddings: ClassVar[bool] = False

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.decoder = nn.Linear(config.output_size, config.vocab_size, bias=False)
        # Beside the projection, where it is published.
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.chunk_size = config.chunk_size_lm_head

    @property
    def vocabulary(self) -> "PlainLMHead":
        """The part that follows the size of the vocabulary."""
        return self

    def set_decoder(self, decoder: nn.Linear) -> None:
        """Replace the vocabulary projection, after a resize; new tokens get a bias of 0."""
        self.decoder = decoder
        new = self.bias.new_zeros(decoder.out_features)
        kept = min(len(new), len(self.bias))
        new[:kept] = self.bias.detach()[:kept]
        self.bias = nn.Parameter(new, requires_grad=self.bias.requires_grad)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, output_size]` -> `[batch, length, vocab_size]`."""
        return in_chunks(self._logits, self.chunk_size, hidden_states)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self.decoder(hidden_states) + self.bias


class BertTransform(nn.Module):
    """dense, activation, LayerNorm."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = activation(config.head_act or config.hidden_act)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, embedding_size]`."""
        return self.LayerNorm(self.activation(self.dense(hidden_states)))


class BertPredictions(LMBias):
    """BERT's masked-LM layers, under `cls.predictions`."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__(config)
        self.transform = BertTransform(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, vocab_size]`."""
        return self.decoder(self.transform(hidden_states))


class BertLMHead(nn.Module):
    """BERT's `cls`: masked-LM, and for pretraining the next-sentence classifier beside it."""

    attribute: ClassVar[str] = "cls"
    projection: ClassVar[str] = "cls.predictions"
    ties_embeddings: ClassVar[bool] = True

    def __init__(self, config: EffEncoderConfig, next_sentence: bool = False) -> None:
        super().__init__()
        self.predictions = BertPredictions(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2) if next_sentence else None

    @property
    def vocabulary(self) -> LMBias:
        """The part that is tied to the embeddings."""
        return self.predictions

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, vocab_size]`."""
        return self.predictions(hidden_states)


class PooledClassificationHead(nn.Linear):
    """BERT's `classifier`: dropout and a linear map of the pooled first token."""

    reads_pooler: ClassVar[bool] = True

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.head_dropout)

    def forward(self, pooled: Tensor) -> Tensor:
        """`[batch, hidden]` -> `[batch, num_labels]`."""
        return super().forward(self.dropout(pooled))


class DenseClassificationHead(nn.Module):
    """`classifier` of RoBERTa, Longformer, Reformer: dense, tanh and `out_proj` on the state of the first token."""

    reads_pooler: ClassVar[bool] = False

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.output_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.activate = head_activation(config.head_act, self.published_activation(config))

    @staticmethod
    def published_activation(config: EffEncoderConfig) -> Callable:
        """The activation between the two maps, where the config names no other."""
        return torch.tanh

    def forward(self, first_token: Tensor) -> Tensor:
        """`[batch, hidden]` -> `[batch, num_labels]`."""
        return self.out_proj(self.dropout(self.activate(self.dense(self.dropout(first_token)))))


class ActivatedClassificationHead(DenseClassificationHead):
    """BigBird's and Nystromformer's `classifier`: as RoBERTa's, with the config's activation in place of tanh."""

    @staticmethod
    def published_activation(config: EffEncoderConfig) -> Callable:
        """See `DenseClassificationHead.published_activation`."""
        return activation(config.hidden_act)


class ReplacedTokenHead(nn.Module):
    """ELECTRA's `discriminator_predictions`: dense, activation, one logit a token, above 0 = replaced."""

    def __init__(self, width: int, hidden_size: int, hidden_act: str) -> None:
        super().__init__()
        self.dense = nn.Linear(width, hidden_size)
        self.activation = activation(hidden_act)
        self.dense_prediction = nn.Linear(hidden_size, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, width]` -> `[batch, length]`."""
        return self.dense_prediction(self.activation(self.dense(hidden_states))).squeeze(-1)
