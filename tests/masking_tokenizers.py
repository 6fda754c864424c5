"""Tokenizers of every kind for the tests of masking, and how its batches are read."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import tiny_pieces, tiny_tokenizer, tiny_unigrams, tiny_wordpieces

from hf_efficient_attn import byte_tokenizer


def with_specials(tokenizer: Any, **specials: str) -> Any:
    tokenizer.add_special_tokens(specials)
    return tokenizer


# Byte-level BPE, WordPiece, Unigram, SentencePiece BPE, bytes.
KINDS: dict[str, Callable[[], Any]] = {
    "bpe": tiny_tokenizer,
    "wordpieces": tiny_wordpieces,
    "unigrams": tiny_unigrams,
    "pieces": lambda: with_specials(tiny_pieces(), mask_token="[MASK]", pad_token="[PAD]"),
    "bytes": lambda: with_specials(byte_tokenizer(), mask_token="<mask>"),
}
TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
WORDS = ["the", "a", "quick", "brown", "fox", "foxs", "dog", "[MASK]", "xyz"]
TEXTS = ["the quick brown foxs", "a dog", "the fox the dog the foxs a quick quick brown brown dog", "the"]


def encode(tokenizer: Any, texts: list[str]) -> list[dict[str, list[int]]]:
    return [dict(tokenizer(text)) for text in texts]


def original(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])


def valid(batch: dict[str, torch.Tensor], name: str) -> list[list[int]]:
    """The rows of a column without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]
