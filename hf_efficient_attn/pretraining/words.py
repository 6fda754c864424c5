"""Which tokens of a vocabulary begin a word."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase


# A byte-level vocabulary writes byte b below 33 as the character 256 + b: the space as "Ġ", the line feed as "Ċ".
_BLANK_BYTES = (*range(9, 14), 32)
_BYTE_LEVEL_BLANKS = tuple(chr(256 + byte) for byte in _BLANK_BYTES)
_FALLBACK_BLANKS = tuple(f"<0x{byte:02X}>" for byte in _BLANK_BYTES)


def begins_word(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bool `[largest id + 1]`: whether a token with this id begins a word wherever it stands.

    The kind of vocabulary decides. WordPiece: every token without the prefix of continuing pieces ("##"). Byte-level
    BPE: a token that begins with a blank (space "Ġ", tab, line break). SentencePiece: one that begins with its mark for
    the space ("▁"), or that is a blank byte. Added tokens begin a word in every kind.

    Raises:
        ValueError: the vocabulary does not show where words begin, or the tokenizer has no backend to ask.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = described["model"]
    continuing = model.get("continuing_subword_prefix")
    beginning = tuple(_beginnings(described.get("pre_tokenizer"))) or tuple(_beginnings(described.get("decoder")))
    # Where the end of a word is marked (CLIP's "</w>"), no token tells that it begins one.
    if model.get("end_of_word_suffix") or not (continuing or beginning):
        raise ValueError(
            f"whole_word = True, but the vocabulary of this {type(tokenizer).__name__} does not show where words "
            'begin; give each feature a "word_ids" column (fast tokenizers: tokenizer(text).word_ids()), or '
            "whole_word=False."
        )
    vocab = tokenizer.get_vocab()
    table = np.zeros(max(vocab.values()) + 1, dtype=bool)
    for token, number in vocab.items():
        table[number] = not token.startswith(continuing) if continuing else token.startswith(beginning)
    table[list(tokenizer.added_tokens_decoder)] = True
    return table


def _beginnings(part: Any) -> Iterator[str]:
    """How tokens that begin a word begin, from a backend's description of its pre-tokenizer or decoder."""
    if isinstance(part, list):
        for inner in part:
            yield from _beginnings(inner)
    elif isinstance(part, dict):
        kind = part.get("type")
        if kind == "ByteLevel":
            yield from _BYTE_LEVEL_BLANKS
        elif kind == "Metaspace":
            yield from (part["replacement"], *_FALLBACK_BLANKS)
        elif kind == "Replace" and part.get("content") == " " and isinstance(part.get("pattern"), dict):
            # A decoder that turns a mark into the space, as Llama's does.
            yield from (part["pattern"].get("String", "\u2581"), *_FALLBACK_BLANKS)
        for name in ("pretokenizers", "decoders"):
            yield from _beginnings(part.get(name))
