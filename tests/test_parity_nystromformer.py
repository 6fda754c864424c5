"""EffNystromformer against transformers' own: equal weights, equal results where transformers' are right.

Those are right without padding, at the one length `segment_means_seq_len`, a multiple of the landmarks, and with one
example at a time, for the inverse is scaled by the largest column sum of the whole batch. The form scaled per matrix is
in transformers' code, but the option that should choose it crashes; the tests set what it would have set.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import TINY, collect_warnings, mask_of, model_class, no_warnings, random_ids, randomise_
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertModel, NystromformerConfig


FAMILY = "eff_nystromformer"
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BACKENDS = ("eager", "sdpa")
LENGTH = 48


@dataclass(frozen=True)
class Head:
    """One task: its Auto class, transformers' class and its outputs."""

    auto: str
    original: str
    outputs: tuple[str, ...] = ("logits",)

    def inputs(self, batch: int = 3, length: int = LENGTH) -> dict[str, Tensor]:
        """Ids without padding, two types; three choices each for multiple choice."""
        ids = random_ids(batch, length)
        inputs = {"input_ids": ids, "token_type_ids": ids % 2}
        if self.auto == "AutoModelForMultipleChoice":
            inputs = {name: torch.stack([x, x.roll(1, 1), x.roll(2, 1)], dim=1) for name, x in inputs.items()}
        return inputs

    def labels(self, ids: Tensor) -> dict[str, Tensor]:
        """Labels for a batch of three."""
        if self.auto in ("AutoModelForMaskedLM", "AutoModelForTokenClassification"):
            classes = TINY["vocab_size"] if "Masked" in self.auto else 3
            return {"labels": (ids * 7 % classes).masked_fill(ids % 5 == 0, -100)}
        if self.auto == "AutoModelForQuestionAnswering":
            return {"start_positions": torch.tensor([3, 99, 1]), "end_positions": torch.tensor([5, 8, 2])}
        return {"labels": torch.tensor([2, 0, 1])}


HEADS = {
    head.original: head
    for head in (
        Head("AutoModel", "NystromformerModel", ("last_hidden_state",)),
        Head("AutoModelForMaskedLM", "NystromformerForMaskedLM"),
        Head("AutoModelForSequenceClassification", "NystromformerForSequenceClassification"),
        Head("AutoModelForTokenClassification", "NystromformerForTokenClassification"),
        Head("AutoModelForQuestionAnswering", "NystromformerForQuestionAnswering", ("start_logits", "end_logits")),
        Head("AutoModelForMultipleChoice", "NystromformerForMultipleChoice"),
    )
}
BASE = HEADS["NystromformerModel"]
EVERY_HEAD = pytest.mark.parametrize("head", HEADS.values(), ids=lambda head: head.original)


def original_config(head: Head, **overrides: Any) -> NystromformerConfig:
    labels = {} if "QuestionAnswering" in head.auto else {"num_labels": 3}
    options = {"num_landmarks": 8, "segment_means_seq_len": LENGTH, "conv_kernel_size": 5}
    return NystromformerConfig(**{**TINY, **labels, **options, **overrides})


