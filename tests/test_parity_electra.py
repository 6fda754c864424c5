"""EffElectra against transformers' ELECTRA: equal weights, equal results; and every mechanism in its place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import DETECTOR, TINY, mask_of, model_class, no_warnings, random_ids, randomise_, tiny_config
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForPreTraining, ElectraConfig

from hf_efficient_attn import ATTENTIONS, EffElectraConfig


FAMILY = "eff_electra"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BACKENDS = ("eager", "sdpa")
LENGTHS = [13, 9, 11]


@dataclass(frozen=True)
class Head:
    """One task: its Auto class, transformers' class and its outputs, True where they have one row a token."""

    auto: str
    original: str
    outputs: dict[str, bool]

    def inputs(self) -> dict[str, Tensor]:
        """Three examples of different length, padded on the right, with token types."""
        mask = mask_of(LENGTHS, max(LENGTHS))
        ids = random_ids(3, max(LENGTHS)).masked_fill(mask == 0, 0)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}
        if self.auto == "AutoModelForMultipleChoice":
            inputs = {name: torch.stack([x, x.roll(1, 0), x.roll(2, 0)], dim=1) for name, x in inputs.items()}
        return inputs

    def labels(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Labels for these inputs."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if self.auto == DETECTOR:
            return {"labels": ids % 2}  # in padding too, where it does not count
        if self.auto in ("AutoModelForMaskedLM", "AutoModelForTokenClassification"):
            classes = TINY["vocab_size"] if "Masked" in self.auto else 3
            return {"labels": (ids * 7 % classes).masked_fill(mask == 0, -100)}
        if self.auto == "AutoModelForQuestionAnswering":
            return {"start_positions": torch.tensor([3, 8, 1]), "end_positions": torch.tensor([5, 8, 2])}
        return {"labels": torch.tensor([2, 0, 1])}


HEADS = (
    Head("AutoModel", "ElectraModel", {"last_hidden_state": True}),
    Head(DETECTOR, "ElectraForPreTraining", {"logits": True}),
    Head("AutoModelForMaskedLM", "ElectraForMaskedLM", {"logits": True}),
    Head("AutoModelForSequenceClassification", "ElectraForSequenceClassification", {"logits": False}),
    Head("AutoModelForTokenClassification", "ElectraForTokenClassification", {"logits": True}),
    Head("AutoModelForQuestionAnswering", "ElectraForQuestionAnswering", {"start_logits": True, "end_logits": True}),
    Head("AutoModelForMultipleChoice", "ElectraForMultipleChoice", {"logits": False}),
)
EVERY_HEAD = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.original)


def original_model(head: Head, **overrides: Any) -> Any:
    labels = {} if "QuestionAnswering" in head.auto else {"num_labels": 3}
    config = ElectraConfig(**{**TINY, **labels, "embedding_size": 24, "summary_last_dropout": 0.0, **overrides})
    return randomise_(getattr(transformers, head.original)(config))


