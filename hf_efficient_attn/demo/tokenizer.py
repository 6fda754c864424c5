"""A byte-level BPE tokenizer trained on the spot, with RoBERTa's special tokens and template."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, max_length: int = 2048, show_progress: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; ids 0 to 4 are `<s>`, `<pad>`, `</s>`, `<unk>`, `<mask>`.

    Args:
        texts: the texts to learn from (the training side only: the held-out side stays unseen).
        vocab_size: tokens in all; at least 261 (256 bytes and five special tokens).
        max_length: becomes `model_max_length`, where truncation cuts.
        show_progress: show the trainer's own progress bars.

    Raises:
        ValueError: `vocab_size` is too small for the byte alphabet.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [*SPECIAL_TOKENS.values(), "<mask>"]
    if vocab_size < len(alphabet) + len(specials):
        raise ValueError(
            f"vocab_size is {vocab_size}, but {len(alphabet)} bytes and {len(specials)} special tokens have to fit: "
            f"pass {len(alphabet) + len(specials)} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=show_progress
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        **SPECIAL_TOKENS,
    )
