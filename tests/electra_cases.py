"""Pairs of encoders for joint pretraining: every family of the package, and some of transformers' own."""

from dataclasses import fields
from typing import Any

import torch
from helpers import TINY, TINY_OPTIONS, config_class, mask_of, random_ids, randomise_
from torch import Tensor
from transformers import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig
from transformers.configuration_utils import PreTrainedConfig

from hf_efficient_attn import EffElectraForJointPreTraining, EffElectraJointConfig
from hf_efficient_attn.auto import TEXT_FAMILIES


MASK_ID = 4
LENGTHS = [29, 40, 17]

# Reformer's widths of its position tables have to add up to the generator's width: no generator can be derived.
OWN = [name for name in TEXT_FAMILIES if name != "eff_reformer"]
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 128}
THEIRS = {
    "bert": lambda: BertConfig(**TINY),
    "roberta": lambda: RobertaConfig(**TINY, pad_token_id=0),
    "electra": lambda: ElectraConfig(**TINY, embedding_size=24),
    "distilbert": lambda: DistilBertConfig(**DISTIL, dropout=0.0, attention_dropout=0.0),
}
BACKBONES = [*OWN, *THEIRS]
# The others have no embeddings that are projected, which a narrower generator could share.
PROJECTING = [*OWN, "electra"]


def encoder_config(backbone: str, **overrides: Any) -> PreTrainedConfig:
    """A tiny encoder with 64 tokens, of which 0 is padding and 4 the mask."""
    if backbone in THEIRS:
        return THEIRS[backbone]()
    cls = config_class(backbone)
    known = {field.name for field in fields(cls)}
    options = {name: value for name, value in TINY_OPTIONS.items() if name in known}
    # Positions from 0 and padding by the mask, so that one batch does for all.
    fixed = {"pad_token_id": 0, "embedding_size": 24}
    return cls(**{**TINY, **options, **fixed, **overrides})


def joint_config(backbone: str = "eff_electra", generator_size: float = 0.5, **options: Any) -> EffElectraJointConfig:
    if backbone not in PROJECTING:
        options = {"sharing": "none", **options}
    return EffElectraJointConfig.from_discriminator(encoder_config(backbone), generator_size, **options)


def joint_model(backbone: str = "eff_electra", generator_size: float = 0.5, **options: Any) -> Any:
    """A joint model with random weights, in eval mode."""
    return randomise_(EffElectraForJointPreTraining(joint_config(backbone, generator_size, **options)))


def masked_batch(lengths: list[int] = LENGTHS, side: str = "right", seed: int = 0) -> dict[str, Tensor]:
    """Texts of different length with about 15 % of their tokens masked, one at least."""
    keep = mask_of(lengths, max(lengths), side).bool()
    tokens = [random_ids(1, length, seed=seed + length)[0] for length in lengths]
    chosen = []
    for length in lengths:
        generator = torch.Generator().manual_seed(seed + 100 + length)
        places = torch.randperm(length, generator=generator)[: max(1, round(0.15 * length))]
        chosen.append(torch.zeros(length, dtype=torch.bool).index_fill(0, places, True))
    ids = torch.zeros(keep.shape, dtype=torch.long).masked_scatter(keep, torch.cat(tokens))
    masked = torch.zeros_like(keep).masked_scatter(keep, torch.cat(chosen))
    return {
        "input_ids": ids.masked_fill(masked, MASK_ID),
        "attention_mask": keep.long(),
        "labels": ids.masked_fill(~masked, -100),
    }


def originals(batch: dict[str, Tensor]) -> Tensor:
    """The tokens before masking."""
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
