"""A tokenizer of bytes: any text, no training, a vocabulary of 258."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


BYTE_VOCAB_SIZE = 258


def byte_tokenizer(model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of UTF-8 plus 2, as the published byte-level Reformer (enwik8) has them.

    Id 0 is `<pad>`, 1 is `</s>`; no special token is added by itself, but one that a text spells out is one, unless
    `split_special_tokens=True` is given. It saves and loads like any other.

    Args:
        model_max_length: longest text in bytes, for `truncation=True`; None for no limit.

    Raises:
        ValueError: a `model_max_length` that is no positive integer.

    Example:

    ```python
    >>> tokenizer = byte_tokenizer()
    >>> tokenizer("Aé").input_ids
    [67, 197, 171]
    ```
    """
    if model_max_length is not None and (not isinstance(model_max_length, int) or model_max_length < 1):
        raise ValueError(f"model_max_length = {model_max_length!r}: give a number of bytes, 1 or more, or None.")
    # One printable character stands for each byte there, the printable ones for themselves; sorted, these come first.
    characters = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = (byte for byte in range(256) if byte not in characters)
    characters.update((byte, chr(256 + number)) for number, byte in enumerate(others))
    vocab = {"<pad>": 0, "</s>": 1, **{character: byte + 2 for byte, character in characters.items()}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **limit,
    )
