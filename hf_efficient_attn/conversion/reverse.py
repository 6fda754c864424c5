"""The way back: a model of ours in transformers' own class, where that class can hold it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..models.eff_vit.modeling_eff_vit import published_name
from .names import base_prefix
from .sources import Source


# (field, whether the original can hold a config's value, what it has instead)
Rule = tuple[str, Callable[[Any], bool], str]


def _is(field: str, value: Any) -> Callable[[Any], bool]:
    return lambda config: getattr(config, field) == value


def _no_head_dropout(config: Any) -> bool:
    return config.classifier_dropout in (None, config.hidden_dropout_prob)


_TEXT: tuple[Rule, ...] = (
    ("norm_position", _is("norm_position", "post"), "its norms come after each part"),
    ("head_act", _is("head_act", None), "its heads have the published activation"),
)
_NOT_CAUSAL: Rule = ("is_decoder", _is("is_decoder", False), "it has no causal form of this attention")
_NO_RESCALE: Rule = ("rescale_embeddings", _is("rescale_embeddings", False), "it does not scale embeddings")
_ONE_WIDTH: Rule = (
    "embedding_size",
    lambda config: config.embedding_size in (None, config.hidden_size),
    "its embeddings are as wide as its states",
)
_HEAD_DROPOUT: Rule = ("classifier_dropout", _no_head_dropout, "its heads drop as hidden_dropout_prob says")
_SOFTMAX: Rule = ("attention", _is("attention", "softmax"), "it has softmax attention")


def _undilated(config: Any) -> bool:
    steps = [config.dilation_of(layer) for layer in range(config.num_hidden_layers)]
    return all(step in (1, [1] * config.num_attention_heads) for step in steps)


def _always_softmax(config: Any) -> bool:
    return config.num_landmarks >= config.max_input_length


# Model type of transformers -> what its config has to say of ours.
RULES: dict[str, tuple[Rule, ...]] = {
    "longformer": (
        *_TEXT,
        _NOT_CAUSAL,
        _NO_RESCALE,
        _ONE_WIDTH,
        _HEAD_DROPOUT,
        ("attention_dilation", _undilated, "its windows have no gaps"),
        ("causal_global", _is("causal_global", None), "it has no causal window"),
        ("global_attention", _is("global_attention", None), "its global tokens are those of the task"),
        ("pad_token_id", lambda config: config.pad_token_id is not None, "it counts positions from behind this id"),
    ),
    "big_bird": (
        *_TEXT,
        _NOT_CAUSAL,
        _ONE_WIDTH,
        ("num_global_tokens", _is("num_global_tokens", 0), "it has no added global tokens"),
        ("global_ends", _is("global_ends", True), "its first and last block are global"),
        ("plain_span_head", _is("plain_span_head", False), "its head for answers is the published one"),
        (
            "num_random_blocks",
            lambda config: config.num_random_blocks > 0 or config.attention_type == "original_full",
            "it fails without random blocks",
        ),
    ),
    "nystromformer": (
        *_TEXT,
        _NOT_CAUSAL,
        _NO_RESCALE,
        _ONE_WIDTH,
        _HEAD_DROPOUT,
        (
            "pinv_iterations",
            lambda config: config.pinv_iterations == 6 or _always_softmax(config),
            "it takes 6 steps towards the inverse",
        ),
        (
            "inv_coeff_init_option",
            lambda config: not config.inv_coeff_init_option or _always_softmax(config),
            "it scales by the largest sum of all heads (and fails with True)",
        ),
    ),
    "reformer": (
        *_TEXT,
        ("chunk_rule", _is("chunk_rule", "released"), "it follows the released code"),
        ("position_offset", lambda config: config.first_position == 0, "its positions begin at 0"),
    ),
    "electra": (*_TEXT, _NOT_CAUSAL, _NO_RESCALE, _SOFTMAX),
    "vit": (
        _SOFTMAX,
        ("num_register_tokens", _is("num_register_tokens", 0), "it has no registers"),
        ("use_cls_token", _is("use_cls_token", True), "it has a class token"),
        ("pooling", _is("pooling", "cls"), "its class token stands for an image"),
    ),
}

# Suffixes of our classes -> those of transformers', where they differ.
_CLASS_NAMES = {
    "eff_reformer": {"ForCausalLM": "ModelWithLMHead"},
}
_PREFIXES = {
    "longformer": "Longformer",
    "big_bird": "BigBird",
    "nystromformer": "Nystromformer",
    "reformer": "Reformer",
    "electra": "Electra",
    "vit": "ViT",
}


@dataclass(frozen=True)
class Original:
    """A new model of transformers, how many weights it has of ours, and which are new -> how they start."""

    model: PreTrainedModel
    copied: int
    new: dict[str, str]


def check_rules(config: Any, to: str) -> None:
    """Raises `ValueError` for the first field of `config` that transformers' class cannot hold, by its name."""
    for field, holds, has in RULES[to]:
        if not holds(config):
            raise ValueError(
                f"{field} = {getattr(config, field)!r}: transformers' {_PREFIXES[to]} cannot hold it, {has}; nothing "
                "was converted."
            )


def build_original(source: Source, to: str, segment_means_seq_len: int | None = None) -> Original:
    """transformers' model `to` with copies of the weights of ours.

    Raises:
        ValueError: a field or a head that its class cannot hold; weights that do not fit.
    """
    config = source.model.config
    check_rules(config, to)
    cls = _class_of(source, to)
    fields = _fields(config, to, segment_means_seq_len)
    state, new = _state(source, to, cls.config_class(**fields))
    model = cls(cls.config_class(**fields))
    return Original(model, *_load(model, state, new))


