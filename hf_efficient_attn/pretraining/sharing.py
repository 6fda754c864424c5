"""Which weights a generator and a discriminator share, as names for transformers to tie."""

import re

from torch import nn

from .parts import BackboneDetector


def tied_names(generator: nn.Module, discriminator: nn.Module, sharing: str) -> dict[str, str]:
    """The generator's name of a weight -> the discriminator's, of all that `sharing` ties.

    Raises:
        ValueError: weights that do not fit each other, with their names and sizes.
    """
    if sharing == "none":
        return {}
    pick = _embedding_tables if sharing == "embeddings" else _all_weights
    ours, theirs = pick(generator.base_model), pick(discriminator.base_model)
    what = "embeddings" if sharing == "embeddings" else "encoder weights"
    for name in sorted(ours.keys() ^ theirs.keys()):
        side = "generator" if name in ours else "discriminator"
        raise ValueError(
            f"sharing = {sharing!r}, but only the {side} has the {what} {name!r}; give both encoders of one family, or "
            "set sharing = 'none'."
        )
    for name, weight in theirs.items():
        if ours[name].shape != weight.shape:
            fix = "give both the same size"
            if sharing == "embeddings":
                fix = "give both one embedding_size (EffElectra and the families of this package project it)"
            raise ValueError(
                f"sharing = {sharing!r}, but {name!r} is {list(ours[name].shape)} in the generator and "
                f"{list(weight.shape)} in the discriminator; {fix}, or set sharing = 'none'."
            )
    front = {"generator": _prefix(generator), "discriminator": _prefix(discriminator)}
    return {f"generator.{front['generator']}{name}": f"discriminator.{front['discriminator']}{name}" for name in theirs}


def units_that_share_nothing(plan: dict[str, str], tied: dict[str, str]) -> dict[str, str]:
    """The entries of an FSDP plan whose modules hold none of the `tied` weights (name -> name).

    FSDP2 gathers a weight with one unit only; what is used in two places belongs to the whole model's.
    """
    shared = [re.sub(r"\.\d+(?=\.)", ".*", name) for pair in tied.items() for name in pair]
    return {name: style for name, style in plan.items() if not any(x.startswith(f"{name}.") for x in shared)}


def _prefix(model: nn.Module) -> str:
    """Where the encoder stands in a model."""
    return "backbone." if isinstance(model, BackboneDetector) else f"{model.base_model_prefix}."


def _embedding_tables(base: nn.Module) -> dict[str, nn.Parameter]:
    """Token, position and type embeddings: what `embeddings` holds besides norms and projections."""
    skipped = nn.LayerNorm | nn.Linear
    tables = {}
    for name, module in base.embeddings.named_modules(prefix="embeddings"):
        if not isinstance(module, skipped):
            tables |= {f"{name}.{key}": x for key, x in module.named_parameters(recurse=False)}
    return tables


def _all_weights(base: nn.Module) -> dict[str, nn.Parameter]:
    return dict(base.named_parameters(remove_duplicate=False))
