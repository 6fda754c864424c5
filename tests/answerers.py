"""What the tests of question answering share: tokenizers, a model whose logits are given, every span tried."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from hf_efficient_attn import FAMILIES


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