def pair(head: Head, folder: Path, backend: str = "sdpa", **overrides: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours loaded from what it saved."""
    original = original_model(head, **overrides)
    original.save_pretrained(folder)
    with no_warnings():
        ours = model_class(FAMILY, head.auto).from_pretrained(folder, attn_implementation=backend)
    return original, ours.eval()


def assert_same(head: Head, ours: Any, original: Any, mask: Tensor) -> None:
    """Padding has results of no meaning; answers in it are ruled out here."""
    for name, per_token in head.outputs.items():
        keep = mask.bool() if per_token else slice(None)
        assert_close(ours[name][keep], original[name][keep], **CLOSE)


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_equal(head: Head, backend: str, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path, backend)
    inputs = head.inputs()
    with torch.no_grad():
        theirs = original(**inputs, output_hidden_states=True)
        mine = ours(**inputs, output_hidden_states=True)
    assert_same(head, mine, theirs, inputs["attention_mask"])
    keep = inputs["attention_mask"].flatten(0, -2).bool()
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a[keep], b[keep], **CLOSE)


@EVERY_HEAD
def test_losses_and_gradients_are_equal(head: Head, tmp_path: Path) -> None:
    original, ours = pair(head, tmp_path)
    original.train(), ours.train()
    inputs = head.inputs()
    if "QuestionAnswering" in head.auto:
        # transformers' lets answers stand in padding.
        inputs = {name: x[:, :9] for name, x in inputs.items()}
    labels = {} if head.auto == "AutoModel" else head.labels(inputs)
    keep = inputs["attention_mask"][..., None].bool()
    losses = []
    for model in (original, ours):
        outputs = model(**inputs, **labels)
        losses.append(outputs.loss if labels else (outputs.last_hidden_state * keep).square().sum())
        losses[-1].backward()
    assert_close(losses[1], losses[0], **CLOSE)
    theirs = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


@EVERY_HEAD
@pytest.mark.parametrize("overrides", [{"embedding_size": 32}, {"hidden_act": "relu"}, {"tie_word_embeddings": False}])
def test_other_options(head: Head, overrides: dict[str, Any], tmp_path: Path) -> None:
    """Without a projection of the embeddings, another activation, an output projection of its own."""
    original, ours = pair(head, tmp_path, **overrides)
    inputs = head.inputs()
    with torch.no_grad():
        assert_same(head, ours(**inputs), original(**inputs), inputs["attention_mask"])


@pytest.mark.parametrize("overrides", [{"summary_use_proj": False}, {"summary_activation": ""}])
def test_options_of_the_summary(overrides: dict[str, Any], tmp_path: Path) -> None:
    head = HEADS[-1]
    original, ours = pair(head, tmp_path, **overrides)
    with torch.no_grad():
        assert_same(head, ours(**head.inputs()), original(**head.inputs()), head.inputs()["attention_mask"])


@EVERY_HEAD
def test_what_ours_saves_loads_in_transformers(head: Head, tmp_path: Path) -> None:
    """The same names on disk: no weight is missing there, none is too many."""
    options = {"embedding_size": 24, **({} if "QuestionAnswering" in head.auto else {"num_labels": 3})}
    ours = randomise_(model_class(FAMILY, head.auto)(tiny_config(FAMILY, **options)))
    ours.save_pretrained(tmp_path)
    config = ElectraConfig.from_pretrained(tmp_path)
    loaded, report = getattr(transformers, head.original).from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    inputs = head.inputs()
    with torch.no_grad():
        assert_same(head, ours(**inputs), loaded.eval()(**inputs), inputs["attention_mask"])


def test_the_auto_class_for_pretraining_is_the_discriminator(tmp_path: Path) -> None:
    model_class(FAMILY, DETECTOR)(tiny_config(FAMILY)).save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is model_class(FAMILY, DETECTOR)


OPTIONS = {
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "local": {"local_attn_chunk_length": 4, "local_num_chunks_after": 1},
    "longformer": {"attention_window": [4, 8]},
    "lsh": {"lsh_attn_chunk_length": 4, "num_hashes": 2, "hash_seed": 3},
    "nystromformer": {"num_landmarks": 4, "conv_kernel_size": 3},
    "performer": {"num_features": 16, "projection_seed": 5},
    "softmax": {},
}


@pytest.mark.parametrize("name", [name for name, mechanism in ATTENTIONS.items() if "grid" not in mechanism.wants])
def test_every_mechanism_by_name(name: str, tmp_path: Path) -> None:
    """Options arrive, survive a folder, padding never matters, every parameter learns."""
    config = tiny_config(FAMILY, attention=name, attention_options=OPTIONS[name])
    model = randomise_(model_class(FAMILY, DETECTOR)(config))
    for attention in model.electra.encoder.attentions():
        assert type(attention) is ATTENTIONS[name]
        assert all(getattr(attention.options, key) == value for key, value in OPTIONS[name].items())
    inputs = HEADS[1].inputs()
    keep = inputs["attention_mask"].bool()
    logits = model(**inputs).logits
    for row, length in enumerate(LENGTHS):
        alone = model(**{key: x[row : row + 1, :length] for key, x in inputs.items()}).logits
        assert_close(logits[row, keep[row]], alone[0], **CLOSE)
    model.save_pretrained(tmp_path)
    again = model_class(FAMILY, DETECTOR).from_pretrained(tmp_path).eval()
    assert_close(again(**inputs).logits, logits, atol=1e-6, rtol=0)
    model.train()(**inputs, labels=inputs["input_ids"] % 2).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_options_make_a_difference() -> None:
    """Equal weights with other options are another function, but for a window that sees the whole text."""
    ids, cls = random_ids(1, 40), model_class(FAMILY, "AutoModel")
    softmax = randomise_(cls(tiny_config(FAMILY)))
    states = {}
    for width in (4, 80):
        options = {"attention": "longformer", "attention_options": {"attention_window": width}}
        model = cls(tiny_config(FAMILY, **options)).eval()
        assert not model.load_state_dict(softmax.state_dict(), strict=False).unexpected_keys
        states[width] = model(ids).last_hidden_state
    assert_close(states[80], softmax(ids).last_hidden_state, **CLOSE)
    assert (states[4] - states[80]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "performr"}, r"attention = 'performr': choose one of .* Did you mean 'performer'\?"),
        ({"attention_options": {"num_landmarks": 4}}, "no option of 'softmax': it has none"),
        (
            {"attention": "nystromformer", "attention_options": {"num_landmark": 4}},
            r"no option of 'nystromformer': it has num_landmarks.* Did you mean 'num_landmarks'\?",
        ),
        ({"attention": "longformer", "attention_options": {"attention_window": 3}}, "use 4"),
        ({"attention": "longformer", "attention_options": {"attention_window": [4]}}, "1 entries for 12 layers"),
        ({"attention": "lsh", "attention_options": {"num_hashes": 0}}, "give 1 round or more"),
        ({"attention": "neighborhood"}, "needs tokens in rows and columns.* choose 'longformer'"),
        ({"summary_type": "mean"}, "summary_type = 'mean': .* choose 'first'"),
        ({"summary_last_dropout": 2.0}, "lies between 0 and 1"),
        ({"is_decoder": True}, "has no causal form"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EffElectraConfig(**options)
