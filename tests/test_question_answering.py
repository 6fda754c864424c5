"""`QuestionAnswerer`: known logits give known answers, windows and scores; any model and tokenizer works."""

import math
from typing import Any

import numpy as np
import pytest
from answerers import (
    BPE_TEXT,
    QUESTION,
    TEXT,
    ByTokenId,
    brute_force,
    expect,
    random_logits,
    word_tokenizer,
)
from helpers import tiny_tokenizer
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from hf_efficient_attn import QuestionAnswerer
from hf_efficient_attn.answer_spans import Passage, best_answers


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), tiny_tokenizer()], ids=["words", "bpe"])
@pytest.mark.parametrize("longest", [1, 4, 100])
def test_one_window_is_every_span_tried(tokenizer: PreTrainedTokenizerFast, longest: int) -> None:
    model = ByTokenId(*random_logits())
    texts = ["w3 w1\tw4   w1 hit w5 w9", "the dog \n\n the fox 🦊🦊 été 漢字 of a window ", "x", " \u00a0the  "]
    answerer = QuestionAnswerer(model, tokenizer)
    for context in texts:
        for top_k in (2, 5, 1000):
            answers = answerer(question="w1 w7?", context=context, top_k=top_k, max_answer_length=longest)
            expect(answers, brute_force(model, tokenizer, "w1 w7?", context, longest), context, top_k)
        best = answerer(question="w1 w7?", context=context, max_answer_length=longest)
        assert best == answers[0] and all(type(best[name]) is int for name in ("start", "end"))
        assert len({(answer["start"], answer["end"]) for answer in answers}) == len(answers)


def test_known_span_and_score() -> None:
    """From w7 to w9, hand-made: 64 candidates, all logits 0 but two."""
    model = ByTokenId({17: 5.0}, {19: 4.0})
    answer = QuestionAnswerer(model, word_tokenizer())(question=QUESTION, context=TEXT)
    start = TEXT.index("w7")
    score = math.exp(5.0) / (math.exp(5.0) + 60) * math.exp(4.0) / (math.exp(4.0) + 60)
    null = 1 / (math.exp(5.0) + 60) / (math.exp(4.0) + 60)
    assert answer == {
        "answer": "w7 w8 w9",
        "start": start,
        "end": start + 8,
        "score": pytest.approx(score, rel=1e-9),
        "no_answer_score": pytest.approx(null, rel=1e-9),
    }


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), tiny_tokenizer()], ids=["words", "bpe"])
@pytest.mark.parametrize(("max_length", "stride"), [(20, 5), (26, 10), (21, 7), (40, None), (99, 0)])
def test_windows_give_what_one_window_gives(tokenizer: Any, max_length: int, stride: int | None) -> None:
    """Logits that do not depend on the window: nor does any result, where each answer fits into the overlap."""
    model = ByTokenId(*random_logits(1))
    context = TEXT if tokenizer.model_input_names[1] == "token_type_ids" else BPE_TEXT
    options: dict[str, Any] = {"max_length": max_length, "doc_stride": stride, "max_answer_length": 5}
    for side in ("left", "right"):
        tokenizer.truncation_side = side
        model.calls.clear()
        answers = QuestionAnswerer(model, tokenizer)(question="the dog", context=context, top_k=50, **options)
        expect(answers, brute_force(model, tokenizer, "the dog", context, 5), context, 50)
    if stride is None:
        return
    windows = tokenizer(
        "the dog",
        context,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )["input_ids"]
    seen = [
        ids[: mask.sum()].tolist() for call in model.calls for ids, mask in zip(*list(call.values())[:2], strict=True)
    ]
    assert seen == windows and (len(windows) > 2 or max_length == 99)


