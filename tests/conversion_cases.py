"""Tiny sources for conversions: every model type that is converted, with all its heads."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import TINY, mask_of, random_ids, randomise_
from torch import Tensor
from transformers import PreTrainedModel


HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
IMAGE_HEADS = ("Model", "ForImageClassification", "ForMaskedImageModeling")
SEPARATOR = 4

_DISTILBERT = {
    "vocab_size": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 70,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
}
_REFORMER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "attention_head_size": 8,
    "num_attention_heads": 4,
    "feed_forward_size": 48,
    "axial_pos_shape": [8, 16],
    "axial_pos_embds_dim": [8, 24],
    "max_position_embeddings": 128,
    "lsh_attn_chunk_length": 16,
    "local_attn_chunk_length": 8,
    "attn_layers": ["local", "local"],
}
_TEXT = {**TINY, "max_position_embeddings": 70}


@dataclass(frozen=True)
class Case:
    """A source: what its class names begin with, fields of its config, its heads."""

    name: str
    config: dict[str, Any] = field(default_factory=lambda: _TEXT)
    heads: tuple[str, ...] = HEADS

    def model(self, head: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
        """A model with random weights."""
        cls = getattr(transformers, self.name + head)
        options = {} if "Question" in head else {"num_labels": 3}
        options |= {"is_decoder": True} if head == "ModelWithLMHead" else {}
        model = randomise_(cls(cls.config_class(**{**self.config, **options, **fields})), seed=seed)
        if self.name == "Reformer" and hasattr(model, "lm_head"):
            # transformers does not add it any more.
            torch.nn.init.zeros_(model.lm_head.bias)
        return model


CASES = {
    "bert": Case("Bert", {**_TEXT, "hidden_act": "relu"}, (*HEADS, "ForPreTraining")),
    "roberta": Case("Roberta", {**_TEXT, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    # Their names are RoBERTa's: some heads will do.
    "xlm-roberta": Case("XLMRoberta", {**_TEXT, "pad_token_id": 1}, HEADS[:3]),
    "camembert": Case("Camembert", {**_TEXT, "pad_token_id": 2}, HEADS[1:2] + HEADS[3:5]),
    "electra": Case("Electra", {**_TEXT, "embedding_size": 24, "hidden_act": "gelu_new"}, (*HEADS, "ForPreTraining")),
    "distilbert": Case("DistilBert", _DISTILBERT),
    "longformer": Case("Longformer", {**_TEXT, "attention_window": [8, 4], "pad_token_id": 1}),
    "big_bird": Case(
        "BigBird",
        {**_TEXT, "block_size": 8, "num_random_blocks": 2, "sep_token_id": SEPARATOR},
        (*HEADS, "ForPreTraining"),
    ),
    "nystromformer": Case(
        "Nystromformer", {**_TEXT, "num_landmarks": 8, "segment_means_seq_len": 48, "conv_kernel_size": 5}
    ),
    "reformer": Case(
        "Reformer",
        _REFORMER,
        ("Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering", "ModelWithLMHead"),
    ),
    "vit": Case("ViT", _IMAGES, IMAGE_HEADS),
    "deit": Case("DeiT", _IMAGES, IMAGE_HEADS),
}

# A family's options with which texts of `EXACT` tokens are converted exactly, and none of 60 and more.
EXACT = 20
OPTIONS: dict[str, dict[str, Any]] = {
    "eff_big_bird": {"block_size": 4, "num_random_blocks": 1},
    "eff_electra": {},
    "eff_longformer": {"attention_window": [38, 40]},
    "eff_nystromformer": {"num_landmarks": 20, "conv_kernel_size": 5},
    "eff_performer": {"num_features": 64},
    "eff_reformer": {},
    "eff_vit": {},
}


def padded_batch(model: PreTrainedModel, head: str, lengths: list[int]) -> dict[str, Tensor]:
    """Texts padded on the right with the model's pad id, no other token being one; two choices where wanted."""
    mask = mask_of(lengths, max(lengths))
    pad = model.config.pad_token_id
    inputs = {"input_ids": random_ids(len(lengths), max(lengths)).masked_fill(mask == 0, pad), "attention_mask": mask}
    if head == "ForMultipleChoice":
        inputs = {name: torch.stack([x, x.roll(1, 0)], dim=1) for name, x in inputs.items()}
    return inputs


def shard(folder: Path) -> list[str]:
    """The weight files of a folder."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))
