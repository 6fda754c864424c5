"""QuestionAnswerer with the models of every family and of transformers, and what it refuses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from answerers import (
    BPE_TEXT,
    QA,
    QUESTION,
    TEXT,
    WITH_QA,
    ByTokenId,
    word_tokenizer,
)
from helpers import collect_warnings, model_class, no_warnings, randomise_, tiny_config, tiny_tokenizer

from hf_efficient_attn import QuestionAnswerer
from hf_efficient_attn.answer_spans import Passage, best_answers


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
