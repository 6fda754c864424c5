"""The kinds of models that can be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind of model to measure.

    Args:
        model_type: the name the Auto classes know it by.
        quadratic: time and memory grow with the square of the length (else linearly); predictions use it.
        windowed: the config takes a window.
        extra_positions: rows of the position table that no token uses (RoBERTa-style tables reserve two).
        attn_implementation: passed to the Auto class where the model can choose.
        global_tokens: the model takes a `global_attention_mask`.
        same_as: another kind with the same parameters, and the same outputs where those are equal.
        window_field: the config's name for the total window.
        gated: the feed-forward part has three matrices instead of two; it gets two thirds of the width, so that its
            multiply-adds are the same.
        fields: further fields of the config.
        layer_fields: config fields with an entry for each layer, as a pattern to repeat.
        size_fields: the config's own names for fields of a size.
        length_field: the config's name for the one length that its inputs have.
        dropout_fields: the config's names for dropout of attention's probabilities.
        causal: there is a causal form, which generation is measured of.
        primes: a tiny run before the measured ones is possible and leaves the model as it was; else another model,
            a small one, makes it.
        note: what to know when its figures are compared with others'.
    """

    model_type: str
    quadratic: bool
    windowed: bool
    extra_positions: int = 0
    attn_implementation: str | None = None
    global_tokens: bool = False
    same_as: str | None = None
    window_field: str = "attention_window"
    gated: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    layer_fields: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    size_fields: Mapping[str, str] = field(default_factory=dict)
    length_field: str | None = None
    dropout_fields: tuple[str, ...] = ("attention_probs_dropout_prob",)
    causal: bool = False
    primes: bool = True
    note: str = ""


# transformers' BigBird ignores it.
_BIG_BIRD = {"attention_probs_dropout_prob": 0.0}
# One table of positions, because transformers' Reformer takes no other length than a whole grid in training.
_REFORMER = {"axial_pos_embds": False, "local_attention_probs_dropout_prob": 0.05}
_REFORMER |= {"lsh_attention_probs_dropout_prob": 0.0, "attention_head_size": 64}
_REFORMER_LAYERS = {"attn_layers": ("local", "lsh")}
_REFORMER_DROPOUT = ("local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob")
_LONGFORMER = {"quadratic": False, "windowed": True, "extra_positions": 2, "global_tokens": True}


def _inside_bert(name: str, note: str) -> Kind:
    return Kind("bert", quadratic=False, windowed=False, attn_implementation=f"eff:{name}", note=note)


KINDS: dict[str, Kind] = {
    "eff_longformer": Kind("eff_longformer", same_as="longformer", causal=True, **_LONGFORMER),
    "longformer": Kind("longformer", **_LONGFORMER),
    "eff_big_bird": Kind(
        "eff_big_bird",
        quadratic=False,
        windowed=False,
        fields=_BIG_BIRD,
        note="blocks of 64, 3 random ones, no dropout of attention probabilities",
    ),
    "big_bird": Kind(
        "big_bird",
        quadratic=False,
        windowed=False,
        fields=_BIG_BIRD,
        primes=False,  # one short input turns it into a model of full attention
        note="blocks of 64, 3 random ones (in a forward pass all of them block 0), no dropout of attention "
        "probabilities, which it has none of in its blocks",
    ),
    "eff_nystromformer": Kind(
        "eff_nystromformer",
        quadratic=False,
        windowed=False,
        extra_positions=2,
        same_as="nystromformer",
        # As published; the other way cannot be chosen in transformers.
        fields={"inv_coeff_init_option": False},
        note="64 landmarks",
    ),
    "nystromformer": Kind(
        "nystromformer",
        quadratic=False,
        windowed=False,
        length_field="segment_means_seq_len",
        primes=False,  # it takes one length
        note="64 landmarks, no dropout of attention probabilities, which it has none of",
    ),
    "eff_performer": Kind(
        "eff_performer",
        quadratic=False,
        windowed=False,
        causal=True,
        note="256 features, softmax kernel, no dropout of attention, as its config has it by default",
    ),
    "eff_reformer": Kind(
        "eff_reformer",
        quadratic=False,
        windowed=False,
        fields=_REFORMER,
        layer_fields=_REFORMER_LAYERS,
        dropout_fields=_REFORMER_DROPOUT,
        causal=True,
        note="local and LSH layers in turn, chunks of 64, one round of hashing, dropout 0.05, reversible",
    ),
    "eff_reformer_kept": Kind(
        "eff_reformer",
        quadratic=False,
        windowed=False,
        fields={**_REFORMER, "reversible": False},
        layer_fields=_REFORMER_LAYERS,
        dropout_fields=_REFORMER_DROPOUT,
        note="the same with reversible=False",
    ),
    "reformer": Kind(
        "reformer",
        quadratic=False,
        windowed=False,
        fields={**_REFORMER, "hash_seed": 0},
        layer_fields=_REFORMER_LAYERS,
        dropout_fields=_REFORMER_DROPOUT,
        size_fields={"intermediate_size": "feed_forward_size"},
        note="as eff_reformer",
    ),
    "bert": Kind("bert", quadratic=True, windowed=False, attn_implementation="sdpa", causal=True),
    "bert_sliding_window": _inside_bert("sliding_window", "BERT with eff:sliding_window, total width 512"),
    "bert_block_sparse": _inside_bert("block_sparse", "BERT with eff:block_sparse, blocks of 64, 3 random ones"),
    "bert_nystrom": _inside_bert("nystrom", "BERT with eff:nystrom, 64 landmarks"),
    "bert_performer": _inside_bert("performer", "BERT with eff:performer, 256 features"),
    "bert_lsh": _inside_bert("lsh", "BERT with eff:lsh, chunks of 64 against 192 keys, one round of hashing"),
    "modernbert": Kind(
        "modernbert",
        quadratic=True,
        windowed=True,
        attn_implementation="sdpa",
        window_field="local_attention",
        gated=True,
        dropout_fields=("attention_dropout",),
        # By default these ids lie beyond small vocabularies.
        fields={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        note="its default pattern: layers 1, 4, 7 ... attend to everything, the others to the window, which sdpa "
        "computes as a masked full matrix; feed-forward gated, two thirds as wide (the same multiply-adds); "
        "no dropout, as its config has it; rotary positions; no global tokens",
    ),
}
