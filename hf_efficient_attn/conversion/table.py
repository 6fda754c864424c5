"""What becomes what: a row for every known source and every family, and the same for the way back."""

from dataclasses import dataclass
from typing import Any


EXACT, APPROXIMATE, REFUSED = "exact", "approximate", "refused"


@dataclass(frozen=True)
class Row:
    """What a conversion gives.

    Args:
        verdict: `"exact"`, `"approximate"` or `"refused"`.
        why: up to where it is exact, what is approximate, or why it is refused; markdown.
    """

    verdict: str
    why: str


# Encoders of BERT's shape with learned positions and a layer's own weights: what is converted by renaming.
BERT_SHAPED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")

# Families of transformers that a family of ours loads as its own.
OWN = {
    "big_bird": "eff_big_bird",
    "electra": "eff_electra",
    "longformer": "eff_longformer",
    "nystromformer": "eff_nystromformer",
    "reformer": "eff_reformer",
    "vit": "eff_vit",
}

_FOR_BERT_SHAPED = {
    "eff_big_bird": Row(
        EXACT,
        "at any length with `attention_type='original_full'`, else for texts of at most `(num_random_blocks + 4) * "
        "block_size` tokens; approximate beyond",
    ),
    "eff_electra": Row(EXACT, "with `attention='softmax'`; with another mechanism as in that mechanism's family"),
    "eff_longformer": Row(
        EXACT, "for texts of at most `attention_window // 2 + 1` tokens (undilated); approximate beyond"
    ),
    "eff_nystromformer": Row(
        EXACT,
        "for texts of at most `num_landmarks` tokens, because the new convolution starts at 0; approximate beyond",
    ),
    "eff_performer": Row(APPROXIMATE, "random features estimate softmax at every length"),
    "eff_reformer": Row(REFUSED, "its queries are keys too, which separate query and key maps cannot become"),
    "eff_vit": Row(REFUSED, "it reads images"),
}

_FOR_IMAGES = {
    "vit": Row(EXACT, "with `attention='softmax'`; approximate with another mechanism"),
    "deit": Row(
        EXACT,
        "with `attention='softmax'`; the distillation token becomes a register with its position added; approximate "
        "with another mechanism. Not the head of two classifiers (`...WithTeacher`)",
    ),
}

_OWN_ROWS = {
    "big_bird": Row(
        EXACT,
        "with `attention_type='original_full'`, else for texts of at most `(num_random_blocks + 4) * block_size` "
        "tokens; beyond the random blocks are others (the original's are all block 0 in evaluation)",
    ),
    "electra": _FOR_BERT_SHAPED["eff_electra"],
    "longformer": Row(EXACT, "at every length, padding included; `max_length` adds positions"),
    "nystromformer": Row(
        EXACT,
        "for one text of `segment_means_seq_len` tokens, the one length that the original reads; where that equals "
        "`num_landmarks` for texts of at most so many",
    ),
    "reformer": Row(
        EXACT,
        "without LSH layers, for texts of whole chunks; LSH layers hash with directions of their own, as the original "
        "does anew at each call",
    ),
}

_REFUSED_SOURCES = {
    "albert": "its layers are one layer used many times; here each layer has weights of its own, so that the copies "
    "would be as large as BERT and drift apart in training",
    "mpnet": "its attention adds relative position biases, which the mechanisms here have no place for",
    "deberta": "its attention mixes content with relative positions, which the mechanisms here have no place for",
    "deberta-v2": "its attention mixes content with relative positions, which the mechanisms here have no place for",
    "modernbert": "it has rotary positions and windows of its own, and reads long texts already; keep its class and "
    "choose how it attends: `AutoModel.from_pretrained(name, attn_implementation='eff:sliding_window')`",
}

FAMILY_NAMES = tuple(_FOR_BERT_SHAPED)


