"""The loss of language models without logits of all tokens: equal to the loss with them, in less memory."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import model_class, random_ids, tiny_config
from packed_rows import pack_rows
from test_families import batch_of, build
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_efficient_attn import EffBigBirdForPreTraining, EffLongformerForMaskedLM
from hf_efficient_attn.auto import TEXT_FAMILIES
from hf_efficient_attn.encoder import losses


MASKED, CAUSAL = "AutoModelForMaskedLM", "AutoModelForCausalLM"
ROWS = [(family, auto) for family, row in TEXT_FAMILIES.items() for auto in (MASKED, CAUSAL) if auto in row.heads]
EVERY = pytest.mark.parametrize(("family", "auto"), ROWS, ids=[f"{f}-{a}" for f, a in ROWS])
VOCABULARY = 64


def labelled(model: PreTrainedModel, auto: str, batch: int = 3, length: int = 41, every: int = 3) -> dict[str, Tensor]:
    """A padded batch with a label at one token of `every`; the last row has none."""
    inputs = batch_of(model, auto, batch, length)
    inputs["attention_mask"][0, -7:] = 0
    if "global_attention_mask" in inputs:
        inputs["global_attention_mask"] *= inputs["attention_mask"]
    away = (torch.arange(length) % every != every // 2).expand(batch, -1) | (inputs["attention_mask"] == 0)
    inputs["labels"] = inputs["input_ids"].masked_fill(away, -100)
    inputs["labels"][-1] = -100
    return inputs


def step(model: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: object) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad()
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


def assert_equal_steps(model: PreTrainedModel, inputs: dict[str, Tensor], atol: float = 1e-6, **kwargs: object) -> None:
    loss, gradients = step(model, inputs, **kwargs)
    ours, found = step(model, inputs, skip_logits=True, **kwargs)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=atol)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.fixture(params=["at once", "in chunks", "one by one"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Logits of all labelled tokens at once, of five at a time, and of one."""
    size = {"at once": losses.LOGITS_AT_ONCE, "in chunks": 5 * VOCABULARY, "one by one": 1}[request.param]
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", size)
    return request.param


@EVERY
def test_loss_and_gradients_are_equal(family: str, auto: str, chunks: str) -> None:
    model = build(family, auto).train()
    inputs = labelled(model, auto)
    assert_equal_steps(model, inputs)
    assert_equal_steps(model, inputs, num_items_in_batch=torch.tensor(50))
    assert_equal_steps(model, {**inputs, "labels": inputs["input_ids"]})
    states = model(**inputs, skip_logits=True, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1


@EVERY
def test_a_batch_without_labels_has_a_gradient_of_zeros(family: str, auto: str) -> None:
    """As a rank of several may have; DDP waits for every parameter."""
    model = build(family, auto).train()
    inputs = labelled(model, auto)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, gradients = step(model, inputs, skip_logits=True)
    assert loss == 0 and all(bool((gradient == 0).all()) for gradient in gradients.values())
    assert_equal_steps(model, inputs)


class Largest(TorchDispatchMode):
    """The largest tensor that an operation makes, in numbers, and whether one has logits of `rows` tokens or more."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.largest, self.rows = vocabulary, 0, 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                    self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@EVERY
def test_no_tensor_is_as_large_as_all_logits(family: str, auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in causal models with a label at every token; none is kept for the backward pass."""
    length, vocabulary, rows = 256, 4096, 16
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", rows * vocabulary)
    model = build(family, auto, max_position_embeddings=300, vocab_size=vocabulary).train()
    inputs = labelled(model, auto, 2, length, every=1 if auto == CAUSAL else 7)
    found = {}
    for skip in (True, False):
        kept = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with Largest(vocabulary) as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(**inputs, skip_logits=skip).loss.backward()
        weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
        logits = [x for x in kept if x.dim() > 1 and x.shape[-1] == vocabulary]
        logits = [x for x in logits if x.untyped_storage().data_ptr() not in weights]
        found[skip] = (seen.rows, seen.largest, [tuple(x.shape) for x in logits])
    # The weights of the head and their gradients are as wide.
    assert found[True][0] <= max(rows, model.get_output_embeddings().in_features)
    assert found[True][1] <= length * vocabulary / 2
    assert found[True][2] == []
    assert found[False][0] == 2 * length and found[False][1] == 2 * length * vocabulary and found[False][2]


@EVERY
def test_the_config_says_it_for_training(family: str, auto: str) -> None:
    model = build(family, auto, skip_logits=True)
    inputs = labelled(model, auto)
    plain = {name: x for name, x in inputs.items() if name != "labels"}
    width = (3, 41, VOCABULARY)
    with torch.no_grad():
        right = model(**inputs)
        assert right.logits.shape == width and model(**plain).logits.shape == width
        assert model(**inputs, skip_logits=True).logits is None
        model.train()
        trained = model(**inputs)
        assert trained.logits is None and trained.loss == pytest.approx(right.loss.item(), abs=1e-6)
        assert model(**plain).logits.shape == width, "without labels there is nothing else to give"
        assert model(**inputs, skip_logits=False).logits.shape == width
        assert len(model(**inputs, return_dict=False)) == 1
        with pytest.raises(ValueError, match="skip_logits = True without labels"):
            model(**plain, skip_logits=True)
    assert not tiny_config(family).skip_logits


def test_it_can_be_said_when_loading(tmp_path: Path) -> None:
    build("eff_longformer", MASKED).save_pretrained(tmp_path)
    model = EffLongformerForMaskedLM.from_pretrained(tmp_path, skip_logits=True).train()
    assert model(**labelled(model, MASKED)).logits is None


@EVERY
def test_wrong_labels_are_said_as_with_logits(family: str, auto: str) -> None:
    model = build(family, auto).train()
    inputs = labelled(model, auto)
    for wrong in (inputs["labels"][:, :-2], inputs["labels"] + VOCABULARY + 200, inputs["labels"].float()):
        for skip in (True, False):
            with pytest.raises(ValueError, match="labels"):
                model(**{**inputs, "labels": wrong}, skip_logits=skip)


def test_next_sentences_keep_their_logits(chunks: str) -> None:
    model = EffBigBirdForPreTraining(tiny_config("eff_big_bird", skip_logits=True)).train()
    inputs = labelled(model, MASKED)
    inputs["next_sentence_label"] = torch.tensor([0, 1, 1])
    assert_equal_steps(model, inputs)
    outputs = model(**inputs)
    assert outputs.prediction_logits is None and outputs.seq_relationship_logits.shape == (3, 2)
    del inputs["labels"]
    assert model(**inputs).prediction_logits.shape == (3, 41, VOCABULARY)


@EVERY
def test_packed_rows(family: str, auto: str, chunks: str) -> None:
    model = build(family, auto, **({"causal_global": None} if family == "eff_longformer" else {})).train()
    inputs = dict(pack_rows().inputs)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["document_ids"] == 0, -100)
    assert_equal_steps(model, inputs)