def test_answer_in_the_third_window_only() -> None:
    """Room for 10 words, 4 shared: windows begin at w0, w6, w12, ...; only the third has w16 to w18 whole."""
    model = ByTokenId({26: 9.0}, {28: 9.0})
    answerer = QuestionAnswerer(model, word_tokenizer())
    answer = answerer(question=QUESTION, context=TEXT, max_length=16, doc_stride=4, batch_size=1)
    assert answer["answer"] == "w16 w17 w18" and answer["start"] == TEXT.index("w16")
    assert answer["score"] == pytest.approx((math.exp(9.0) / (math.exp(9.0) + 60)) ** 2, rel=1e-9)
    first = [call["input_ids"][0, 5].item() for call in model.calls]
    assert first == list(range(10, 70, 6))
    holding = [number for number, call in enumerate(model.calls) if {26, 28} <= set(call["input_ids"][0].tolist())]
    assert holding == [2]
    # An answer that no window has whole is none.
    wide = ByTokenId({15: 9.0, 10: 8.0}, {21: 9.0, 10: 8.0})  # w5 to w11
    answer = QuestionAnswerer(wide, word_tokenizer())(question=QUESTION, context=TEXT, max_length=16, doc_stride=4)
    assert answer["answer"] == "w0"


def test_answer_in_the_overlap_counts_once() -> None:
    """w6 to w9 stand in two windows: as sure as if there were one, and one entry of the list."""
    model = ByTokenId({17: 9.0}, {18: 9.0})
    answerer = QuestionAnswerer(model, word_tokenizer())
    whole = answerer(question=QUESTION, context=TEXT, top_k=30)
    cut = answerer(question=QUESTION, context=TEXT, top_k=30, max_length=16, doc_stride=4)
    assert cut[0]["answer"] == "w7 w8" and cut[0]["score"] > 0.97
    assert cut[0]["score"] == pytest.approx(whole[0]["score"], rel=1e-9)
    assert len({(answer["start"], answer["end"]) for answer in cut}) == 30


def hand_made(first: int, values: list[list[float]], offsets: list[list[int]]) -> tuple[Passage, np.ndarray]:
    at = np.arange(1, len(offsets) + 1)
    return Passage({}, at, first, np.array(offsets), has_null=True), np.array(values, dtype=float)


def test_best_of_two_windows_and_lowest_null() -> None:
    """Passage 0 sees tokens a b, window 1 b c; b is surer in the second, where CLS is lower."""
    windows, logits = zip(
        hand_made(0, [[5.0, 0.0, 1.0], [5.0, 0.0, 1.0]], [[0, 1], [2, 3]]),
        hand_made(1, [[2.0, 4.0, 0.0], [1.0, 3.0, 0.0]], [[2, 3], [4, 5]]),
        strict=True,
    )
    start_sum = sum(map(math.exp, (0.0, 4.0, 0.0, 2.0)))
    end_sum = sum(map(math.exp, (0.0, 3.0, 0.0, 1.0)))
    (answer,) = best_answers("a b c", list(windows), list(logits), 1, 15, False)
    assert answer["answer"] == "b"
    assert answer["score"] == pytest.approx(math.exp(7.0) / start_sum / end_sum)
    assert answer["no_answer_score"] == pytest.approx(math.exp(3.0) / start_sum / end_sum)
    answers = best_answers("a b c", list(windows), list(logits), 100, 15, True)
    assert [answer["answer"] for answer in answers].count("b") == 1
    assert {answer["answer"] for answer in answers} == {"a", "b", "c", "a b", "b c", ""}
    assert answers[0]["answer"] == "b" and answers[-1]["score"] > 0
    # Surer in the first window.
    logits[0][:, 2], logits[1][:, 1] = 6.0, 5.0
    (answer,) = best_answers("a b c", list(windows), list(logits), 1, 15, False)
    totals = [sum(map(math.exp, (0.0, 6.0, 0.0, null))) for null in (2.0, 1.0)]
    assert answer["answer"] == "b" and answer["score"] == pytest.approx(math.exp(12.0) / totals[0] / totals[1])


def test_tokens_without_characters() -> None:
    """They neither begin nor end an answer and take no probability, whatever their logits."""
    window, logits = hand_made(0, [[0, 9, 1, 9, 0], [0, 9, 0, 9, 1]], [[0, 0], [0, 2], [2, 2], [3, 5]])
    (answer,) = best_answers("ab cd", [window], [logits], 1, 15, False)
    total = 2 + math.e
    assert answer["answer"] == "ab cd" and answer["score"] == pytest.approx((math.e / total) ** 2)


