"""Packed rows, over the families: a document among others is what it is alone, in results, losses and gradients."""

import copy
from typing import Any

import pytest
import torch
from helpers import DETECTOR, layers_of, model_class, randomise_, tiny_config
from packed_rows import Rows, pack_rows
from test_families import has_global_tokens, mark_global
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient_attn import ATTENTIONS
from hf_efficient_attn.auto import TEXT_FAMILIES
from hf_efficient_attn.encoder import packing


BY_TOKEN = ["AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForTokenClassification", DETECTOR]
HEADS = [(f, auto) for f, row in TEXT_FAMILIES.items() for auto in BY_TOKEN if auto in (*row.heads, DETECTOR)]
HEAD = pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{f}-{a}" for f, a in HEADS])
FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)
CAUSAL = "AutoModelForCausalLM"

# Settings with rules of their own for what stands where.
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("eff_big_bird", {"num_global_tokens": 3, "global_ends": False}),
    ("eff_big_bird", {"attention_type": "original_full"}),
    ("eff_longformer", {"global_attention": "cls", "norm_position": "pre"}),
    ("eff_longformer", {"global_attention": "question"}),
    ("eff_longformer", {"global_attention": [7, 9], "position_offset": None, "pad_token_id": 1}),
    ("eff_longformer", {"is_decoder": True, "causal_global": "prefix", "global_attention": "cls"}),
    ("eff_nystromformer", {"inv_coeff_init_option": False}),
    ("eff_reformer", {"reversible": False, "chunk_rule": "paper"}),
    ("eff_reformer", {"is_decoder": True}),
    *(("eff_electra", {"attention": x}) for x, mechanism in ATTENTIONS.items() if "grid" not in mechanism.wants),
]
NAMES = [f"{family}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for family, options in SETTINGS]
SETTING = pytest.mark.parametrize(("family", "options"), SETTINGS, ids=NAMES)


@pytest.fixture(autouse=True)
def groups_of_several_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny documents would all be in one group."""
    monkeypatch.setattr(packing, "_PADDING_ON_CPU", 40)


def build(family: str, auto: str, **options: Any) -> PreTrainedModel:
    """A tiny model with random weights; rows are longer than its input, documents are not."""
    if auto == CAUSAL and family == "eff_longformer":
        options = {"causal_global": "prefix", **options}
    return randomise_(model_class(family, auto)(tiny_config(family, **{"max_position_embeddings": 70, **options})))


def packed(model: PreTrainedModel, marks: bool = True) -> Rows:
    """Packed rows with token types, and with `marks` a global token in each document where there are such."""
    rows = pack_rows()
    inputs = dict(rows.inputs)
    if model.config.type_vocab_size > 1:
        inputs["token_type_ids"] = inputs["input_ids"] % 2
    if marks and has_global_tokens(model):
        inputs["global_attention_mask"] = (inputs["document_ids"] == 0).long()
        for number in range(len(rows.documents)):
            mask = rows.alone(inputs, number)["global_attention_mask"]
            mask.copy_(mark_global(torch.ones_like(mask), model.config.is_decoder))
    return rows._replace(inputs=inputs)


def result_of(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The first output, `[batch, length, ...]`."""
    return model(**inputs, **options).to_tuple()[0]


def alone(rows: Rows, number: int, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """One document in a row of its own."""
    own = rows.alone(rows.inputs if tensors is None else tensors, number)
    return {name: x for name, x in own.items() if name != "document_ids"}


def assert_packed_is_alone(model: PreTrainedModel, rows: Rows, **tolerance: float) -> None:
    together = result_of(model, rows.inputs)
    for number, (row, tokens) in enumerate(rows.documents):
        own = result_of(model, alone(rows, number))
        torch.testing.assert_close(together[row, tokens], own[0], **tolerance)


CLOSE = {"rtol": 1e-5, "atol": 2e-5}
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@HEAD
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_is_alone(family: str, auto: str, backend: str) -> None:
    model = build(family, auto, attn_implementation=backend)
    rows = packed(model)
    assert rows.inputs["input_ids"].shape[1] > model.config.max_input_length
    if backend == "sdpa":
        assert_packed_is_alone(model, rows, **CLOSE)
    assert_packed_is_alone(model.double(), rows, **EXACT)


@SETTING
@torch.no_grad()
def test_packed_is_alone_whatever_the_mechanism_goes_by(family: str, options: dict[str, Any]) -> None:
    model = build(family, "AutoModel", **options)
    assert_packed_is_alone(model, packed(model, marks=False), **CLOSE)
    assert_packed_is_alone(model.double(), packed(model, marks=False), **EXACT)


def weighted(outputs: Tensor, weights: Tensor) -> Tensor:
    """A loss of tokens with weights `[batch, length]` of their own."""
    return (outputs.flatten(2) if outputs.dim() > 2 else outputs[..., None]).square().sum(-1).mul(weights).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: x.grad for name, x in model.named_parameters() if "pooler" not in name}
    model.zero_grad()
    assert not [name for name, x in found.items() if x is None], "every parameter gets a gradient"
    return found


def assert_gradients_are_alone(model: PreTrainedModel, rows: Rows, rtol: float) -> None:
    weights = torch.rand(rows.inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    weights = torch.where(rows.inputs["document_ids"] > 0, weights, 0.0)
    weighted(result_of(model, rows.inputs), weights).backward()
    ours = gradients(model)
    for number in range(len(rows.documents)):
        own = rows.alone({"weights": weights}, number)["weights"]
        weighted(result_of(model, alone(rows, number)), own).backward()
    right = gradients(model)
    # Some are 0 but for rounding: a bias of keys moves all scores of a softmax alike.
    scale = max(float(x.abs().max()) for x in right.values())
    for name, expected in right.items():
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=rtol * scale, msg=name)


@HEAD
def test_gradients_are_those_of_documents_alone(family: str, auto: str) -> None:
    model = build(family, auto).train()
    assert_gradients_are_alone(model, packed(model), 1e-5)
    assert_gradients_are_alone(model.double(), packed(model), 1e-11)


@SETTING
def test_gradients_whatever_the_mechanism_goes_by(family: str, options: dict[str, Any]) -> None:
    model = build(family, "AutoModel", **options).double().train()
    assert_gradients_are_alone(model, packed(model, marks=False), 1e-11)


@FAMILY
@pytest.mark.parametrize("padding", [0, 10**6], ids=["equal lengths", "all at once"])
def test_groups_change_nothing(family: str, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PADDING_ON_CPU", padding)
    model = build(family, "AutoModel").train()
    assert_gradients_are_alone(model, packed(model), 1e-5)
    with torch.no_grad():
        assert_packed_is_alone(model, packed(model), **CLOSE)


@HEAD
def test_losses_count_every_token_once(family: str, auto: str) -> None:
    """The mean over what is predicted, in documents alone as in rows; a first token is not predicted."""
    if auto == "AutoModel":
        pytest.skip("no loss")
    model = build(family, auto)
    rows = packed(model)
    ids, is_token = rows.inputs["input_ids"], rows.inputs["document_ids"] > 0
    classes = 64 if auto in (CAUSAL, "AutoModelForMaskedLM") else 2
    # The detector ignores padding by itself, the others by the label.
    labels = torch.where(is_token | (auto == DETECTOR), ids * 7 % classes, -100)
    together = model(**rows.inputs, labels=labels).loss
    total, count = 0.0, 0
    for number in range(len(rows.documents)):
        own = alone(rows, number, {**rows.inputs, "labels": labels})
        tokens = own["input_ids"].shape[1] - (auto == CAUSAL)
        total, count = total + model(**own).loss * tokens, count + tokens
    torch.testing.assert_close(together, total / count, rtol=1e-5, atol=1e-5)
    if model.accepts_loss_kwargs:
        counted = model(**rows.inputs, labels=labels, num_items_in_batch=3 * count).loss
        torch.testing.assert_close(counted, together / 3, rtol=1e-5, atol=1e-5)


def test_next_sentences_are_of_documents() -> None:
    model = build("eff_big_bird", "AutoModelForPreTraining")
    rows = packed(model)
    labels = torch.arange(len(rows.documents)) % 2
    outputs = model(**rows.inputs, next_sentence_label=labels)
    found = [model(**alone(rows, number)).seq_relationship_logits for number in range(len(rows.documents))]
    torch.testing.assert_close(outputs.seq_relationship_logits, torch.cat(found), **CLOSE)
    assert outputs.loss.isfinite()


@FAMILY
@torch.no_grad()
def test_states_weights_and_pooled_tokens_are_those_of_documents(family: str) -> None:
    assert_recorded(build(family, "AutoModel", attn_implementation="eager"))


@torch.no_grad()
def test_global_tokens_of_the_extended_form_come_first_in_the_weights() -> None:
    options = {"num_global_tokens": 3, "global_ends": False, "attn_implementation": "eager"}
    assert_recorded(build("eff_big_bird", "AutoModel", **options), count=3)


def assert_recorded(model: PreTrainedModel, count: int = 0) -> None:
    """Hidden states, attention weights and pooled states; `count` tokens are added to each document."""
    rows = packed(model)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    outputs = model(**rows.inputs, **wanted)
    front = count * 4  # the first row has most documents
    inside = [torch.zeros_like(x, dtype=torch.bool) for x in outputs.attentions]
    ranks = [0] * len(rows.inputs["input_ids"])
    for number, (row, tokens) in enumerate(rows.documents):
        own = model(**alone(rows, number), **wanted)
        for ours, right in zip(outputs.hidden_states, own.hidden_states, strict=True):
            torch.testing.assert_close(ours[row, tokens], right[0], **CLOSE)
        added = torch.arange(count) + ranks[row] * count
        place = torch.cat([added, front + torch.arange(tokens.start, tokens.stop)])
        ranks[row] += 1
        for ours, right, seen in zip(outputs.attentions, own.attentions, inside, strict=True):
            torch.testing.assert_close(ours[row][:, place][:, :, place], right[0], **CLOSE)
            seen[row, :, place[:, None], place] = True
        if outputs.pooler_output is not None:
            torch.testing.assert_close(outputs.pooler_output[number], own.pooler_output[0], **CLOSE)
    assert all((weights[~seen] == 0).all() for weights, seen in zip(outputs.attentions, inside, strict=True))
    if outputs.pooler_output is not None:
        assert len(outputs.pooler_output) == len(rows.documents)


@FAMILY
@pytest.mark.parametrize("reversible", [True, False])
def test_computing_again_gives_equal_gradients(family: str, reversible: bool) -> None:
    """Gradient checkpointing, and reversible layers, with dropout."""
    options: dict[str, Any] = {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.2}
    if family == "eff_reformer":
        options |= {"reversible": reversible, "num_hidden_layers": 3}
    elif reversible:
        pytest.skip("no reversible layers")
    model = build(family, "AutoModelForMaskedLM", **options).train()
    again = copy.deepcopy(model)
    # transformers renamed the switch and keeps the old name, with a warning.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(again, f"{name}_enable")()
    if reversible:
        again.base_model.encoder.reversible = False
    calls = []
    layers_of(again)[0].attention.output.dense.register_forward_hook(lambda *_: calls.append(1))
    rows, found = packed(model), []
    for each in (model, again):
        torch.manual_seed(0)
        each(**rows.inputs, labels=rows.inputs["input_ids"]).loss.backward()
        found.append(gradients(each))
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    for name, right in found[0].items():
        torch.testing.assert_close(found[1][name], right, rtol=1e-4, atol=1e-5, msg=name)


@FAMILY
def test_training_with_dropout_reaches_every_parameter(family: str) -> None:
    model = build(family, "AutoModelForMaskedLM", attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1).train()
    for marks in (True, False):
        rows = packed(model, marks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**rows.inputs, labels=rows.inputs["input_ids"]).loss
        loss.backward()
        assert all(x.isfinite().all() for x in gradients(model).values())


@FAMILY
def test_positions_and_embeddings_of_the_users_own(family: str) -> None:
    model = build(family, "AutoModel")
    rows = packed(model)
    ids = rows.inputs["input_ids"]
    inputs = {**rows.inputs, "position_ids": torch.arange(ids.numel()).view_as(ids) * 5 % 60 + 2}
    assert_packed_is_alone(model, rows._replace(inputs=inputs), **CLOSE)
    right = result_of(model, rows.inputs)
    is_token = rows.inputs["document_ids"] > 0
    embedded = model.get_input_embeddings()(rows.inputs.pop("input_ids")).detach()
    embedded = embedded.masked_fill(~is_token[..., None], torch.nan).requires_grad_()
    found = result_of(model, rows.inputs | {"inputs_embeds": embedded})
    torch.testing.assert_close(found[is_token], right[is_token], **CLOSE)
    found[is_token].sum().backward()
    assert embedded.grad.isfinite().all() and (embedded.grad[~is_token] == 0).all()
