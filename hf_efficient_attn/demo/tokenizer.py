"""Tokenizers trained on the spot: a byte-level BPE like RoBERTa's, and word pieces like BERT's."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast


SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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


def train_wordpieces(
    texts: Iterable[str], vocab_size: int = 8000, max_length: int = 512, show_progress: bool = False
) -> BertTokenizer:
    """Train lower-cased word pieces, as BERT and ELECTRA have them; the same texts give the same vocabulary.

    Ids 0 to 4 are `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`; then come the pieces of one character.

    Args:
        texts: the texts to learn from (the training side only: the held-out side stays unseen).
        vocab_size: tokens in all, at most: short texts have fewer pieces.
        max_length: becomes `model_max_length`, where truncation cuts.
        show_progress: show the trainer's own progress bars.

    Raises:
        ValueError: `vocab_size` is too small for the characters of the texts.
    """
    texts = list(texts)
    # Normalizer and pre-tokenizer are those of the tokenizer that will read with the vocabulary.
    blank = BertTokenizer().backend_tokenizer
    first: set[str] = set()
    later: set[str] = set()
    for text in texts:
        for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text)):
            first.update(word)
            later.update(word[1:])
    # The trainer numbers the pieces inside words in the random order of a hash map, and breaks ties between merges by
    # these numbers. Naming them beforehand, in order, is what makes it repeat itself (tokenizers issue 1794).
    known = [*BERT_SPECIAL_TOKENS, *(f"##{character}" for character in sorted(later))]
    if vocab_size < len(known) + len(first):
        raise ValueError(
            f"vocab_size is {vocab_size}, but {len(BERT_SPECIAL_TOKENS)} special tokens and {len(first) + len(later)} "
            f"pieces of one character have to fit: pass {len(known) + len(first)} or more."
        )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=known, show_progress=show_progress)
    tokenizer.train_from_iterator(texts, trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return BertTokenizer(vocab=dict(vocab), model_max_length=max_length)