def _rows() -> dict[tuple[str, str], Row]:
    rows = {(source, to): row for source in BERT_SHAPED for to, row in _FOR_BERT_SHAPED.items()}
    for source in ("longformer", "big_bird", "nystromformer", "reformer"):
        other = Row(REFUSED, f"only to its own family, `{OWN[source]}`: its weights are for its attention")
        rows |= {(source, to): _OWN_ROWS[source] if to == OWN[source] else other for to in FAMILY_NAMES}
    for source, row in _FOR_IMAGES.items():
        rows |= {(source, to): row if to == "eff_vit" else Row(REFUSED, "it reads texts") for to in FAMILY_NAMES}
    rows |= {(source, to): Row(REFUSED, why) for source, why in _REFUSED_SOURCES.items() for to in FAMILY_NAMES}
    return rows


CONVERSIONS: dict[tuple[str, str], Row] = _rows()
"""(model type of transformers, family) -> row."""

SOURCES: tuple[str, ...] = tuple(dict.fromkeys(source for source, _ in CONVERSIONS))
"""Model types of transformers that have rows."""

_BACK = {
    "big_bird": Row(EXACT, "with `attention_type='original_full'`; else its random blocks are others"),
    "electra": Row(EXACT, "with `attention='softmax'`"),
    "longformer": Row(EXACT, "for texts without padding, or with padding on the right and no pad id inside"),
    "nystromformer": Row(
        EXACT,
        "for one text of `segment_means_seq_len` tokens without padding (an option, by default the longest input), a "
        "multiple of `num_landmarks`",
    ),
    "reformer": Row(
        EXACT, "without LSH layers, for texts of whole chunks; LSH layers hash with other directions there"
    ),
    "vit": Row(EXACT, "with `attention='softmax'`, for images of the native size"),
}


def _back_rows() -> dict[tuple[str, str], Row]:
    rows = {}
    for family in FAMILY_NAMES:
        own = [name for name, ours in OWN.items() if ours == family]
        where = f"only to its own original, `{own[0]}`" if own else "transformers has no model with its attention"
        rows |= {(family, to): _BACK[to] if to in own else Row(REFUSED, where) for to in OWN}
    return rows


REVERSALS: dict[tuple[str, str], Row] = _back_rows()
"""(family, model type of transformers) -> row, for the way back."""


def find_row(source: str, to: str) -> Row:
    """The row of a conversion in either direction.

    Raises:
        ValueError: a model type without rows, or a row that refuses, with the reason.
    """
    rows = REVERSALS if source in FAMILY_NAMES else CONVERSIONS
    sources, targets = (dict.fromkeys(names) for names in zip(*rows, strict=True))
    if source not in sources:
        raise ValueError(
            f"the source is a {source!r} model, which has no row in the table of conversions; known are "
            f"{', '.join(SOURCES)}, and the way back from {', '.join(FAMILY_NAMES)}."
        )
    if to not in targets:
        raise ValueError(f"to = {to!r}: from {source!r} choose one of {', '.join(targets)}.")
    row = rows[source, to]
    if row.verdict == REFUSED:
        raise ValueError(f"{source} cannot become {to}: {row.why.replace('`', '')}.")
    return row


def render_tables() -> str:
    """Both tables in markdown, as `model_cards/CONVERSION.md` shows them; equal refusals of a source take one line."""
    lines = []
    for title, rows in (("From", CONVERSIONS), ("Back from", REVERSALS)):
        lines += [f"| {title} | To | Outputs | |", "| --- | --- | --- | --- |"]
        groups: dict[tuple[str, Row], list[str]] = {}
        for (source, to), row in rows.items():
            groups.setdefault((source, row), []).append(to)
        merged: dict[tuple[Any, ...], list[str]] = {}
        for (source, row), targets in groups.items():
            merged.setdefault((tuple(targets), row), []).append(source)
        for (targets, row), sources in merged.items():
            cells = (", ".join(f"`{name}`" for name in names) for names in (sources, targets))
            lines.append(f"| {' | '.join(cells)} | {row.verdict} | {row.why} |")
        lines.append("")
    return "\n".join(lines).strip() + "\n"
