"""Names of weights: those of each source in common ones, and common ones in those of each family.

Common names are BERT's for the body. A head has parts: `dense`, `norm` and `decoder` (predicts tokens), `dense` and
`out` (reads the first token, or tells replaced tokens), `out` alone (tokens, spans), `relationship` (next sentence).
"""

import re
from typing import Any

from .table import OWN


# Suffix of a class of transformers -> suffix of ours.
TASKS = {
    "Model": "Model",
    "ForMaskedLM": "ForMaskedLM",
    "ForPreTraining": "ForMaskedLM",
    "ForSequenceClassification": "ForSequenceClassification",
    "ForTokenClassification": "ForTokenClassification",
    "ForQuestionAnswering": "ForQuestionAnswering",
    "ForMultipleChoice": "ForMultipleChoice",
}
DETECTOR = "ForReplacedTokenDetection"


def base_prefix(model: Any) -> str:
    """What stands before the base model's weights in the state of `model`; nothing in a base model's own."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


_DISTILBERT_BODY = {
    r"^transformer\.layer\.": "encoder.layer.",
    r"\.attention\.q_lin\.": ".attention.self.query.",
    r"\.attention\.k_lin\.": ".attention.self.key.",
    r"\.attention\.v_lin\.": ".attention.self.value.",
    r"\.attention\.out_lin\.": ".attention.output.dense.",
    r"\.sa_layer_norm\.": ".attention.output.LayerNorm.",
    r"\.ffn\.lin1\.": ".intermediate.dense.",
    r"\.ffn\.lin2\.": ".output.dense.",
    r"\.output_layer_norm\.": ".output.LayerNorm.",
}

# The body of each source, where its names are not BERT's.
_BODIES = {"distilbert": _DISTILBERT_BODY}

_BERT_LM = {
    "cls.predictions.transform.dense": "dense",
    "cls.predictions.transform.LayerNorm": "norm",
    "cls.predictions.decoder": "decoder",
}
_ROBERTA_LM = {"lm_head.dense": "dense", "lm_head.layer_norm": "norm", "lm_head.decoder": "decoder"}
_DENSE_AND_OUT = {"classifier.dense": "dense", "classifier.out_proj": "out"}
_PRE_AND_OUT = {"pre_classifier": "dense", "classifier": "out"}
_POOLED = {"pooler.dense": "dense", "classifier": "out"}
_DETECTOR = {"discriminator_predictions.dense": "dense", "discriminator_predictions.dense_prediction": "out"}
_COMMON = {
    "Model": {},
    "ForTokenClassification": {"classifier": "out"},
    "ForQuestionAnswering": {"qa_outputs": "out"},
    DETECTOR: _DETECTOR,
}
_SUMMARY = {"sequence_summary.summary": "dense", "classifier": "out"}
_GENERATOR = {
    "generator_predictions.dense": "dense",
    "generator_predictions.LayerNorm": "norm",
    "generator_lm_head": "decoder",
}

_BERT = _COMMON | {
    "ForMaskedLM": _BERT_LM,
    "ForPreTraining": _BERT_LM | {"cls.seq_relationship": "relationship"},
    "ForSequenceClassification": _POOLED,
    "ForMultipleChoice": _POOLED,
}
_ROBERTA = _COMMON | {
    "ForMaskedLM": _ROBERTA_LM,
    "ForSequenceClassification": _DENSE_AND_OUT,
    "ForMultipleChoice": _POOLED,
}
_ELECTRA = _COMMON | {
    "ForMaskedLM": _GENERATOR,
    "ForSequenceClassification": _DENSE_AND_OUT,
    "ForMultipleChoice": _SUMMARY,
}
_DISTILBERT = _COMMON | {
    "ForMaskedLM": {"vocab_transform": "dense", "vocab_layer_norm": "norm", "vocab_projector": "decoder"},
    "ForSequenceClassification": _PRE_AND_OUT,
    "ForMultipleChoice": _PRE_AND_OUT,
}

# Source -> suffix of the class -> its modules by part. The pooler counts as part of the heads that read it.
SOURCE_HEADS: dict[str, dict[str, dict[str, str]]] = {
    "bert": {name: _BERT[name] for name in TASKS},
    "roberta": {name: _ROBERTA[name] for name in TASKS if name in _ROBERTA},
    "xlm-roberta": {name: _ROBERTA[name] for name in TASKS if name in _ROBERTA},
    "camembert": {name: _ROBERTA[name] for name in TASKS if name in _ROBERTA},
    "electra": {name: _ELECTRA[name] for name in TASKS if name in _ELECTRA} | {"ForPreTraining": _DETECTOR},
    "distilbert": {name: _DISTILBERT[name] for name in TASKS if name in _DISTILBERT},
}

# Family -> suffix of our class -> the same.
TARGET_HEADS: dict[str, dict[str, dict[str, str]]] = {
    "eff_big_bird": _BERT | {"ForSequenceClassification": _DENSE_AND_OUT},
    "eff_electra": _ELECTRA,
    "eff_longformer": _ROBERTA,
    "eff_nystromformer": _BERT | {"ForSequenceClassification": _DENSE_AND_OUT, "ForMultipleChoice": _PRE_AND_OUT},
    "eff_performer": _BERT,
}

_SAME = {name: name for name in TASKS}
_OWN_HEADS = {
    "eff_big_bird": _SAME | {"ForCausalLM": "ForMaskedLM"},
    "eff_electra": _SAME,
    "eff_longformer": _SAME,
    "eff_nystromformer": _SAME,
    "eff_reformer": _SAME | {"ModelWithLMHead": "ForCausalLM"},
    "eff_vit": {name: name for name in ("Model", "ForImageClassification", "ForMaskedImageModeling")},
}

# A second name of what `decoder` is.
_DOUBLED = re.compile(r"^(cls\.predictions|lm_head)\.bias$")


def our_suffix(source: str, to: str, suffix: str) -> str:
    """Which of our heads a source's head becomes; raises `ValueError` for one that none becomes."""
    is_own = OWN.get(source) == to
    known = _OWN_HEADS[to] if is_own else {name: TASKS[name] for name in SOURCE_HEADS[source]}
    if suffix not in known:
        raise ValueError(
            f"the source's head ({suffix}) is none that {to} can take over; it takes {', '.join(known)}. Convert one "
            "of those, such as the base model."
        )
    if is_own:
        return known[suffix]
    if source == "electra" and suffix == "ForPreTraining":
        return DETECTOR
    if suffix == "ForPreTraining" and to == "eff_big_bird":
        return "ForPreTraining"
    return known[suffix]


def common_name(source: str, suffix: str, prefix: str, name: str) -> str | None:
    """The common name of a weight of the source, None for one that is there twice.

    Names that belong to nothing known come back as they are.
    """
    body = name.removeprefix(prefix)
    if _DOUBLED.match(name):
        return None
    module, _, kind = body.rpartition(".")
    part = SOURCE_HEADS[source][suffix].get(module)
    if part is not None:
        return f"head.{part}.{kind}"
    for pattern, replacement in _BODIES.get(source, {}).items():
        body = re.sub(pattern, replacement, body)
    return body


def family_names(to: str, suffix: str, prefix: str, names: list[str]) -> dict[str, str]:
    """Every weight of a model of ours -> its common name."""
    heads, found = TARGET_HEADS[to].get(suffix, {}), {}
    for name in names:
        body = name.removeprefix(prefix)
        # BigBird's pooler is the linear map itself.
        body = re.sub(r"^pooler\.(?=weight|bias)", "pooler.dense.", body)
        module, _, kind = body.rpartition(".")
        part = heads.get(module)
        if _DOUBLED.match(name):
            found[name] = "head.decoder.bias"
        else:
            found[name] = body if part is None else f"head.{part}.{kind}"
    return found