@EVERY
def test_resized_and_tied(family: str, auto: str, chunks: str) -> None:
    model = build(family, auto).train()
    model.resize_token_embeddings(81)
    inputs = labelled(model, auto)
    inputs["labels"][0, 1], inputs["labels"][0, 4] = 80, 64
    assert_equal_steps(model, inputs)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(family: str, auto: str, dtype: torch.dtype, chunks: str) -> None:
    """The sum is float32 whatever the logits are; they are rounded as with all logits."""
    model = build(family, auto).train()
    inputs = labelled(model, auto)
    with torch.autocast("cpu", dtype):
        loss, ours = model(**inputs).loss, model(**inputs, skip_logits=True).loss
    assert ours.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(ours, loss, rtol=1e-3, atol=1e-3)
    gradients = torch.autograd.grad(ours, list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_compiled_with_dynamic_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for lengths within as many chunks, whatever the number of labels."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 50 * VOCABULARY)
    torch._dynamo.reset()
    weight = torch.randn(8, VOCABULARY, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def loss_of(states: Tensor, labels: Tensor) -> Tensor:
        return losses.token_loss_in_chunks(lambda x: x @ weight, states, labels, VOCABULARY)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length, every in ((2, 20, 3), (2, 24, 5), (2, 41, 3), (3, 41, 3), (3, 49, 2), (3, 49, 100)):
        states = torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length))
        labels = random_ids(batch, length).masked_fill(torch.arange(length) % every != 1, -100)
        found = []
        for function in (lambda *x: losses.token_loss(x[0] @ weight, x[1]), loss_of, compiled):
            loss = function(states, labels)
            found.append((loss.detach(), *torch.autograd.grad(loss, weight)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("auto", [MASKED, CAUSAL])
def test_a_compiled_model(auto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 50 * VOCABULARY)
    torch._dynamo.reset()
    model = build("eff_performer", auto, num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = labelled(model, auto)
    loss, gradients = step(model, inputs)
    ours, found = step(compiled, inputs, skip_logits=True)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_layers_may_be_computed_again_too(chunks: str) -> None:
    model = build("eff_longformer", MASKED, hidden_dropout_prob=0.2).train()
    other = copy.deepcopy(model)
    name = "activation_checkpointing" if hasattr(other, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(other, f"{name}_enable")()
    inputs = labelled(model, MASKED)
    found = []
    for each in (model, other):
        torch.manual_seed(0)
        found.append(step(each, inputs, skip_logits=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_dropout_in_the_head_is_drawn_once(chunks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As adapters put it there: the backward pass is of what the loss is of, and not of another draw."""
    model = build("eff_performer", MASKED).train()
    model.cls.predictions.transform.dense = nn.Sequential(model.cls.predictions.transform.dense, nn.Dropout(0.5))
    inputs = labelled(model, MASKED)
    found = []
    for remembers in (False, True):
        if remembers:
            monkeypatch.setattr(losses, "checkpoint", lambda function, *args, **_: function(*args))
        torch.manual_seed(1)
        found.append(step(model, inputs, skip_logits=True))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_trainer_learns_and_evaluates_the_same(label_smoothing: float, tmp_path: Path) -> None:
    """Accumulation over uneven labels; metrics read logits, and smoothing does in training too."""
    ids = random_ids(24, 20)
    place = torch.arange(20)
    rows = [
        {"input_ids": x, "labels": x.masked_fill(place % (2 + number % 5) != 1, -100)} for number, x in enumerate(ids)
    ]
    found = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = model_class("eff_nystromformer", MASKED)(tiny_config("eff_nystromformer", skip_logits=skip))
        shapes: list[tuple[int, ...]] = []

        def metrics(prediction: object, shapes: list[tuple[int, ...]] = shapes) -> dict[str, float]:
            shapes.append(np.shape(prediction.predictions))
            return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            adam_epsilon=1e-3,
            label_smoothing_factor=label_smoothing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
        trainer.train()
        figures = trainer.evaluate()
        assert shapes == [(24, 20, VOCABULARY)]
        losses_seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append(([*losses_seen, figures["eval_loss"], figures["eval_accuracy"]], model.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
