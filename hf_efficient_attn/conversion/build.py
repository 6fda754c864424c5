"""A model of ours from a loaded source."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..auto import FAMILIES
from .configs import bert_shaped_config, own_config, refuse_what_is_no_encoder
from .images import image_config, image_state
from .names import base_prefix, common_name, family_names, our_suffix
from .positions import resize_table
from .sources import Source
from .table import OWN
from .weights import Filled, fill


_TABLE = "embeddings.position_embeddings.weight"
_AXIAL = "embeddings.position_embeddings.weights.0"
_LEARNED = "embeddings.position_embeddings.embedding.weight"


@dataclass(frozen=True)
class Positions:
    """How a table of positions gets another length: `max_length` tokens (None as it is), `how`, and a `seed`."""

    max_length: int | None
    how: str
    seed: int


@dataclass(frozen=True)
class Built:
    """A new model in float32, what came of each weight, and notes for the report.

    `keeps_positions` says that each position has the row that it had in the source.
    """

    model: PreTrainedModel
    filled: Filled
    notes: list[str]
    keeps_positions: bool = True


def build_ours(source: Source, to: str, positions: Positions, options: dict[str, Any], separator: int | None) -> Built:
    """The model of family `to` that computes what the source does, as far as its mechanism allows.

    Args:
        source: the source; read only.
        to: the family.
        positions: of a text model.
        options: fields of the family's config.
        separator: id of the tokenizer's separator, where it is known.

    Raises:
        ValueError: a head without a place, an option that breaks a rule, weights that do not fit.
    """
    if source.model_type in ("vit", "deit"):
        return _build_images(source, positions, options)
    suffix = our_suffix(source.model_type, to, source.suffix)
    if OWN.get(source.model_type) == to:
        return _build_own(source, to, suffix, positions, options)
    options = {"sep_token_id": _separator(source.model.config, separator), **options}
    if to == "eff_longformer" and options["sep_token_id"] is None and suffix.endswith(("Answering", "Choice")):
        raise ValueError(
            "no separator is known, which says where the question ends: give sep_token_id=..., or a tokenizer."
        )
    config = bert_shaped_config(source.model.config, to, suffix, options)
    state = {}
    for name, value in source.model.state_dict().items():
        common = common_name(source.model_type, source.suffix, source.prefix, name)
        if common is not None:
            state[common] = value
    return _fill_text(config, to, suffix, state, positions, is_own=False)


def _build_own(source: Source, to: str, suffix: str, positions: Positions, options: dict[str, Any]) -> Built:
    """The same of a source that the family loads as its own."""
    if to not in ("eff_reformer", "eff_longformer"):
        refuse_what_is_no_encoder(source.model.config)
    state = {name.removeprefix(source.prefix): value for name, value in source.model.state_dict().items()}
    config = own_config(source.model.config, options)
    return _fill_text(config, to, suffix, state, positions, is_own=True)


def _fill_text(
    config: Any, to: str, suffix: str, state: dict[str, Tensor], positions: Positions, *, is_own: bool
) -> Built:
    notes, old = [], config.max_input_length
    rows, keeps = old if positions.max_length is None else positions.max_length, True
    if rows != old:
        keeps = positions.how != "interpolate" or rows < old
        how = positions.how if rows > old else "cut off"
        notes.append(f"positions for {old:,} -> {rows:,} tokens ({how})")
        _resize(config, state, rows, positions)
    model = getattr(FAMILIES[to].module("modeling"), f"Eff{FAMILIES[to].name}{suffix}")(config)
    prefix = base_prefix(model)
    names = list(model.state_dict())
    common = {x: x.removeprefix(prefix) for x in names} if is_own else family_names(to, suffix, prefix, names)
    return Built(model, fill(model, common, state), notes, keeps)


def _resize(config: Any, state: dict[str, Tensor], rows: int, positions: Positions) -> None:
    """`state` and `config` for texts of `rows` tokens."""
    if rows < 1:
        raise ValueError(f"max_length = {rows}: give 1 token or more.")
    how = {"how": positions.how, "std": config.initializer_range, "seed": positions.seed}
    if _AXIAL in state:
        # A grid: the first axis grows by as many places as the others make it necessary.
        rest = math.prod(config.axial_pos_shape[1:])
        places, table = max(-(-rows // rest), config.axial_pos_shape[0]), state[_AXIAL]
        how["std"] = config.axial_norm_std
        resized = resize_table(table.flatten(0, -2), places, **how)
        state[_AXIAL] = resized.view(places, *table.shape[1:])
        config.axial_pos_shape = [places, *config.axial_pos_shape[1:]]
    else:
        name = _TABLE if _TABLE in state else _LEARNED
        state[name] = resize_table(state[name], rows, reserved=config.first_position, **how)
    config.max_position_embeddings = config.first_position + rows
    config.check()


def _separator(config: Any, separator: int | None) -> int | None:
    """The tokenizer's; RoBERTa's is the end of a text."""
    if separator is None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        return config.eos_token_id
    return separator


@torch.no_grad()
def _build_images(source: Source, positions: Positions, options: dict[str, Any]) -> Built:
    if positions.max_length is not None:
        raise ValueError(
            f"max_length = {positions.max_length}: images have no length; any size can be read, and "
            "image_size=... sets the one that the table is for."
        )
    suffix = our_suffix("vit", "eff_vit", source.suffix)
    options = dict(options)
    wanted = options.pop("image_size", None)
    config = image_config(source.model.config, options)
    state = image_state(source.model.config, source.prefix, source.model.state_dict())
    model = getattr(FAMILIES["eff_vit"].module("modeling"), f"EffViT{suffix}")(config)
    prefix = base_prefix(model)
    filled = fill(model, {name: name.removeprefix(prefix) for name in model.state_dict()}, state)
    notes = []
    if source.model_type == "deit":
        notes.append("the distillation token and its position are a register now")
    if wanted is not None:
        model.resize_positions(wanted)
        notes.append(f"positions interpolated to image_size = {wanted}")
    return Built(model, filled, notes)
