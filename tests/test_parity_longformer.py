"""EffLongformer against transformers' own Longformer: equal weights, equal results where transformers' are right."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import TINY, collect_warnings, mask_of, model_class, no_warnings, random_ids, randomise_
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertModel, LongformerConfig


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BACKENDS = ("eager", "sdpa")
IDLE = ("query_global", "key_global", "value_global")


@dataclass(frozen=True)
class Head:
    """One task: its Auto class, transformers' class, its outputs (True: one row a token) and labels for a batch."""

    auto: str
    original: str
    outputs: dict[str, bool]

    def labels(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Labels for `inputs`, -100 at padding; none for the bare model."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.auto in ("AutoModelForMaskedLM", "AutoModelForTokenClassification"):
            classes = TINY["vocab_size"] if "Masked" in self.auto else 3
            return {"labels": (ids * 7 % classes).masked_fill(mask == 0, -100)}
        if self.auto == "AutoModelForQuestionAnswering":
            return {"start_positions": torch.tensor([3, 99, 1]), "end_positions": torch.tensor([5, 8, 2])}
        return {"labels": torch.tensor([2, 0, 1])}


HEADS = {
    head.original: head
    for head in (
        Head("AutoModel", "LongformerModel", {"last_hidden_state": True, "pooler_output": False}),
        Head("AutoModelForMaskedLM", "LongformerForMaskedLM", {"logits": True}),
        Head("AutoModelForSequenceClassification", "LongformerForSequenceClassification", {"logits": False}),
        Head("AutoModelForTokenClassification", "LongformerForTokenClassification", {"logits": True}),
        Head(
            "AutoModelForQuestionAnswering",
            "LongformerForQuestionAnswering",
            {"start_logits": True, "end_logits": True},
        ),
        Head("AutoModelForMultipleChoice", "LongformerForMultipleChoice", {"logits": False}),
    )
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=lambda head: head.original)


def original_config(head: Head, **overrides: Any) -> LongformerConfig:
    labels = {} if "QuestionAnswering" in head.auto else {"num_labels": 3}
    return LongformerConfig(**{**TINY, **labels, "attention_window": [8, 4], **overrides})


def pair(head: Head, folder: Path, backend: str = "sdpa", **overrides: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours loaded from what it saved."""
    original = randomise_(getattr(transformers, head.original)(original_config(head, **overrides)))
    original.save_pretrained(folder)
    cls = model_class("eff_longformer", head.auto)
    return original, cls.from_pretrained(folder, attn_implementation=backend)


def batch_for(head: Head, questions: list[int], lengths: list[int]) -> dict[str, Tensor]:
    """`<s> question </s></s> text </s> <pad>...`, one example a length; three choices each for multiple choice."""
    length = max(lengths)
    mask = mask_of(lengths, length)
    ids = random_ids(len(lengths), length)
    for row, (question, end) in enumerate(zip(questions, lengths, strict=True)):
        ids[row, 0] = 0
        ids[row, [1 + question, 2 + question, end - 1]] = 2
    inputs = {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}
    if head.auto == "AutoModelForMultipleChoice":
        inputs = {name: torch.stack([x, x.roll(1, 0), x.roll(2, 0)], dim=1) for name, x in inputs.items()}
    return inputs


def several_global(mask: Tensor) -> Tensor:
    """A global mask with a different number of tokens in each example, none in one."""
    flat = mask.reshape(-1, mask.shape[-1])
    chosen = torch.zeros_like(flat)
    for row in range(flat.shape[0]):
        chosen[row, [[0, 4, 9], [], [2, 3, 4, 10, 12]][row % 3]] = 1
    return chosen.reshape(mask.shape) * mask


def assert_same(head: Head, ours: Any, original: Any, mask: Tensor) -> None:
    """Every output of `head` is equal, at valid tokens where it has a row a token."""
    for name, by_token in head.outputs.items():
        mine, theirs = ours[name], original[name]
        assert mine.shape == theirs.shape
        keep = mask.bool() if by_token else slice(None)
        assert_close(mine[keep], theirs[keep], **CLOSE)


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_equal(head: Head, backend: str, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, backend)
    inputs = batch_for(head, [3, 1, 6], [21, 13, 17])
    for extra in ({}, {"global_attention_mask": several_global(inputs["attention_mask"])}):
        with torch.no_grad():
            assert_same(head, ours(**inputs, **extra), original(**inputs, **extra), inputs["attention_mask"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [8, 6, [4, 12], [16, 8]])
@pytest.mark.parametrize("length", [1, 2, 8, 31, 75])
def test_any_length_and_window(length: int, window: int | list[int], backend: str, tmp_path: Path) -> None:
    head = HEADS["LongformerModel"]
    original, ours = pair(head, tmp_path, backend, attention_window=window)
    ids = random_ids(3, length)
    mask = torch.ones_like(ids)
    chosen = torch.zeros_like(ids)
    chosen[0, [0, length // 2]] = 1
    chosen[2, length - 1] = 1
    for extra in ({}, {"global_attention_mask": chosen}, {"token_type_ids": ids % 2}):
        with torch.no_grad():
            theirs = original(ids, attention_mask=mask, output_hidden_states=True, **extra)
            mine = ours(ids, attention_mask=mask, output_hidden_states=True, **extra)
        assert_same(head, mine, theirs, mask)
        assert len(mine.hidden_states) == len(theirs.hidden_states) == 3
        for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
            assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["LongformerModel", "LongformerForMaskedLM", "LongformerForTokenClassification"])
def test_left_padding(name: str, backend: str, tmp_path: Path) -> None:
    """transformers needs explicit positions for it, and takes the pooled state from the wrong place; ours does not."""
    original, ours = pair(HEADS[name], tmp_path, backend)
    lengths, length = [21, 13, 17], 21
    mask = mask_of(lengths, length, side="left")
    ids = torch.where(mask == 1, random_ids(3, length), 1)
    positions = torch.where(mask == 1, mask.cumsum(1) + 1, 1)
    chosen = mask * (mask.cumsum(1) % 7 == 2)
    output = next(iter(HEADS[name].outputs))
    for extra in ({}, {"global_attention_mask": chosen}):
        with torch.no_grad():
            theirs = original(ids, attention_mask=mask, position_ids=positions, **extra)[output]
            assert_close(ours(ids, attention_mask=mask, **extra)[output][mask.bool()], theirs[mask.bool()], **CLOSE)


def test_default_global_tokens_matter(tmp_path: Path) -> None:
    """Parity of the defaults would prove nothing if global tokens did not change the result."""
    for name in (
        "LongformerForSequenceClassification",
        "LongformerForQuestionAnswering",
        "LongformerForMultipleChoice",
    ):
        head = HEADS[name]
        _, ours = pair(head, tmp_path / name)
        inputs = batch_for(head, [3, 1, 6], [21, 13, 17])
        output = next(iter(head.outputs))
        with torch.no_grad():
            default = ours(**inputs)[output]
            local = ours(**inputs, global_attention_mask=torch.zeros_like(inputs["attention_mask"]))[output]
        assert (default - local).abs().max() > 1e-2


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_global", [False, True])
def test_losses_and_gradients_are_equal(head: Head, backend: str, with_global: bool, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, backend)
    original.train(), ours.train()
    # The question-answering loss of transformers also runs over the padding, whose states are arbitrary.
    lengths = [21, 21, 21] if "QuestionAnswering" in head.auto else [21, 13, 17]
    inputs = batch_for(head, [3, 1, 6], lengths)
    mask = inputs["attention_mask"]
    if with_global:
        inputs["global_attention_mask"] = several_global(mask)
    outputs = [
        model(**inputs, **({} if head.auto == "AutoModel" else head.labels(inputs))) for model in (original, ours)
    ]
    if head.auto == "AutoModel":
        weight = torch.randn(3, 21, 32, generator=torch.Generator().manual_seed(1)) * mask[..., None]
        losses = [(x.last_hidden_state * weight).mean() + x.pooler_output.square().mean() for x in outputs]
    else:
        losses = [x.loss for x in outputs]
    assert_close(losses[1], losses[0], **CLOSE)
    for loss in losses:
        loss.backward()
    theirs, mine = (dict(model.named_parameters()) for model in (original, ours))
    assert theirs.keys() == mine.keys()
    idle = [name for name, parameter in theirs.items() if parameter.grad is None]
    uses_global = with_global or head.original.endswith(
        ("SequenceClassification", "QuestionAnswering", "MultipleChoice")
    )
    assert bool(idle) is not uses_global and all(name.split(".")[-2] in IDLE for name in idle)
    for name, parameter in mine.items():
        assert parameter.grad is not None, name
        expected = torch.zeros_like(parameter) if name in idle else theirs[name].grad
        exact = {"atol": 0.0, "rtol": 0.0} if name in idle else CLOSE
        assert_close(parameter.grad, expected, **exact, msg=lambda text, name=name: f"{name}: {text}")


SEQUENCE_LABELS = {
    "single_label_classification": (3, torch.tensor([2, 0, 1])),
    "multi_label_classification": (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
    "regression of one": (1, torch.tensor([0.5, -1.0, 2.0])),
    "regression of several": (3, torch.tensor([[0.5, -1.0, 2.0], [0, 1, 2], [3, 1, 1]])),
}


@pytest.mark.parametrize("kind", SEQUENCE_LABELS)
def test_sequence_classification_losses(kind: str, tmp_path: Path) -> None:
    head = HEADS["LongformerForSequenceClassification"]
    num_labels, labels = SEQUENCE_LABELS[kind]
    # With several targets regression has to be named, the rest both guess from the labels.
    problem = "regression" if kind == "regression of several" else None
    original, ours = pair(head, tmp_path, num_labels=num_labels, problem_type=problem)
    inputs = batch_for(head, [3, 1, 6], [21, 13, 17])
    with torch.no_grad():
        assert_close(ours(**inputs, labels=labels).loss, original(**inputs, labels=labels).loss, **CLOSE)
    assert original.config.problem_type == kind.split(" ")[0]
    assert ours.config.problem_type == problem, "the loss has written the config"


@EVERY_HEAD
def test_loading_is_silent_and_complete(head: Head, tmp_path: Path) -> None:
    original = randomise_(getattr(transformers, head.original)(original_config(head)))
    original.save_pretrained(tmp_path)
    cls = model_class("eff_longformer", head.auto)
    with no_warnings():
        ours, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_other_heads_and_types_still_warn(tmp_path: Path) -> None:
    base, bert = tmp_path / "base", tmp_path / "bert"
    head = HEADS["LongformerModel"]
    transformers.LongformerModel(original_config(head)).save_pretrained(base)
    with collect_warnings() as found:
        model_class("eff_longformer", "AutoModelForTokenClassification").from_pretrained(base)
    assert any("classifier" in text for text in found), found
    BertModel(BertConfig(**TINY)).save_pretrained(bert)
    with collect_warnings() as found:
        model_class("eff_longformer", "AutoModel").from_pretrained(bert)
    assert any("type `bert`" in text or "type bert" in text for text in found), found


@EVERY_HEAD
def test_saved_as_our_own_type(head: Head, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path / "original")
    ours.save_pretrained(tmp_path / "ours")
    cls = type(ours)
    with no_warnings():
        again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.model_type == "eff_longformer" and again.config.architectures == [cls.__name__]
    assert again.config.attention_window == [8, 4]
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    inputs = batch_for(head, [3, 1, 6], [21, 13, 17])
    with torch.no_grad():
        assert_same(head, again(**inputs), original(**inputs), inputs["attention_mask"])


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(head: Head, backend: str, tmp_path: Path) -> None:
    original, _ = pair(head, tmp_path, backend)
    cls = model_class("eff_longformer", head.auto)
    ours = cls.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=backend)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.bfloat16}
    inputs = batch_for(head, [3, 1, 6], [21, 13, 17])
    with torch.no_grad():
        mine, theirs = ours(**inputs), original(**inputs)
    for name, by_token in head.outputs.items():
        keep = inputs["attention_mask"].bool() if by_token else slice(None)
        assert mine[name].dtype == torch.bfloat16
        scale = theirs[name][keep].abs().max()
        # Eight bits of mantissa, a dozen roundings.
        assert (mine[name][keep].float() - theirs[name][keep]).abs().max() < 0.02 + 0.05 * scale


def test_config_is_not_mutated(tmp_path: Path) -> None:
    """transformers' model turns the window into a list in its config; ours leaves what the user wrote."""
    head = HEADS["LongformerForMaskedLM"]
    config = original_config(head, attention_window=8)
    config.save_pretrained(tmp_path)
    transformers.LongformerForMaskedLM(config)
    assert config.attention_window == [8, 8]
    cls = model_class("eff_longformer", head.auto)
    ours = cls.config_class.from_pretrained(tmp_path)
    before = ours.to_dict()
    model = cls(ours)
    model(**batch_for(head, [3, 1], [13, 9]))
    assert ours.attention_window == model.config.attention_window == 8
    before["architectures"] = ours.architectures  # written by transformers itself
    after = ours.to_dict()
    assert {k: v for k, v in after.items() if k != "dtype"} == {k: v for k, v in before.items() if k != "dtype"}


def test_forward_leaves_inputs_and_random_state_alone(tmp_path: Path) -> None:
    head = HEADS["LongformerForQuestionAnswering"]
    _, ours = pair(head, tmp_path)
    inputs = {**batch_for(head, [3, 1, 6], [21, 13, 17])}
    inputs["global_attention_mask"] = several_global(inputs["attention_mask"])
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    weights = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    state = torch.get_rng_state()
    ours(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in inputs.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.state_dict().items())
