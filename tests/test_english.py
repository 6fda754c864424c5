"""The English of the standard library, word pieces trained on it, and blocks of tokens to pretrain on."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
from datasets import Dataset
from helpers import tiny_tokenizer, tiny_wordpieces
from transformers import AutoTokenizer

from hf_efficient_attn import byte_tokenizer
from hf_efficient_attn.demo import EnglishCorpus, english_corpus, pack_texts, train_wordpieces


@pytest.fixture(scope="module")
def corpus() -> EnglishCorpus:
    return english_corpus()


def paragraphs(side: Dataset) -> list[str]:
    return [" ".join(part.lower().split()) for text in side["text"] for part in re.split(r"\n\s*\n", text)]


def sentence(number: int, words: int = 14) -> str:
    return f"Sentence {number} says " + " ".join(f"word{number}x{index}" for index in range(words)) + "."


def library(root: Path, **files: str) -> Path:
    """A small standard library; `a__b` is the file a/b.py."""
    for name, text in files.items():
        path = root.joinpath(*name.replace("__", "/").split("/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def documents(corpus: EnglishCorpus) -> dict[str, str]:
    return {row["file"]: row["text"] for side in (corpus.train, corpus.eval) for row in side}


def test_the_standard_library_has_a_megabyte_of_english(corpus: EnglishCorpus) -> None:
    statistics = corpus.statistics
    assert statistics["train"]["characters"] == sum(len(text) for text in corpus.train["text"]) > 1_000_000
    assert statistics["train"]["documents"] == len(corpus.train) > 200
    assert 0.05 < statistics["eval"]["characters"] / statistics["train"]["characters"] < 0.2
    for side in (corpus.train, corpus.eval):
        assert side.column_names == ["text", "label", "file"] and side.features["label"].names == [
            "docstrings",
            "topics",
        ]
        assert set(side["label"]) == {0, 1}
        assert all(len(text) >= 100 for text in side["text"])
        assert not any({"test", "tests", "site-packages", "lib2to3"} & set(file.split("/")) for file in side["file"])
    text = documents(corpus)
    assert "JSON" in text["json/decoder.py"] and "import" in text["topics/import"]
    assert "import re" not in text["json/decoder.py"]  # no code


def test_the_sides_share_no_text(corpus: EnglishCorpus) -> None:
    train, held_out = paragraphs(corpus.train), paragraphs(corpus.eval)
    assert len(train) == len(set(train)) and len(held_out) == len(set(held_out))
    assert not set(train) & set(held_out)
    assert not set(corpus.train["file"]) & set(corpus.eval["file"])


def test_the_seed_decides_the_split_and_nothing_else(corpus: EnglishCorpus) -> None:
    again, other = english_corpus(), english_corpus(seed=1)
    assert again.train["text"] == corpus.train["text"] and again.eval["text"] == corpus.eval["text"]
    assert set(other.eval["file"]) != set(corpus.eval["file"]) and documents(other) == documents(corpus)


def test_docstrings_of_modules_classes_and_functions_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    source = f'''"""{sentence(0)}"""
raise SystemExit("imported")
if True:
    class Outer:
        """{sentence(1)}"""

        def method(self):
            """{sentence(2)}

            {sentence(3)}
            """
            x = """{sentence(4)} is no docstring."""
            async def inner():
                """{sentence(5)}"""
try:
    pass
except ValueError:
    def fallback(): """{sentence(6)}"""
else:
    def usual(): """Too short."""
finally:
    def last():
        """{sentence(7)}

        >>> {sentence(8)}
        """
'''
    second = f'"""{sentence(9)}"""'
    root = library(tmp_path, a=source, b=second, broken="def (", test__c=second, **{"site-packages__d": second})
    texts = documents(english_corpus(stdlib=root, eval_fraction=0.3))
    assert texts == {"a.py": "\n\n".join(sentence(n) for n in (0, 1, 2, 3, 5, 6, 7)), "b.py": sentence(9)}


def test_topics_are_read_and_repeats_stay_in_the_longest_document_only(tmp_path: Path) -> None:
    whole = [sentence(number) for number in range(4)]
    topics = {"short": "\n\n".join([whole[0], whole[1]]), "whole": "\n\n".join(whole)}
    topics["other"] = "\n\n".join([sentence(7), "   " + whole[3].upper().replace(" ", "\n "), sentence(8)])
    root = library(
        tmp_path,
        pydoc_data__topics=f'"""{sentence(20)}"""\n\ntopics = {topics!r}\n',
        a=f'def f(): """{sentence(10)}"""\ndef g(): """{whole[2]}"""\ndef h(): """{sentence(10)}"""\n',
        b=f'"""{sentence(11)}"""',
    )
    corpus = english_corpus(stdlib=root, eval_fraction=0.4)
    assert documents(corpus) == {
        "topics/whole": "\n\n".join(whole),
        "topics/other": f"{sentence(7)}\n\n{sentence(8)}",
        "a.py": sentence(10),
        "b.py": sentence(11),
    }
    # Both kinds are on both sides.
    assert sorted(corpus.train["label"]) == sorted(corpus.eval["label"]) == [0, 1]
    # Without the documentation there are docstrings only.
    (root / "pydoc_data" / "topics.py").unlink()
    assert set(documents(english_corpus(stdlib=root, eval_fraction=0.4))) == {"a.py", "b.py"}


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_garbage_collector_is_as_it_was(was_enabled: bool, tmp_path: Path) -> None:
    try:
        (gc.enable if was_enabled else gc.disable)()
        with pytest.raises(ValueError, match="holds no docstring"):
            english_corpus(stdlib=tmp_path)
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


def test_word_pieces_are_bert_s_and_survive_saving(tmp_path: Path) -> None:
    tokenizer = train_wordpieces(["The quick brown fox, quickly. Café!"] * 5, vocab_size=80, max_length=12)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert each.convert_ids_to_tokens(range(5)) == specials and each.model_max_length == 12
        assert (each.pad_token_id, each.unk_token_id, each.cls_token_id, each.sep_token_id, each.mask_token_id) == (
            0, 1, 2, 3, 4,
        )  # fmt: skip
        assert set(each.all_special_tokens) == set(specials)  # the pieces of one character are ordinary ones
        encoding = each("THE Café", "quick")
        assert each.convert_ids_to_tokens(encoding["input_ids"]) == "[CLS] the cafe [SEP] quick [SEP]".split()
        assert encoding["token_type_ids"] == [0, 0, 0, 0, 1, 1]
        assert each.decode(each("quick, fox")["input_ids"], skip_special_tokens=True) == "quick, fox"
        assert each.tokenize("xzß") == ["[UNK]"] and each.tokenize("xo") == ["x", "##o"]
        assert len(each("fox " * 50, truncation=True)["input_ids"]) == 12


def test_a_vocabulary_has_at_most_its_size_and_covers_its_texts(corpus: EnglishCorpus) -> None:
    texts = corpus.train["text"][-60:]
    tokenizer = train_wordpieces(texts, vocab_size=1000)
    assert len(tokenizer) == 1000 and tokenizer.model_max_length == 512
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(texts, verbose=False)["input_ids"])


def test_the_same_texts_give_the_same_word_pieces(corpus: EnglishCorpus) -> None:
    texts = corpus.train["text"][-60:]
    # The trainer's hash maps are seeded anew each time: ten trainings without our order are ten vocabularies.
    vocabs = [train_wordpieces(iter(texts), vocab_size=700).get_vocab() for _ in range(5)]
    assert all(vocab == vocabs[0] for vocab in vocabs)


def test_blocks_hold_every_token_once_with_separators_between_texts() -> None:
    tokenizer = tiny_wordpieces()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    texts = ["the quick brown fox " * count for count in (1, 5, 2, 9, 3)] + ["", "a dog"]
    lone = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts if text]
    for max_length in range(8, 40):
        blocks = pack_texts(Dataset.from_dict({"text": texts}), tokenizer, max_length)["input_ids"]
        for block in blocks:
            assert block[0] == cls and block[-1] == sep and cls not in block[1:] and len(block) <= max_length
            assert all(pair != (sep, sep) for pair in zip(block, block[1:], strict=False)) and block[1] != sep
        assert all(len(block) >= max_length - 1 for block in blocks[:-1]) and len(blocks[-1]) >= 8
        joined = [token for block in blocks for token in block if token not in (cls, sep)]
        whole = [token for ids in lone for token in ids]
        assert whole[: len(joined)] == joined and len(whole) - len(joined) < 8
        # Inside a block texts end where they end alone.
        ends = {sum(map(len, lone[: index + 1])) for index in range(len(lone))}
        position = 0
        for block in blocks:
            for token in block[1:-1]:
                position += token != sep
                assert token != sep or position in ends
    one = pack_texts(Dataset.from_dict({"text": texts}), tokenizer, 1000)["input_ids"]
    assert len(one) == 1 and one[0] == [cls, *[token for ids in lone for token in (*ids, sep)]]


def test_blocks_take_any_column_and_roberta_s_tokens() -> None:
    tokenizer = tiny_tokenizer()
    data = Dataset.from_dict({"body": ["the quick brown fox jumps over the lazy dog"] * 3})
    blocks = pack_texts(data, tokenizer, 16, text_column="body")
    assert blocks.column_names == ["input_ids"] and len(blocks) > 2
    assert {(block[0], block[-1]) for block in blocks["input_ids"]} == {(0, 2)}


def test_a_last_block_of_fewer_than_eight_tokens_is_left_out() -> None:
    tokenizer = tiny_wordpieces()
    data = Dataset.from_dict({"text": ["the quick brown fox dog " * 3]})
    lengths = {size: [len(block) for block in pack_texts(data, tokenizer, size)["input_ids"]] for size in (11, 12, 17)}
    assert lengths == {11: [11, 8], 12: [12], 17: [17]}  # of 15 tokens of text; 5 and CLS and SEP are seven


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: english_corpus(stdlib=path), "holds no docstring and no topic of 100 characters"),
        (lambda path: english_corpus(eval_fraction=0.0), "eval_fraction is 0.0"),
        (lambda path: train_wordpieces(["abc d"], 10), "vocab_size is 10, .* 6 pieces of one character .* 11 or more"),
        (lambda path: pack_texts(Dataset.from_dict({"text": []}), tiny_tokenizer(), 7), "max_length is 7.*8 tokens"),
        (
            lambda path: pack_texts(Dataset.from_dict({"text": []}), byte_tokenizer(), 9),
            "CLS token None and the SEP token None",
        ),
    ],
)
def test_wrong_arguments_name_the_fix(call, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