def _class_of(source: Source, to: str) -> type[PreTrainedModel]:
    suffix = source.suffix
    name = _PREFIXES[to] + _CLASS_NAMES.get(source.model_type, {}).get(suffix, suffix)
    cls = getattr(transformers, name, None)
    if suffix == "Backbone" or cls is None:
        raise ValueError(
            f"{source.class_name}: transformers' {_PREFIXES[to]} has no class for this head; convert the base model "
            f"({source.class_name.removesuffix(suffix)}Model)."
        )
    return cls


def _fields(config: Any, to: str, segment_means_seq_len: int | None) -> dict[str, Any]:
    """The fields of transformers' config."""
    known = set(CONFIG_MAPPING[to]().to_dict())
    values = {name: value for name, value in config.to_dict().items() if name in known}
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path", "num_labels"):
        values.pop(name, None)
    if to in ("electra", "big_bird", "nystromformer", "longformer"):
        values["type_vocab_size"] = max(config.type_vocab_size, 2 if to == "big_bird" else 1)
        rows = config.max_input_length
        values["max_position_embeddings"] = rows + config.pad_token_id + 1 if to == "longformer" else rows
    if to == "electra":
        values["embedding_size"] = config.embedding_size or config.hidden_size
    if to == "nystromformer":
        values |= {"conv_kernel_size": config.conv_kernel_size or 1, "inv_coeff_init_option": False}
        length = segment_means_seq_len or config.max_input_length
        if _always_softmax(config):
            length = config.num_landmarks  # there it is softmax attention at every length
        if length % config.num_landmarks != 0:
            raise ValueError(
                f"segment_means_seq_len = {length} is no multiple of num_landmarks = {config.num_landmarks}, which "
                "transformers' Nystromformer needs; give one that is, the one length it will read."
            )
        values["segment_means_seq_len"] = length
    elif segment_means_seq_len is not None:
        raise ValueError(f"segment_means_seq_len = {segment_means_seq_len}: only Nystromformer has it; leave it out.")
    if to == "reformer":
        kinds = [config.layer_kind(layer) for layer in range(config.num_hidden_layers)]
        values |= {"attn_layers": kinds, "feed_forward_size": config.intermediate_size}
        values["attention_head_size"] = config.attention_head_size or config.hidden_size // config.num_attention_heads
        for kind in ("lsh", "local"):
            name = f"{kind}_attention_probs_dropout_prob"
            values[name] = config.attention_probs_dropout_prob if values[name] is None else values[name]
    return values


@torch.no_grad()
def _state(source: Source, to: str, config: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Our weights in the shapes of transformers' class, by name without a prefix, and what is new in them."""
    ours, new = source.model.config, {}
    state = {name.removeprefix(source.prefix): value for name, value in source.model.state_dict().items()}
    if to == "vit" or to == "reformer":
        return state, new
    width = config.embedding_size if to == "electra" else config.hidden_size
    table = state["embeddings.position_embeddings.weight"]
    reserved = {"longformer": (config.pad_token_id or 0) + 1, "nystromformer": 2}.get(to, 0)
    if reserved != ours.first_position:
        # Rows in front that no position uses.
        front = table.new_zeros(reserved, width)
        table = torch.cat([front, table[ours.first_position :]])
        new["embeddings.position_embeddings.weight"] = f"shifted from row {ours.first_position} to row {reserved}"
    state["embeddings.position_embeddings.weight"] = table
    name = "embeddings.token_type_embeddings.weight"
    types = state.get(name, table.new_zeros(0, width))
    if len(types) < config.type_vocab_size:
        one = types if len(types) == 1 else table.new_zeros(1, width)
        state[name] = one.expand(config.type_vocab_size, -1)
        new[name] = "one token type, as often as its class needs it"
    if to == "nystromformer" and ours.conv_kernel_size is None:
        for layer in range(config.num_hidden_layers):
            name = f"encoder.layer.{layer}.attention.self.conv.weight"
            state[name] = table.new_zeros(config.num_attention_heads, 1, 1, 1)
            new[name] = "zeros, so that nothing is added"
    return state, new


@torch.no_grad()
def _load(model: PreTrainedModel, state: dict[str, Tensor], new: dict[str, str]) -> tuple[int, dict[str, str]]:
    """Copy the weights in; raises `ValueError` for names or shapes that do not fit."""
    prefix = base_prefix(model)
    names = {name: name.removeprefix(prefix) for name in model.state_dict()}
    if model.config.model_type == "vit":
        names = {name: published_name(body) for name, body in names.items()}
    copied = 0
    unread = set(state) - set(names.values())
    missing = []
    for name, tensor in model.state_dict().items():
        value = state.get(names[name])
        if value is None or value.shape != tensor.shape:
            # A pooler that a head has there and never reads.
            if names[name].startswith("pooler.") and prefix:
                tensor.zero_()
                new[name] = "zeros: this head does not read the pooler"
            else:
                missing.append(name)
            continue
        tensor.copy_(value)
        copied += 1
    if missing or unread:
        raise ValueError(
            f"the weights do not fit {type(model).__name__}: nothing for {', '.join(missing) or 'none'}; not read: "
            f"{', '.join(sorted(unread)) or 'none'}."
        )
    return copied, new
