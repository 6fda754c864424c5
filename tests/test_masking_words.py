"""Whole words in the masking collator, of every kind of vocabulary."""

from typing import Any

import numpy as np
import pytest
from helpers import tiny_tokenizer, tiny_wordpieces
from masking_tokenizers import KINDS, TEXTS, encode, valid, with_specials
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_efficient_attn import DataCollatorForReplacedTokenDetection as Collator


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def words_of(word_ids: list[int | None], ids: list[int], special_ids: list[int]) -> list[list[int]]:
    """Positions of each word, by the tokenizer's own word ids; special tokens cut words."""
    words: list[list[int]] = []
    last = None
    for position, (word, token) in enumerate(zip(word_ids, ids, strict=True)):
        word = None if token in special_ids else word
        if word is not None:
            if word != last:
                words.append([])
            words[-1].append(position)
        last = word
    return words


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_word_ids", [False, True])
def test_words_are_never_split(request: pytest.FixtureRequest, tokenizer: Any, side: str, with_word_ids: bool) -> None:
    tokenizer.padding_side = side
    encodings = [tokenizer(text) for text in TEXTS]
    if request.node.callspec.params["tokenizer"] == "bytes":
        # That tokenizer takes a whole text for one word; here one is a blank and what follows it.
        lists = [[text[: place + 1].count(" ") for place in range(len(text))] for text in TEXTS]
    else:
        lists = [encoding.word_ids() for encoding in encodings]
    words = [
        words_of(word_ids, encoding["input_ids"], tokenizer.all_special_ids)
        for word_ids, encoding in zip(lists, encodings, strict=True)
    ]
    features = [dict(encoding) for encoding in encodings]
    if with_word_ids:
        features = [feature | {"word_ids": row} for feature, row in zip(features, lists, strict=True)]
    collate = Collator(tokenizer, mlm_probability=0.3, whole_word=True)
    seen = [set() for _ in TEXTS]
    for epoch in range(60):
        collate.set_epoch(epoch)
        for row, labels in enumerate(valid(collate(features), "labels")):
            chosen = {position for position, label in enumerate(labels) if label != -100}
            taken = [number for number, word in enumerate(words[row]) if chosen & set(word)]
            assert chosen == {position for number in taken for position in words[row][number]}
            count = max(1, round(0.3 * sum(map(len, words[row]))))
            left = count - len(chosen)
            others = [len(word) for number, word in enumerate(words[row]) if number not in taken]
            # No word that still fits is left out, and only a single word may be longer than the count.
            assert len(taken) == 1 if left < 0 else all(size > left for size in others)
            seen[row].update(taken)
    # Words of every length come where the text is long enough for them.
    assert seen[2] == set(range(len(words[2])))


def choices(tokenizer: Any, probability: float, **feature: list[Any]) -> set[tuple[int, ...]]:
    """What is chosen of one example in fifty epochs."""
    collate = Collator(tokenizer, mlm_probability=probability, whole_word=True)
    found = set()
    for epoch in range(50):
        collate.set_epoch(epoch)
        found.add(tuple((collate([feature])["labels"][0] != -100).nonzero()[:, 0].tolist()))
    return found


def test_one_of_the_words_that_are_longer_than_the_count() -> None:
    tokenizer = tiny_tokenizer()
    assert choices(tokenizer, 0.15, input_ids=[20, 21, 22, 23, 24], word_ids=[0, 0, 0, 1, 1]) == {(0, 1, 2), (3, 4)}
    assert choices(tokenizer, 0.15, input_ids=[20, 21, 22, 23, 24], word_ids=[0] * 5) == {(0, 1, 2, 3, 4)}


def test_special_tokens_separate_words() -> None:
    fox, s, unknown, mask = 9, 11, 1, 4
    assert choices(tiny_wordpieces(), 0.3, input_ids=[fox, s]) == {(0, 1)}
    for special in (unknown, mask):
        assert choices(tiny_wordpieces(), 0.3, input_ids=[fox, special, s]) == {(0,), (2,)}
        assert choices(tiny_wordpieces(), 0.3, input_ids=[fox, special, s], word_ids=[0, 0, 0]) == {(0,), (2,)}


def test_word_ids_decide_where_they_are_given() -> None:
    # Pairs count from 0 again, and tokens of no word are not chosen. Five have one, of which two may be chosen; after
    # the word of one token none fits any more.
    ids, words = list(range(20, 28)), [None, 0, 0, None, 0, 1, 1, -1]
    assert choices(tiny_tokenizer(), 0.5, input_ids=ids, word_ids=words) == {(1, 2), (4,), (5, 6)}
    plain = Collator(tiny_tokenizer(), epoch=0)([{"input_ids": ids, "word_ids": words}])
    assert plain.keys() == {"input_ids", "attention_mask", "labels"}


def fast(model: Any, **parts: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", pad_token="[PAD]")


def test_words_of_further_kinds() -> None:
    # Llama's kind has no pre-tokenizer, and line breaks as bytes; T5's has several.
    vocab = {token: number for number, token in enumerate(["\u2581ab", "c", "<0x0A>", "d", "\u2581"])}
    llama = fast(
        models.BPE(vocab=vocab, merges=[], byte_fallback=True),
        normalizer=normalizers.Prepend("\u2581"),
        decoder=decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    t5 = fast(
        models.Unigram([(token, 0.0) for token in vocab], 0, False),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    )
    for tokenizer in (llama, t5):
        assert choices(tokenizer, 0.5, input_ids=[0, 1, 2, 3, 0, 1]) == {(0, 1), (2, 3), (4, 5)}

    # A line break begins a word of a byte-level vocabulary, and added tokens count once there are any.
    tokenizer = tiny_tokenizer()
    collate = Collator(tokenizer, whole_word=True, epoch=0)
    collate(encode(tokenizer, TEXTS))
    tokenizer.add_tokens(["new"])
    ids = tokenizer("x\nxnewx\tx", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7
    begins = collate._word_beginnings(np.array([ids]), None, np.ones((1, 7), dtype=bool))[0]
    assert begins.tolist() == [False, True, False, True, False, True, False]


def test_vocabularies_that_do_not_tell() -> None:
    # Neither a backend to ask, nor a mark where a word begins.
    slow = with_specials(ByT5Tokenizer(extra_ids=0), mask_token="<mask>")
    clip = fast(
        models.BPE(vocab={"a</w>": 0, "a": 1}, merges=[], end_of_word_suffix="</w>"),
        pre_tokenizer=pre_tokenizers.ByteLevel(),
    )
    words = fast(models.WordLevel({"a": 0, "b": 1}, "a"), pre_tokenizer=pre_tokenizers.Whitespace())
    for tokenizer, ids in ((slow, [70, 71]), (clip, [0, 1]), (words, [0, 1])):
        collate = Collator(tokenizer, whole_word=True)
        with pytest.raises(ValueError, match="whole_word = True.*word_ids"):
            collate([{"input_ids": ids}])
        batch = collate([{"input_ids": ids, "word_ids": [0, 0]}])
        assert batch["labels"].tolist() == [ids]

    with pytest.raises(ValueError, match="reach from 5 to 5000, but the tokenizer's ids from 0 to 279"):
        Collator(tiny_tokenizer(), whole_word=True)([{"input_ids": [5, 5000]}])
