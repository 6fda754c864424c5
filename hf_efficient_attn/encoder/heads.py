"""The few shapes of published task heads. A family picks one a task; parameter names are the published ones."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .activations import make_activation
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

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__(config)
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    @property
    def vocabulary(self) -> LMBias:
        """The part that is tied to the embeddings."""
        return self

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[batch, length, hidden]` -> `[batch, length, vocab_size]`."""
        return self.decoder(self.layer_norm(nn.functional.gelu(self.dense(hidden_states))))


class BertTransform(nn.Module):
    """dense, activation, LayerNorm."""

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        width = config.embedding_size or config.hidden_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.activation = make_activation(config.hidden_act)
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
    """RoBERTa's and Longformer's `classifier`: dense, tanh and `out_proj` on the state of the first token."""

    reads_pooler: ClassVar[bool] = False

    def __init__(self, config: EffEncoderConfig) -> None:
        super().__init__()
        self.activation = self.choose_activation(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, first_token: Tensor) -> Tensor:
        """`[batch, hidden]` -> `[batch, num_labels]`."""
        return self.out_proj(self.dropout(self.activation(self.dense(self.dropout(first_token)))))

    @staticmethod
    def choose_activation(config: EffEncoderConfig) -> nn.Module:
        """What stands between the two linear maps."""
        return nn.Tanh()


class ActivatedClassificationHead(DenseClassificationHead):
    """BigBird's `classifier`: the same with the activation of the feed-forward layers."""

    @staticmethod
    def choose_activation(config: EffEncoderConfig) -> nn.Module:
        """`config.hidden_act`."""
        return make_activation(config.hidden_act)