def test_whitespace_only_where_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    space = tokenizer("a b", add_special_tokens=False)["input_ids"][1]
    context = "the fox"
    answer = QuestionAnswerer(ByTokenId({space: 9.0}, {space: 9.0}), tokenizer)(question="a", context=context)
    assert answer["answer"] == " " and (answer["start"], answer["end"]) == (3, 4)
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    answerer = QuestionAnswerer(ByTokenId({space: 9.0}, {ids[-1]: 9.0}), tokenizer)
    assert answerer(question="a", context=context)["answer"] == "fox"
    answerer = QuestionAnswerer(ByTokenId({ids[0]: 9.0}, {space: 9.0}), tokenizer)
    assert answerer(question="a", context=context)["answer"] == "the"


def test_characters_of_several_bytes() -> None:
    tokenizer = tiny_tokenizer()
    context = "a 🦊 é 漢字 b"
    ids = tokenizer("漢字", add_special_tokens=False)["input_ids"]
    answerer = QuestionAnswerer(ByTokenId({ids[0]: 9.0}, {ids[-1]: 9.0}), tokenizer)
    answer = answerer(question="é?", context=context, top_k=1)
    assert answer["answer"] == "漢字" and answer["start"] == 6


@pytest.mark.parametrize(("null", "wins"), [((-5.0, 6.0), False), ((6.0, 6.0), True), ((6.0, -5.0), False)])
def test_no_answer(null: tuple[float, float], wins: bool) -> None:
    """The window with the lowest null decides; spans of 3 + 3 win or lose against it."""
    model = ByTokenId({15: 3.0}, {15: 3.0}, null=null)
    answerer = QuestionAnswerer(model, word_tokenizer())
    options: dict[str, Any] = {"max_length": 16, "doc_stride": 4}
    text = TEXT.replace("w40", "hit")
    plain = answerer(question=QUESTION, context=text, **options)
    total = math.exp(min(null)) + math.exp(3.0) + 59
    assert plain["answer"] == "w5"
    assert plain["score"] == pytest.approx((math.exp(3.0) / total) ** 2, rel=1e-6)
    assert plain["no_answer_score"] == pytest.approx((math.exp(min(null)) / total) ** 2, rel=1e-6)
    answer = answerer(question=QUESTION, context=text, allow_no_answer=True, **options)
    if not wins:
        assert answer == plain
    else:
        score = plain["no_answer_score"]
        assert answer == {"answer": "", "score": score, "start": 0, "end": 0, "no_answer_score": score}
    both = answerer(question=QUESTION, context=text, allow_no_answer=True, top_k=2, **options)
    assert both[0] == answer and len(both) == 2 and (both[1] == plain if wins else True)


