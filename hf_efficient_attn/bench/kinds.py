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
        length_field: the config's name for the one length that its inputs have.
        primes: a tiny run before the measured ones leaves the model as it was.
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
    length_field: str | None = None
    primes: bool = True
    note: str = ""


# transformers' BigBird ignores it.
_BIG_BIRD = {"attention_probs_dropout_prob": 0.0}
_LONGFORMER = {"quadratic": False, "windowed": True, "extra_positions": 2, "global_tokens": True}
KINDS: dict[str, Kind] = {
    "eff_longformer": Kind("eff_longformer", same_as="longformer", **_LONGFORMER),
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
    "bert": Kind("bert", quadratic=True, windowed=False, attn_implementation="sdpa"),
    "modernbert": Kind(
        "modernbert",
        quadratic=True,
        windowed=True,
        attn_implementation="sdpa",
        window_field="local_attention",
        gated=True,
        # By default these ids lie beyond small vocabularies.
        fields={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        note="its default pattern: layers 1, 4, 7 ... attend to everything, the others to the window, which sdpa "
        "computes as a masked full matrix; feed-forward gated, two thirds as wide (the same multiply-adds); "
        "no dropout, as its config has it; rotary positions; no global tokens",
    ),
}
