"""`QuestionAnswerer`: known logits give known answers, windows and scores; any model and tokenizer works."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import collect_warnings, model_class, no_warnings, randomise_, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from hf_efficient_attn import FAMILIES, QuestionAnswerer
from hf_efficient_attn.answer_spans import Passage, best_answers


QA = "AutoModelForQuestionAnswering"
WITH_QA = pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if QA in row.heads])
WORDS = [f"w{number}" for number in range(60)]
QUESTION = "q0 q1 q2"
TEXT = " ".join(WORDS)
BPE_TEXT = "the quick brown fox jumps over the lazy dog, a window of attention of the fox and the dog"


def word_tokenizer(max_length: int = 100) -> PreTrainedTokenizerFast:
    """One token a word, BERT's template with token types; `w<i>` has the id `10 + i`."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "q0", "q1", "q2", "q3", "hit", "miss", *WORDS]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        cls_token="[CLS]",
        pad_token="[PAD]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


class ByTokenId(nn.Module):
    """Logits that depend on the token id alone; `calls` has what it was given.

    With `null`, CLS has the first of its two logits where the window has the token `hit`, else the second.
    """

    def __init__(self, start: dict[int, float], end: dict[int, float], null: Any = None, **config: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(300, 2))
        with torch.no_grad():
            for column, values in enumerate((start, end)):
                for token, value in values.items():
                    self.table[token, column] = value
        self.null, self.calls = null, []
        self.config = SimpleNamespace(**{"max_position_embeddings": 1000, **config})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        self.calls.append(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "global_attention_mask": global_attention_mask,
                "training": self.training,
                "grad": torch.is_grad_enabled(),
            }
        )
        # Padding would win, were it a candidate.
        logits = torch.where(attention_mask[:, :, None] == 1, self.table[input_ids], 99.0)
        if self.null is not None:
            logits[:, 0] = torch.where((input_ids == 8).any(dim=1), *self.null)[:, None]
        return QuestionAnsweringModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])


def random_logits(seed: int = 0, tokens: int = 300) -> tuple[dict[int, float], dict[int, float]]:
    values = 2.0 * np.random.default_rng(seed).standard_normal((2, tokens))
    return dict(enumerate(values[0])), dict(enumerate(values[1]))


def brute_force(model: ByTokenId, tokenizer: Any, question: str, context: str, longest: int) -> dict[Any, float]:
    """Score of every span of one window that holds everything, and of "no answer" under None: sums over all pairs."""
    encoded = tokenizer(question, context, return_offsets_mapping=True)
    kinds, offsets, ids = encoded.sequence_ids(0), encoded["offset_mapping"], encoded["input_ids"]
    logits = model.table.detach().double()[ids].tolist()
    tokens = [index for index, kind in enumerate(kinds) if kind == 1]
    total = [sum(math.exp(logits[index][side]) for index in [0, *tokens]) for side in (0, 1)]
    scores: dict[Any, float] = {None: math.exp(sum(logits[0])) / (total[0] * total[1])}
    for first in tokens:
        for last in tokens:
            if 0 <= last - first < longest:
                text = context[offsets[first][0] : offsets[last][1]]
                start = offsets[first][0] + (len(text) - len(text.lstrip()) if text.strip() else 0)
                end = start + len(text.strip() or text)
                score = math.exp(logits[first][0] + logits[last][1]) / (total[0] * total[1])
                scores[start, end] = max(score, scores.get((start, end), 0.0))
    return scores


def expect(answers: list[dict[str, Any]], scores: dict[Any, float], context: str, top_k: int) -> None:
    """`answers` are the `top_k` best of `scores`."""
    null = scores.pop(None)
    ranked = sorted(scores.items(), key=lambda item: -item[1])[:top_k]
    assert [(answer["start"], answer["end"]) for answer in answers] == [span for span, _ in ranked]
    assert [answer["score"] for answer in answers] == pytest.approx([score for _, score in ranked], rel=1e-5)
    for answer in answers:
        assert set(answer) == {"answer", "score", "start", "end", "no_answer_score"}
        assert answer["answer"] == context[answer["start"] : answer["end"]]
        assert answer["no_answer_score"] == pytest.approx(null, rel=1e-5)


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


