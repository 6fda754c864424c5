"""Configs of ours from those of a source."""

from dataclasses import fields
from typing import Any

from ..auto import FAMILIES, Family
from .table import OWN


# What the source decides; everything else in a config of ours may be an option.
DECIDED_BY_SOURCE = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size embedding_size hidden_act head_act
    max_position_embeddings position_offset type_vocab_size rescale_embeddings norm_position layer_norm_eps use_bias
    tie_word_embeddings is_decoder add_cross_attention use_cls_token num_register_tokens patch_size num_channels
    qkv_bias pooler_act pooler_output_size attention_head_size attn_layers axial_pos_embds axial_pos_shape
    axial_pos_embds_dim pad_token_id num_labels plain_span_head summary_use_proj summary_activation pooling
    """.split()
)

_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "problem_type",
    "chunk_size_feed_forward",
)

_OF_DISTILBERT = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}

# Activation of the dense layer in the heads of a source; "act" is `hidden_act`, "summary" `summary_activation`.
_SOURCE_ACTS = {
    "ForMaskedLM": {"bert": "act", "electra": "gelu", "distilbert": "act"},
    "ForSequenceClassification": {"bert": "tanh", "electra": "gelu", "distilbert": "relu"},
    "ForMultipleChoice": {"bert": "tanh", "electra": "summary", "distilbert": "relu"},
}
# The published ones of the families.
_FAMILY_ACTS = {
    "ForMaskedLM": {"eff_longformer": "gelu", "eff_electra": "gelu"},
    "ForSequenceClassification": {
        "eff_longformer": "tanh",
        "eff_big_bird": "act",
        "eff_nystromformer": "act",
        "eff_electra": "gelu",
        "eff_performer": "tanh",
    },
    "ForMultipleChoice": {
        "eff_longformer": "tanh",
        "eff_big_bird": "tanh",
        "eff_performer": "tanh",
        "eff_nystromformer": "relu",
    },
}


def config_class_of(to: str) -> type:
    """The config class of a family."""
    family: Family = FAMILIES[to]
    return getattr(family.module("configuration"), family.config_name)


def check_options(to: str, options: dict[str, Any]) -> None:
    """Raises `ValueError` for an option that the source decides."""
    for name in options:
        if name in DECIDED_BY_SOURCE:
            raise ValueError(
                f"{name} = {options[name]!r}: it is taken from the source; leave it out"
                + (" and give max_length." if name == "max_position_embeddings" else ".")
            )


def own_config(source: Any, options: dict[str, Any]) -> Any:
    """The config of the family that loads the source as its own."""
    cls = config_class_of(OWN[source.model_type])
    stored = {**source.to_dict(), "model_type": source.model_type}
    # BigBird's and Reformer's models write what they have chosen into their configs.
    values = {**cls.convert_original(stored), "model_type": cls.model_type}
    for name in ("architectures", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    return cls.from_dict({**values, **options})


def bert_shaped_config(source: Any, to: str, suffix: str, options: dict[str, Any]) -> Any:
    """A config of family `to` that computes what the source does, as far as the mechanism allows.

    Args:
        source: config of one of `BERT_SHAPED`.
        to: the family.
        suffix: of our class; the activation of its head follows the source's.
        options: of the family; they win.

    Raises:
        ValueError: a causal source, or one with relative positions.
    """
    refuse_what_is_no_encoder(source)
    kind, cls = source.model_type, config_class_of(to)
    translate = _OF_DISTILBERT if kind == "distilbert" else {}
    values = {name: getattr(source, translate.get(name, name)) for name in _SHARED}
    if kind == "distilbert":
        # It has no token types, and this epsilon in every norm.
        values |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12, "classifier_dropout": source.seq_classif_dropout}
        if suffix == "ForQuestionAnswering":
            values["classifier_dropout"] = source.qa_dropout
        elif suffix == "ForTokenClassification":
            values["classifier_dropout"] = None
    else:
        values |= {"type_vocab_size": source.type_vocab_size, "layer_norm_eps": source.layer_norm_eps}
        values["classifier_dropout"] = getattr(source, "classifier_dropout", None)
    values["position_offset"] = None if kind in ("roberta", "xlm-roberta", "camembert") else 0
    values["embedding_size"] = source.embedding_size if kind == "electra" else None
    values |= {"id2label": source.id2label, "label2id": source.label2id}
    if to == "eff_performer":
        # Dropped probabilities are dropped keys there; the paper has none.
        values["attention_probs_dropout_prob"] = 0.0
    if to == "eff_big_bird" and suffix == "ForQuestionAnswering":
        values["plain_span_head"] = True
    values |= _head_activation(source, to, suffix, values["hidden_act"])
    known = {field.name for field in fields(cls)} | {"id2label", "label2id", "problem_type"}
    return cls(**{**{name: value for name, value in values.items() if name in known}, **options})


def refuse_what_is_no_encoder(source: Any) -> None:
    """Raises `ValueError` for a config whose attention is not that of an encoder with learned positions."""
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        if getattr(source, name, False):
            raise ValueError(f"{name} = True in the source: only encoders are converted.")
    kind = getattr(source, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        raise ValueError(f"position_embedding_type = {kind!r} in the source: only 'absolute' positions are converted.")


def _head_activation(source: Any, to: str, suffix: str, hidden_act: str) -> dict[str, Any]:
    """The fields that give our head the source's activation."""
    if suffix not in _SOURCE_ACTS:
        return {}
    kind = source.model_type if source.model_type in ("electra", "distilbert") else "bert"
    found = _SOURCE_ACTS[suffix][kind]
    if suffix == "ForMaskedLM" and source.model_type not in ("bert", "electra", "distilbert"):
        found = "gelu"
    act = {"act": hidden_act, "summary": getattr(source, "summary_activation", None) or "linear"}.get(found, found)
    if to == "eff_electra" and suffix == "ForMultipleChoice":
        return {"summary_activation": act}
    published = _FAMILY_ACTS[suffix].get(to, "act")
    published = hidden_act if published == "act" else published
    return {} if act == published else {"head_act": act}
