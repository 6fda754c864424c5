"""Answers to questions from contexts of any length, with any extractive question-answering model."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .answer_spans import Passage, best_answers
from .modes import eval_mode


class QuestionAnswerer:
    """Finds answers in contexts, as the `question-answering` pipeline of transformers 4 did.

    Args:
        model: a folder or name on the Hub, or a model of any `...ForQuestionAnswering` class. A model keeps its device
            and its train or eval mode.
        tokenizer: its fast tokenizer; by default the one of the folder. A call leaves its settings as they are.
        device: where to move the model; by default it stays where it is.

    ```python
    >>> answerer = QuestionAnswerer("folder-or-hub-name")
    >>> answerer(question="Who wrote it?", context="It was written by Ada.")
    {'answer': 'Ada', 'score': 0.97, 'start': 18, 'end': 21, 'no_answer_score': 0.01}
    ```

    A context longer than the model is read in overlapping windows, each with the whole question before it. With start
    logits `s` and end logits `e`, an answer from token `i` to token `j` of one window has the score

        p_start(i) p_end(j),  p_start(i) = exp(s_i) / sum_c exp(s_c),  p_end(j) = exp(e_j) / sum_c exp(e_c),

    with `c` over all tokens of the whole context, each by its highest logit in the windows that see it, and the first
    token of the input (CLS), which stands for "no answer", once: in the window where its `s + e` is lowest, because a
    window without the answer says nothing about the others. `no_answer_score` is p_start p_end of that token (0 where
    the tokenizer puts no special token first). So scores of different windows compare, and one window gives the score
    of transformers 4. Source: BERT (Devlin, Chang, Lee & Toutanova 2018, arXiv 1810.04805, sections 4.2 and 4.3) and
    its `run_squad.py`.

    Models with global tokens get a `global_attention_mask` of the tokens up to the end of the question, unless
    `config.global_attention` names another rule.

    Raises:
        ValueError: a tokenizer that is missing or slow, or a model or folder without a question-answering head.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | int | torch.device | None = None,
    ) -> None:
        if isinstance(model, str | os.PathLike):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = _load(model)
        if tokenizer is None:
            raise ValueError(
                f"tokenizer = None: a {type(model).__name__} does not bring its own; give the tokenizer it was trained "
                "with, such as AutoTokenizer.from_pretrained(folder)."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}, not a fast tokenizer, and only those tell where a token "
                "stands in the text; give one, such as AutoTokenizer.from_pretrained(folder)."
            )
        # A compiled model has the signature of the model in it.
        self._arguments = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
        if "start_positions" not in self._arguments:
            raise ValueError(
                f"{type(model).__name__} has no question-answering head (start_logits and end_logits); load the "
                "checkpoint with AutoModelForQuestionAnswering or another ...ForQuestionAnswering class."
            )
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer

    def __call__(
        self,
        question: str | list[str],
        context: str | list[str],
        *,
        top_k: int = 1,
        max_length: int | None = None,
        doc_stride: int | None = None,
        max_answer_length: int = 15,
        allow_no_answer: bool = False,
        batch_size: int = 8,
    ) -> dict[str, Any] | list[Any]:
        """Answer one question, or many.

        Args:
            question: a text, or a list of texts.
            context: a text, or a list of texts. Two lists are pairs; a text beside a list goes with each of it.
            top_k: how many answers. Above 1 there is a list of different spans, best first, or fewer if there are
                fewer.
            max_length: tokens of one window, question and special tokens included; None is what model and tokenizer
                can take.
            doc_stride: tokens that neighbouring windows share; None is 128, or half a window's room for the context if
                that is less.
            max_answer_length: tokens of the longest answer.
            allow_no_answer: whether "no answer", `""` with start and end 0, competes with the spans.
            batch_size: windows that go through the model at once; it changes no result.

        Returns:
            For two texts a dict (a list of them if `top_k` > 1), else a list with one such result a pair:
            `answer`, always `context[start:end]`, without whitespace around it; `score`, a probability; `start` and
            `end` in characters; `no_answer_score`, the probability of no answer.

        Raises:
            ValueError: texts that are empty or no texts, lists of different lengths, a question that leaves no room for
                the context, an option out of its range.
        """
        _check_counts(top_k=top_k, max_answer_length=max_answer_length, batch_size=batch_size)
        pairs = _pairs(question, context)
        windows = [self._windows(*pair, max_length, doc_stride) for pair in pairs]
        logits = iter(self._logits([window for some in windows for window in some], batch_size))
        results: list[Any] = []
        for (_, text), some in zip(pairs, windows, strict=True):
            answers = best_answers(text, some, [next(logits) for _ in some], top_k, max_answer_length, allow_no_answer)
            results.append(answers if top_k > 1 else answers[0])
        return results[0] if isinstance(question, str) and isinstance(context, str) else results

    def _windows(self, question: str, context: str, max_length: int | None, doc_stride: int | None) -> list[Passage]:
        limit = _max_input_length(self.model)
        if max_length is None:
            max_length = min(limit, self.tokenizer.model_max_length)
        _check_counts(max_length=max_length)
        if max_length > limit:
            raise ValueError(f"max_length = {max_length}: this model takes {limit} tokens; give at most so many.")
        with _own_settings(self.tokenizer):
            length = len(self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
            special = self.tokenizer.num_special_tokens_to_add(pair=True)
            room = max_length - length - special
            if room < 1:
                raise ValueError(
                    f"the question has {length} tokens, which with {special} special tokens leave no room for the "
                    f"context in a window of max_length = {max_length}; shorten {question[:40]!r} or raise max_length."
                )
            stride = min(128, room // 2) if doc_stride is None else doc_stride
            if isinstance(stride, bool) or not isinstance(stride, int) or not 0 <= stride < room:
                raise ValueError(
                    f"doc_stride = {stride!r}: windows have room for {room} tokens of the context (max_length = "
                    f"{max_length}) and must share fewer; give a number from 0 to {room - 1}, or raise max_length."
                )
            encoded = self.tokenizer(
                question,
                context,
                truncation="only_second",
                max_length=max_length,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
        step = room - stride
        return [self._window(encoded, number, number * step) for number in range(len(encoded["input_ids"]))]

    def _window(self, encoded: BatchEncoding, number: int, first: int) -> Passage:
        texts = np.array([-1 if text is None else text for text in encoded.sequence_ids(number)])
        inputs = {"input_ids": encoded["input_ids"][number], "attention_mask": [1] * len(texts)}
        if "token_type_ids" in encoded:
            inputs["token_type_ids"] = encoded["token_type_ids"][number]
        config = self.model.config
        # Passed even where the model has the same rule: a separator within the question does not end it.
        if getattr(config, "global_attention", 0) is None or getattr(config, "model_type", None) == "longformer":
            inputs["global_attention_mask"] = np.logical_or.accumulate((texts == 0)[::-1])[::-1].astype(int).tolist()
        inputs = {name: values for name, values in inputs.items() if name in self._arguments}
        at = np.flatnonzero(texts == 1)
        offsets = np.array(encoded["offset_mapping"][number]).reshape(-1, 2)[at]
        return Passage(inputs, at, first, offsets, has_null=bool(texts[0] == -1))

    def _logits(self, windows: list[Passage], batch_size: int) -> list[np.ndarray]:
        """Start and end logits of each window, `[2, length]` float64."""
        device = next(self.model.parameters()).device
        # Padding is always on the right, where it moves no position in any model.
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        result: list[np.ndarray] = []
        with eval_mode(self.model), torch.no_grad():
            for begin in range(0, len(windows), batch_size):
                rows = [window.inputs for window in windows[begin : begin + batch_size]]
                batch = {}
                for name in rows[0]:
                    tensors = [torch.tensor(row[name]) for row in rows]
                    batch[name] = nn.utils.rnn.pad_sequence(tensors, True, fill.get(name, 0)).to(device)
                output = self.model(**batch, return_dict=True)
                both = torch.stack([output.start_logits, output.end_logits], dim=1).cpu().double().numpy()
                result += [logits[:, : len(row["input_ids"])] for logits, row in zip(both, rows, strict=True)]
        return result


def _load(folder: str | os.PathLike[str]) -> PreTrainedModel:
    model, info = AutoModelForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise ValueError(
            f"{str(folder)!r} has no question-answering head ({', '.join(missing)} missing), so its answers would be "
            f"random; fine-tune {type(model).__name__} first, or name a checkpoint that was."
        )
    return model


def _max_input_length(model: PreTrainedModel) -> int:
    """Tokens the model takes, as far as its config tells."""
    length = getattr(model.config, "max_input_length", None)
    if length is None:
        rows = length = getattr(model.config, "max_position_embeddings", None)
        for name, module in model.named_modules():
            # As in RoBERTa: positions begin after the padding's row.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                length = rows - module.padding_idx - 1
    return length if length is not None and length > 0 else 2**31 - 1


def _check_counts(**options: Any) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} = {value!r}: give a whole number of 1 or more.")


def _pairs(question: str | list[str], context: str | list[str]) -> list[tuple[str, str]]:
    for name, given in (("question", question), ("context", context)):
        texts = given if isinstance(given, list | tuple) else [given]
        for index, text in enumerate(texts):
            where = name if texts is not given else f"{name}[{index}]"
            if not isinstance(text, str):
                raise ValueError(f"{where} is a {type(text).__name__}; give a str, or for {name} a list of them.")
            if not text.strip():
                raise ValueError(f"{where} = {text!r} is empty; give a text with words.")
    if isinstance(question, str):
        return [(question, text) for text in ([context] if isinstance(context, str) else context)]
    if isinstance(context, str):
        return [(text, context) for text in question]
    if len(question) != len(context):
        raise ValueError(
            f"question has {len(question)} texts and context {len(context)}; two lists are pairs: give as many of "
            "each, or one text instead of a list."
        )
    return list(zip(question, context, strict=True))


@contextmanager
def _own_settings(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Whatever `tokenizer` is set to is so again afterwards; meanwhile it truncates on the right."""
    backend, side = tokenizer.backend_tokenizer, tokenizer.truncation_side
    truncation, padding, special = backend.truncation, backend.padding, backend.encode_special_tokens
    tokenizer.truncation_side = "right"
    try:
        yield
    finally:
        tokenizer.truncation_side, backend.encode_special_tokens = side, special
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