def test_no_first_token_no_null() -> None:
    """A tokenizer without special tokens: the first token is the question's and says nothing about "no answer"."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    answerer = QuestionAnswerer(ByTokenId({4: 99.0, 15: 3.0}, {4: 99.0, 15: 3.0}), tokenizer)
    answer = answerer(question=QUESTION, context=TEXT, allow_no_answer=True)
    total = math.exp(3.0) + 59
    assert answer["answer"] == "w5" and answer["no_answer_score"] == 0.0
    assert answer["score"] == pytest.approx((math.exp(3.0) / total) ** 2, rel=1e-6)


def test_questions_and_contexts() -> None:
    model = ByTokenId({15: 5.0, 30: 4.0}, {15: 5.0, 30: 4.0})
    answerer = QuestionAnswerer(model, word_tokenizer())
    contexts = ["w1 w5 w2", "w20 w3", TEXT]
    many = answerer(question=QUESTION, context=contexts)
    assert [answer["answer"] for answer in many] == ["w5", "w20", "w5"]
    assert many == [answerer(question=QUESTION, context=context) for context in contexts]
    pairs = answerer(question=["q0", "q1 q2"], context=tuple(contexts[:2]), top_k=2)
    assert pairs == [answerer("q0", contexts[0], top_k=2), answerer("q1 q2", contexts[1], top_k=2)]
    assert [len(call["input_ids"]) for call in model.calls[:1]] == [3]
    assert answerer(question=["q0", "q1"], context="w5") == 2 * [answerer(question="q0", context="w5")]
    assert answerer(question=["q0"], context="w5") == [answerer(question="q0", context="w5")]
    assert answerer(question="q0", context=[]) == [] == answerer(question=[], context="w5")


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_the_model_is_given(side: str) -> None:
    """Padding on the right whatever the tokenizer's side, token types, and the global mask up to the question's end."""
    tokenizer = word_tokenizer()
    tokenizer.padding_side = side
    model = ByTokenId({15: 5.0}, {15: 5.0}, global_attention=None)
    # A separator within the question belongs to it.
    QuestionAnswerer(model, tokenizer)(question=["q0 [SEP] q1", "q2"], context=["w5", "w1 w2 w5"])
    (call,) = model.calls
    assert call["input_ids"].tolist() == [[1, 4, 2, 5, 2, 15, 2], [1, 6, 2, 11, 12, 15, 2]]
    assert call["attention_mask"].tolist() == [7 * [1], 7 * [1]]
    assert call["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    assert call["global_attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert not call["training"] and not call["grad"]
    QuestionAnswerer(model, tokenizer)(question="q0", context=["w5", "w1 w2"])
    call = model.calls[1]
    assert call["input_ids"].tolist() == [[1, 4, 2, 15, 2, 0], [1, 4, 2, 11, 12, 2]]
    assert call["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], 6 * [1]]
    assert call["global_attention_mask"].tolist() == 2 * [[1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"global_attention": None}, True),
        ({"global_attention": "cls"}, False),
        ({"global_attention": [4]}, False),
        ({"model_type": "longformer"}, True),
        ({"model_type": "led"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_who_gets_a_global_mask(config: dict[str, Any], given: bool) -> None:
    model = ByTokenId({15: 5.0}, {15: 5.0}, **config)
    QuestionAnswerer(model, word_tokenizer())(question="q0", context="w5")
    assert (model.calls[0]["global_attention_mask"] is not None) == given


def test_only_what_the_model_takes() -> None:
    """DistilBERT's forward had no token types; a mechanism may have no global tokens."""

    class Plain(ByTokenId):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, return_dict: bool, start_positions: Any = None):
            return super().forward(input_ids, attention_mask)

    answerer = QuestionAnswerer(Plain({15: 5.0}, {15: 5.0}, global_attention=None), word_tokenizer())
    assert answerer(question=QUESTION, context=TEXT)["answer"] == "w5"


def test_defaults() -> None:
    """Windows as long as the tokenizer says, sharing 128 tokens or half of their room; the model goes to the device."""
    model = ByTokenId({15: 5.0}, {15: 5.0})
    for length, shared in ((100, 47), (600, 128)):
        model.calls.clear()
        QuestionAnswerer(model, word_tokenizer(length))(question=QUESTION, context=20 * f"{TEXT} ", batch_size=1)
        first, second = (call["input_ids"][0].tolist() for call in model.calls[:2])
        assert len(first) == len(second) == length and first[-1 - shared : -1] == second[5 : 5 + shared]
        assert first[-2 - shared : -1] != second[5 : 6 + shared]
    assert QuestionAnswerer(model, word_tokenizer(), device="meta").model.table.device.type == "meta"


def test_settings_and_modes_are_restored() -> None:
    tokenizer = word_tokenizer()
    backend = tokenizer.backend_tokenizer
    model = ByTokenId({15: 5.0}, {15: 5.0})
    model.frozen = nn.Linear(1, 1)
    model.train()
    model.frozen.eval()
    tokenizer.truncation_side = "left"
    for set_up in (
        lambda: None,
        lambda: (
            backend.enable_truncation(7, stride=2, strategy="only_first", direction="left"),
            backend.enable_padding(direction="left", pad_id=3, pad_token="[UNK]", length=9),
            setattr(backend, "encode_special_tokens", True),
        ),
    ):
        set_up()
        before = backend.to_str(), backend.encode_special_tokens, tokenizer.truncation_side, tokenizer.padding_side
        answerer = QuestionAnswerer(model, tokenizer)
        answerer(question=QUESTION, context=TEXT, max_length=16)
        for bad in ({"max_length": 5}, {"doc_stride": 10**6}):
            with pytest.raises(ValueError):
                answerer(question=QUESTION, context=TEXT, **bad)
        after = backend.to_str(), backend.encode_special_tokens, tokenizer.truncation_side, tokenizer.padding_side
        assert after == before
    assert model.training and model.table.grad is None and not model.frozen.training
    model.null = "broken"
    with pytest.raises(TypeError):
        answerer(question=QUESTION, context=TEXT)
    assert model.training and not model.frozen.training