def pair(head: Head, folder: Path, backend: str = "sdpa", per_matrix: bool = True, **overrides: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours loaded from what it saved."""
    original = randomise_(getattr(transformers, head.original)(original_config(head, **overrides)))
    original.save_pretrained(folder)
    options = {"inv_coeff_init_option": True} if per_matrix else {}
    if per_matrix:
        for layer in original.base_model.encoder.layer:
            layer.attention.self.init_option = "exact"
    return original, model_class(FAMILY, head.auto).from_pretrained(folder, attn_implementation=backend, **options)


def assert_same(head: Head, ours: Any, original: Any) -> None:
    for name in head.outputs:
        assert_close(ours[name], original[name], **CLOSE)


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_equal(head: Head, backend: str, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, backend)
    inputs = head.inputs()
    with torch.no_grad():
        theirs = original(**inputs, output_hidden_states=True)
        mine = ours(**inputs, output_hidden_states=True)
    assert_same(head, mine, theirs)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 3
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b, **CLOSE)


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_as_it_is_gives_what_one_example_gave(head: Head, backend: str, tmp_path: Path) -> None:
    """transformers' default scale is the batch's largest: of one example it is ours, and there are no batch mates."""
    original, ours = pair(head, tmp_path, backend, per_matrix=False)
    assert ours.config.inv_coeff_init_option is False
    inputs = head.inputs()
    with torch.no_grad():
        batched = ours(**inputs)
        for row in range(3):
            one = {name: x[row : row + 1] for name, x in inputs.items()}
            if head.auto == "AutoModelForMultipleChoice":
                one = {name: x[:, :1] for name, x in one.items()}
            theirs = original(**one)
            assert_same(head, ours(**one), theirs)
            for name in head.outputs:
                mine = batched[name][row : row + 1]
                assert_close(mine[:, :1] if "Choice" in head.auto else mine, theirs[name], **CLOSE)


@pytest.mark.parametrize("landmarks", [1, 2, 4, 16, 24, 48])
@pytest.mark.parametrize("kernel", [1, 33, 65])
def test_other_options(landmarks: int, kernel: int, tmp_path: Path) -> None:
    """With as many landmarks as tokens both are softmax attention."""
    original, ours = pair(BASE, tmp_path, num_landmarks=landmarks, conv_kernel_size=kernel)
    assert ours.config.num_landmarks == landmarks and ours.config.conv_kernel_size == kernel
    with torch.no_grad():
        assert_same(BASE, ours(**BASE.inputs()), original(**BASE.inputs()))


@pytest.mark.parametrize("length", [1, 7, 30, 64])
def test_texts_no_longer_than_the_landmarks(length: int, tmp_path: Path) -> None:
    """transformers' default, 64 landmarks for 64 tokens, is softmax attention: at these lengths ours is, too."""
    with collect_warnings() as warned:
        original, ours = pair(BASE, tmp_path, per_matrix=False, num_landmarks=64, segment_means_seq_len=64)
    assert len([line for line in warned if "segment_means_seq_len and num_landmarks are both 64" in line]) == 1
    with torch.no_grad():
        assert_same(BASE, ours(**BASE.inputs(length=length)), original(**BASE.inputs(length=length)))


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients_are_equal(head: Head, backend: str, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, backend)
    original.train(), ours.train()
    inputs = head.inputs()
    labels = {} if head is BASE else head.labels(inputs["input_ids"])
    outputs = [model(**inputs, **labels) for model in (original, ours)]
    losses = [x.last_hidden_state.square().mean() + x[0].sin().mean() if head is BASE else x.loss for x in outputs]
    assert_close(losses[1], losses[0], **CLOSE)
    for loss in losses:
        loss.backward()
    theirs, mine = (dict(model.named_parameters()) for model in (original, ours))
    assert theirs.keys() == mine.keys()
    for name, parameter in mine.items():
        assert_close(parameter.grad, theirs[name].grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("length", [9, 47, 49, 100])
def test_lengths_at_which_transformers_crashes(length: int, tmp_path: Path) -> None:
    original, ours = pair(BASE, tmp_path)
    inputs = BASE.inputs(length=length)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            original(**inputs)
        assert ours(**inputs).last_hidden_state.isfinite().all()


@EVERY_HEAD
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_which_transformers_crashes(head: Head, side: str, tmp_path: Path) -> None:
    """And what it computes for the texts alone, where it can, is what ours computes for the padded batch."""
    original, ours = pair(head, tmp_path)
    inputs = head.inputs()
    mask = mask_of([LENGTH, LENGTH, LENGTH - 20], LENGTH + 10, side)
    padded = {}
    for name, x in inputs.items():
        room = (0, 10) if side == "right" else (10, 0)
        padded[name] = torch.nn.functional.pad(x, room, value=1)
    padded["attention_mask"] = mask[:, None].expand_as(padded["input_ids"]) if x.dim() == 3 else mask
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            original(**padded)
        theirs, mine = original(**inputs), ours(**padded)
    for name in head.outputs:
        for row in range(2):
            found = mine[name][row]
            per_token = found.shape[0] == LENGTH + 10
            assert_close(found[mask[row].bool()] if per_token else found, theirs[name][row], **CLOSE)
        assert mine[name][2].isfinite().all()


@EVERY_HEAD
def test_loading_is_silent_and_complete(head: Head, tmp_path: Path) -> None:
    original = randomise_(getattr(transformers, head.original)(original_config(head)))
    original.save_pretrained(tmp_path)
    with no_warnings():
        ours, info = model_class(FAMILY, head.auto).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_other_heads_and_types_still_warn(tmp_path: Path) -> None:
    base, bert = tmp_path / "base", tmp_path / "bert"
    transformers.NystromformerModel(original_config(BASE)).save_pretrained(base)
    with collect_warnings() as found:
        model_class(FAMILY, "AutoModelForTokenClassification").from_pretrained(base)
    assert any("classifier" in text for text in found), found
    BertModel(BertConfig(**TINY)).save_pretrained(bert)
    with collect_warnings() as found:
        model_class(FAMILY, "AutoModel").from_pretrained(bert)
    assert any("type `bert`" in text or "type bert" in text for text in found), found


@EVERY_HEAD
def test_saved_as_our_own_type(head: Head, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path / "original")
    ours.save_pretrained(tmp_path / "ours")
    with no_warnings():
        again, info = type(ours).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.model_type == FAMILY and again.config.architectures == [type(ours).__name__]
    # The reserved rows are counted once.
    assert again.config.max_position_embeddings == TINY["max_position_embeddings"] + 2
    assert not hasattr(again.config, "segment_means_seq_len")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with torch.no_grad():
        assert_same(head, again(**head.inputs()), original(**head.inputs()))


def test_defaults_are_the_published_ones() -> None:
    ours, theirs = model_class(FAMILY, "AutoModel").config_class(), NystromformerConfig()
    assert ours.max_position_embeddings == theirs.max_position_embeddings + 2
    different = {"max_position_embeddings", "inv_coeff_init_option", "segment_means_seq_len", "transformers_version"}
    for name in set(theirs.to_dict()) - different - {"model_type"}:
        assert getattr(ours, name) == getattr(theirs, name), name


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(head: Head, backend: str, tmp_path: Path) -> None:
    original, _ = pair(head, tmp_path, backend)
    cls = model_class(FAMILY, head.auto)
    ours = cls.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=backend, inv_coeff_init_option=True)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        mine, theirs = ours(**head.inputs()), original(**head.inputs())
    for name in head.outputs:
        assert mine[name].dtype == torch.bfloat16
        # Eight bits of mantissa, a dozen roundings.
        assert (mine[name].float() - theirs[name]).abs().max() < 0.03 + 0.06 * theirs[name].abs().max()
