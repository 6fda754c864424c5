"""The models that are measured, and what they are called with."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from .cases import Case
from .kinds import KINDS


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PRIMING_LENGTH = 16
NEW_TOKENS = 16
"""New tokens of one run of generation."""

ROOM = 64 * NEW_TOKENS
"""New tokens that the position table has rows for."""

_LABELLED = 0.15
_BY_DEFAULT = {("classification", None), ("classification", "cls"), ("base", None), ("base", "none")}
_BY_DEFAULT |= {("masked_lm", None), ("masked_lm", "none")}


def build_model(case: Case) -> PreTrainedModel:
    """The case's model, with weights that depend on the seed and their names only."""
    import torch
    from transformers import AutoConfig

    import hf_efficient_attn  # noqa: F401  (registers the families)

    kind, size = KINDS[case.kind], case.size
    generates = case.mode == "generate"
    positions = max(case.length, PRIMING_LENGTH) + (ROOM if generates else 0)
    sizes = {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.intermediate_size * 2 // 3 if kind.gated else size.intermediate_size,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": positions + kind.extra_positions,
    }
    dropped = () if case.attention_dropout is None else kind.dropout_fields
    layers = {
        name: [pattern[i % len(pattern)] for i in range(size.num_layers)] for name, pattern in kind.layer_fields.items()
    }
    config = AutoConfig.for_model(
        kind.model_type,
        **{kind.size_fields.get(name, name): value for name, value in sizes.items()},
        **layers,
        **({kind.window_field: size.attention_window} if kind.windowed else {}),
        **({kind.length_field: case.length} if kind.length_field else {}),
        **{**kind.fields, **dict.fromkeys(dropped, case.attention_dropout)},
    )
    if generates:
        config.is_decoder = True
    if hasattr(config, "skip_logits"):
        config.skip_logits = case.task == "masked_lm"
    extra = {} if kind.attn_implementation is None else {"attn_implementation": kind.attn_implementation}
    model = auto_class(case).from_config(config, **extra)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(parameter, name.removeprefix(f"{model.base_model_prefix}."), case.seed, positions)
    if case.checkpointing:
        # The name until transformers 5.17, and the one since.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model.to(case.device, getattr(torch, case.dtype))


def auto_class(case: Case) -> type:
    """The Auto class of transformers that makes the case's model."""
    import transformers

    if case.mode == "generate":
        return transformers.AutoModelForCausalLM
    names = {"base": "AutoModel", "masked_lm": "AutoModelForMaskedLM"}
    return getattr(transformers, names.get(case.task, "AutoModelForSequenceClassification"))


def _draw(parameter: torch.Tensor, name: str, seed: int, positions: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name.endswith("position_embeddings.weight"):
        # Reserved rows stand before the first position.
        parameter[:-positions] = 0.0
        parameter = parameter[-positions:]
    is_norm = parameter.dim() == 1 and name.endswith("weight")
    parameter.normal_(1.0 if is_norm else 0.0, 0.02, generator=generator)


def build_inputs(case: Case) -> dict[str, torch.Tensor]:
    """What the case's model is called with, each `[batch_size, length]`."""
    import torch

    generator = torch.Generator().manual_seed(case.seed)
    # Ids from 5 on: the first ones are special tokens (padding among them) in some of the kinds.
    ids = torch.randint(5, case.size.vocab_size, (case.batch_size, case.length), generator=generator)
    inputs = {"input_ids": ids}
    # Base models have no global token unless they are given some; classifiers choose the first by themselves.
    if KINDS[case.kind].global_tokens and (case.task, case.global_tokens) not in _BY_DEFAULT:
        inputs["global_attention_mask"] = torch.zeros_like(ids)
        inputs["global_attention_mask"][:, 0] = int(case.global_tokens == "cls")
    return {name: x.to(case.device) for name, x in inputs.items()}


def build_labels(case: Case) -> torch.Tensor:
    """Labels for the case's task: `[batch_size]`, or for masked LM `[batch_size, length]`."""
    import torch

    if case.task != "masked_lm":
        return torch.zeros(case.batch_size, dtype=torch.long, device=case.device)
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch_size, case.length)
    labels = torch.randint(5, case.size.vocab_size, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) >= _LABELLED, -100).to(case.device)