def tiny_in_tree(name: str, tokenizer: Any) -> Any:
    """A random question-answering model of transformers."""
    options: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 1}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "DistilBert":
        small = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    if name == "Longformer":
        small |= {"attention_window": 8, "sep_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**options, **small)
    return randomise_(getattr(transformers, f"{name}ForQuestionAnswering")(config))


def by_hand(model: Any, tokenizer: Any, question: str, context: str) -> dict[str, Any]:
    """The best answer from one forward of the model alone, over all spans of up to 15 tokens."""
    encoded = tokenizer(question, context, return_offsets_mapping=True, return_tensors="pt")
    kinds, offsets = encoded.sequence_ids(0), encoded.pop("offset_mapping")[0].tolist()
    with torch.no_grad():
        output = model(**encoded)
    tokens = [0, *(index for index, kind in enumerate(kinds) if kind == 1)]
    start, end = (x[0, tokens].double().softmax(dim=0) for x in (output.start_logits, output.end_logits))
    joint = (start[:, None] * end[None])[1:, 1:].triu().tril(14)
    first, last = divmod(int(joint.argmax()), len(tokens) - 1)
    text = context[offsets[tokens[first + 1]][0] : offsets[tokens[last + 1]][1]]
    return {"answer": text.strip() or text, "score": joint.max().item(), "null": (start[0] * end[0]).item()}


def check_model(answerer: QuestionAnswerer, contexts: list[str]) -> None:
    """One window is as by hand; batches, windows and padding change nothing."""
    model, tokenizer = answerer.model, answerer.tokenizer
    question, whole = "the dog?", contexts[0]
    answer = answerer(question=question, context=whole)
    expected = by_hand(model, tokenizer, question, whole)
    assert answer["answer"] == expected["answer"]
    assert answer["score"] == pytest.approx(expected["score"], rel=1e-4)
    assert answer["no_answer_score"] == pytest.approx(expected["null"], rel=1e-4)
    results = []
    for batch_size, side in ((1, "right"), (3, "right"), (3, "left"), (64, "left")):
        tokenizer.padding_side = side
        options: dict[str, Any] = {"max_length": 40, "doc_stride": 9, "batch_size": batch_size, "top_k": 3}
        results.append(answerer(question=question, context=contexts, **options))
    tokenizer.padding_side = "right"
    for other in results[1:]:
        for text, some, same in zip(contexts, results[0], other, strict=True):
            for one, two in zip(some, same, strict=True):
                assert one["answer"] == text[one["start"] : one["end"]] == two["answer"] and 0 < one["score"] < 1
                assert (one["start"], one["end"]) == (two["start"], two["end"])
                assert two["score"] == pytest.approx(one["score"], rel=1e-4)


CONTEXTS = ["the fox jumps", BPE_TEXT, "of a window " * 12, "été 🦊 dog"]


@WITH_QA
def test_families(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = randomise_(model_class(family, QA)(tiny_config(family, vocab_size=len(tokenizer))))
    with no_warnings():
        check_model(QuestionAnswerer(model, tokenizer), CONTEXTS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with no_warnings():
        loaded = QuestionAnswerer(tmp_path, device="cpu")
        same = QuestionAnswerer(str(tmp_path), tokenizer)
    assert type(loaded.model) is type(model)
    expected = QuestionAnswerer(model, tokenizer)(question="a dog?", context=CONTEXTS)
    assert loaded(question="a dog?", context=CONTEXTS) == same(question="a dog?", context=CONTEXTS) == expected
    # A long context, by default read as far as the model goes: 100 tokens of the tokenizer here.
    assert loaded(question="a dog?", context=20 * BPE_TEXT)["end"] <= 20 * len(BPE_TEXT)
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "Longformer"])
def test_models_of_transformers(name: str) -> None:
    """Their position tables have 64 rows, of which RoBERTa and Longformer keep two."""
    tokenizer = tiny_tokenizer(max_length=10**30)
    if name == "Bert":
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    answerer = QuestionAnswerer(tiny_in_tree(name, tokenizer), tokenizer)
    check_model(answerer, CONTEXTS)
    lengths = []
    answerer.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answerer(question="a dog?", context=20 * BPE_TEXT)
    assert max(lengths) == (62 if name in ("Roberta", "Longformer") else 64)
    with pytest.raises(ValueError, match=f"this model takes {max(lengths)} tokens"):
        answerer(question="a dog?", context="the dog", max_length=max(lengths) + 1)


def test_rule_of_the_config_is_kept() -> None:
    """Ours with a rule of the user computes what the model computes with it; without, question and CLS are global."""
    tokenizer = tiny_tokenizer()
    scores = []
    for rule in (None, "question", "cls", "none"):
        config = tiny_config("eff_longformer", vocab_size=len(tokenizer), global_attention=rule)
        model = randomise_(model_class("eff_longformer", QA)(config))
        answer = QuestionAnswerer(model, tokenizer)(question="the dog?", context=BPE_TEXT)
        assert answer["score"] == pytest.approx(by_hand(model, tokenizer, "the dog?", BPE_TEXT)["score"], rel=1e-4)
        scores.append(answer["score"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-6) and len({round(score, 9) for score in scores[1:]}) == 3


def refuses(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(ValueError) as info:
        call()
    missing = [part for part in parts if part not in str(info.value)]
    assert not missing, f"{missing} not in: {info.value}"


BAD_CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "empty question": ({"question": ""}, ("question = ''", "empty", "give a text")),
    "blank context": ({"context": [" \n"], "question": "q0"}, ("context[0] = ' \\n'", "empty")),
    "second question": ({"question": ["q0", ""], "context": "w1"}, ("question[1] = ''",)),
    "no text": ({"question": None}, ("question is a NoneType", "give a str")),
    "no texts": ({"context": ["w1", 3]}, ("context[1] is a int", "give a str")),
    "not a list": ({"context": {"w1"}}, ("context is a set", "list")),
    "lengths": ({"question": ["q0", "q1"], "context": ["w1"]}, ("question has 2", "context 1", "pairs")),
    "top_k": ({"top_k": 0}, ("top_k = 0", "1 or more")),
    "fraction": ({"top_k": 1.5}, ("top_k = 1.5", "whole number")),
    "truth": ({"batch_size": True}, ("batch_size = True",)),
    "batch_size": ({"batch_size": 0}, ("batch_size = 0", "1 or more")),
    "max_answer_length": ({"max_answer_length": -1}, ("max_answer_length = -1", "1 or more")),
    "max_length": ({"max_length": 0}, ("max_length = 0", "1 or more")),
    "longer than the model": ({"max_length": 1001}, ("max_length = 1001", "1000 tokens", "at most")),
    "long question": ({"max_length": 6}, ("question has 3 tokens", "3 special", "max_length = 6", "shorten", "raise")),
    "long stride": ({"max_length": 16, "doc_stride": 10}, ("doc_stride = 10", "room for 10", "0 to 9", "raise")),
    "negative stride": ({"doc_stride": -1}, ("doc_stride = -1", "from 0")),
    "broken stride": ({"doc_stride": 1.0}, ("doc_stride = 1.0",)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    options, parts = BAD_CALLS[name]
    answerer = QuestionAnswerer(ByTokenId({15: 5.0}, {15: 5.0}), word_tokenizer())
    with collect_warnings() as warned:
        refuses(lambda: answerer(**{"question": QUESTION, "context": TEXT, **options}), *parts)
    assert not warned
    assert answerer(question=QUESTION, context=TEXT)["answer"] == "w5"


def test_limits_of_the_options() -> None:
    """The longest stride and question that are allowed."""
    answerer = QuestionAnswerer(ByTokenId({15: 5.0}, {16: 5.0}), word_tokenizer())
    assert answerer(question=QUESTION, context=TEXT, max_length=16, doc_stride=9)["answer"] == "w5 w6"
    assert answerer(question=QUESTION, context=TEXT, max_length=7)["answer"] in ("w5", "w6")


def test_bad_models(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = ByTokenId({}, {})
    refuses(lambda: QuestionAnswerer(model), "tokenizer = None", "ByTokenId", "AutoTokenizer.from_pretrained")

    class Slow:
        is_fast = False

    refuses(lambda: QuestionAnswerer(model, Slow()), "Slow", "fast tokenizer", "AutoTokenizer")
    refuses(lambda: QuestionAnswerer(model, "folder"), "tokenizer is a str", "AutoTokenizer")
    masked = model_class("eff_longformer", "AutoModelForMaskedLM")(
        tiny_config("eff_longformer", vocab_size=len(tokenizer))
    )
    refuses(lambda: QuestionAnswerer(masked, tokenizer), "EffLongformerForMaskedLM", "no question-answering head")
    masked.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refuses(lambda: QuestionAnswerer(tmp_path), str(tmp_path), "no question-answering head", "qa_outputs", "fine-tune")


def test_no_number_and_no_token() -> None:
    answerer = QuestionAnswerer(ByTokenId({15: math.nan}, {}), word_tokenizer())
    refuses(lambda: answerer(question=QUESTION, context=TEXT), "NaN", "float32")
    window = Passage({}, np.array([1]), 0, np.array([[0, 0]]), has_null=True)
    refuses(lambda: best_answers("\x00", [window], [np.zeros((2, 2))], 1, 15, True), "no token", "'\\x00'")
    empty = Passage({}, np.array([], dtype=int), 0, np.zeros((0, 2), dtype=int), has_null=True)
    refuses(lambda: best_answers("\x00", [empty], [np.zeros((2, 2))], 1, 15, True), "no token")


def test_compiled_models_have_a_head() -> None:
    """Their own signature hides that of the model."""
    tokenizer = tiny_tokenizer()
    model = torch.compile(tiny_in_tree("Bert", tokenizer), backend="eager")
    assert QuestionAnswerer(model, tokenizer)(question="a", context="the dog")["answer"]
