"""Tiny in-tree models, and every mechanism with options small enough to matter there; what `test_inside*.py` share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from helpers import random_ids, random_images, randomise_
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient_attn.integrations.mechanisms import MECHANISMS
from hf_efficient_attn.integrations.names import MECHANISM_NAMES, PREFIX


LENGTH = 45

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PIXELS = {"image_size": 24, "patch_size": 4, "num_channels": 3}
LLAMA = SIZES | TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Inside:
    """One in-tree model.

    Args:
        name: prefix of its classes in transformers.
        fields: of its config.
        head: suffix of its class.
        dropout: the config's field for dropout of attention probabilities.
        output: what of its outputs has a row a token.
        is_image: takes pixels.
        is_causal: is a decoder.
    """

    name: str
    fields: dict[str, Any]
    head: str = "Model"
    dropout: str = "attention_probs_dropout_prob"
    output: str = "last_hidden_state"
    is_image: bool = False
    is_causal: bool = False

    def config(self, **overrides: Any) -> Any:
        """Its config."""
        return getattr(transformers, f"{self.name}Config")(**{**self.fields, **overrides})

    def build(self, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """The model in eval mode; no two of its parameters are alike."""
        model = getattr(transformers, f"{self.name}{self.head}")(self.config(**overrides))
        return randomise_(model, seed=seed)

    def inputs(self, batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
        """Inputs without padding."""
        if self.is_image:
            return {"pixel_values": random_images(batch, 24, 24)}
        ids = random_ids(batch, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def run(self, model: Callable[..., Any], **inputs: Tensor) -> Tensor:
        """The output with a row a token."""
        return model(**inputs)[self.output]


BERT = SIZES | TEXT | NO_DROPOUT

MODELS = {
    case.name: case
    for case in (
        Inside("Bert", BERT),
        Inside("Roberta", BERT | {"pad_token_id": 1, "max_position_embeddings": 140}),
        Inside("Electra", BERT | {"embedding_size": 16}),
        Inside(
            "DistilBert",
            TEXT | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
            dropout="attention_dropout",
        ),
        Inside(
            "ModernBert",
            SIZES
            | TEXT
            | {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
            | {"local_attention": 8, "global_attn_every_n_layers": 2},
            dropout="attention_dropout",
        ),
        Inside("ViT", SIZES | PIXELS | NO_DROPOUT, is_image=True),
        Inside("Dinov2", SIZES | PIXELS | NO_DROPOUT | {"mlp_ratio": 2}, is_image=True),
        Inside("SiglipVision", SIZES | PIXELS, is_image=True, dropout="attention_dropout"),
        Inside("Llama", LLAMA, head="ForCausalLM", dropout="attention_dropout", output="logits", is_causal=True),
        Inside(
            "Mistral",
            LLAMA | {"sliding_window": None, "head_dim": 8},
            head="ForCausalLM",
            dropout="attention_dropout",
            output="logits",
            is_causal=True,
        ),
    )
}

# Options with which inputs of some tens of tokens do not fit into one window.
SMALL: dict[str, dict[str, Any]] = {
    "block_sparse": {"block_size": 4, "num_random_blocks": 1},
    "lsh": {"lsh_attn_chunk_length": 4, "num_hashes": 2},
    "neighborhood": {"radius": 1},
    "nystrom": {"num_landmarks": 6},
    "performer": {"num_features": 40},
    "sliding_window": {"attention_window": 8, "num_global_tokens": 1},
}

# Options with which these inputs are what softmax attention makes of them; Performer only comes near it.
WHOLE: dict[str, dict[str, Any]] = {
    "block_sparse": {"block_size": 64},
    "lsh": {"lsh_attn_chunk_length": 64},
    "neighborhood": {"radius": 30},
    "nystrom": {"num_landmarks": 64},
    "sliding_window": {"attention_window": 128},
}

PAIRS = [
    (model, name)
    for model, case in MODELS.items()
    for name in MECHANISM_NAMES
    if not (case.is_causal and MECHANISMS[name].why_not_causal) and not (name == "neighborhood" and not case.is_image)
]


def implementation(name: str) -> str:
    """The `attn_implementation` of a mechanism."""
    return PREFIX + name
