"""How packed rows come apart into documents, and where they are refused."""

from typing import Any

import pytest
import torch
from electra_cases import joint_model
from helpers import model_class, random_ids, randomise_, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import pack_rows
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient_attn.auto import TEXT_FAMILIES
from hf_efficient_attn.encoder import packing
from hf_efficient_attn.encoder.packing import find_documents


FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)
CAUSAL = [name for name, row in TEXT_FAMILIES.items() if "AutoModelForCausalLM" in row.heads]


def build(family: str, auto: str = "AutoModel", **options: Any) -> PreTrainedModel:
    return randomise_(model_class(family, auto)(tiny_config(family, **options)))


@given(st.lists(st.lists(st.integers(-4, 9).filter(bool), max_size=6), min_size=1, max_size=4), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_rows_come_apart_and_together_again(layout: list[list[int]], allowed: int) -> None:
    rows = pack_rows([[*row, -1] for row in layout] + [[2]])
    ids = rows.inputs["document_ids"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_PADDING_ON_CPU", allowed)
        documents = find_documents(ids, None, tuple(ids.shape), 9)
    states = torch.randn(*ids.shape, 3)
    seen = []

    def attention(own: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        lengths = [own.shape[1]] * len(own) if mask is None else mask.sum(dim=1).tolist()
        seen.extend(own[number, :length] for number, length in enumerate(lengths))
        assert own.shape[1] == max(lengths) and (mask is None) == (min(lengths) == max(lengths))
        assert sum(max(lengths) - length for length in lengths) <= allowed
        return own * 2, None

    found, _ = documents.attend(attention, states)
    assert torch.equal(found, torch.where(ids[..., None] > 0, states * 2, 0.0))
    right = [states[row, tokens] for row, tokens in rows.documents]
    assert sorted(x.tolist() for x in seen) == sorted(x.tolist() for x in right)
    first = torch.stack([states[row, tokens.start] for row, tokens in rows.documents])
    assert torch.equal(documents.first_states(states), first)


IDS = torch.tensor([[1, 1, 1, 2, 2, 0]])

# What is given -> the rule and the fix that the error names.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"document_ids": IDS[:, :5]}, r"document_ids must be \[batch, length\] = \[1, 6\], got shape \[1, 5\]"),
    "floats": ({"document_ids": IDS.float()}, "torch.float32; .*give integers"),
    "masks": ({"document_ids": IDS.bool()}, "torch.bool; .*give integers"),
    "negative": ({"document_ids": -IDS}, "contains -2; give 0 at padding and positive numbers"),
    "nothing": ({"document_ids": IDS * 0}, "no document, only padding"),
    "in parts": ({"document_ids": torch.tensor([[1, 1, 2, 2, 1, 0]])}, "document 1 of row 0 stands in 2 places.*Give"),
    "around padding": ({"document_ids": torch.tensor([[1, 1, 0, 2, 0, 1]])}, "document 1 of row 0 stands in 2 places"),
    "mask": (
        {"document_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        "attention_mask is 1 and document_ids 0 at token 5 of row 0.*Leave attention_mask out",
    ),
    "additive mask": (
        {"document_ids": IDS, "attention_mask": (IDS > 0) * -9},
        "attention_mask contains -9, but it marks tokens with 1",
    ),
    "mask of another shape": (
        {"document_ids": IDS, "attention_mask": torch.ones(1, 5)},
        r"attention_mask must be .* = \[1, 6\]",
    ),
}


@FAMILY
@pytest.mark.parametrize("case", WRONG)
def test_wrong_ids_are_refused(family: str, case: str) -> None:
    given_, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        build(family)(torch.full((1, 6), 7), **given_)


@FAMILY
def test_a_document_is_no_longer_than_the_input(family: str) -> None:
    model = build(family, max_position_embeddings=32)
    limit = model.config.max_input_length
    ids = random_ids(2, 3 * limit)
    document_ids = torch.arange(3 * limit).expand(2, -1) // limit + 1
    assert model(ids, document_ids=document_ids).last_hidden_state.isfinite().all()
    longer = document_ids.clone()
    longer[1, limit] = 1
    with pytest.raises(
        ValueError, match=f"document 1 of row 1 has {limit + 1} tokens, more than the {limit} .*max_length"
    ):
        model(ids, document_ids=longer)


@FAMILY
@pytest.mark.parametrize(
    ("auto", "reason"),
    [
        ("AutoModelForSequenceClassification", "one result a row"),
        ("AutoModelForQuestionAnswering", "one answer a row"),
        ("AutoModelForMultipleChoice", "a row of its own"),
    ],
)
def test_heads_with_one_result_a_row_refuse_documents(family: str, auto: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"got document_ids.*{reason}.*give each document a row of its own"):
        build(family, auto)(torch.full((1, 6), 7), document_ids=IDS)


@FAMILY
def test_global_tokens_are_checked_as_they_were_given(family: str) -> None:
    model = build(family)
    message = "has no global tokens"
    if hasattr(model.config, "global_attention"):
        message = r"global_attention_mask must be .* = \[1, 6\].*got shape \[1, 5\]"
    with pytest.raises(ValueError, match=message):
        shape = (1, 5) if hasattr(model.config, "global_attention") else (1, 6)
        model(torch.full((1, 6), 7), document_ids=IDS, global_attention_mask=torch.zeros(shape))


@pytest.mark.parametrize("family", CAUSAL)
def test_a_cache_and_generation_are_refused(family: str) -> None:
    model = build(family, "AutoModelForCausalLM")
    ids = torch.full((1, 6), 7)
    assert model(ids, document_ids=IDS).past_key_values is None
    assert model(ids).past_key_values is not None
    with pytest.raises(ValueError, match="document_ids and use_cache = True"):
        model(ids, document_ids=IDS, use_cache=True)
    with pytest.raises(ValueError, match="document_ids and past_key_values"):
        model(ids, document_ids=IDS, past_key_values=model.make_cache())
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"generate\(\) got document_ids.*a row of its own"):
            model.generate(ids, document_ids=IDS, max_new_tokens=3, use_cache=use_cache)


def test_encoders_refuse_a_cache_as_ever() -> None:
    with pytest.raises(ValueError, match="it is an encoder"):
        build("eff_electra")(torch.full((1, 6), 7), document_ids=IDS, past_key_values=object())


@FAMILY
def test_without_values_and_while_exporting_documents_are_refused(family: str) -> None:
    model = build(family)
    with pytest.raises(ValueError, match="while compiling or exporting, or without values"):
        model.to("meta")(IDS.to("meta"), document_ids=IDS.to("meta"))


class Positional(torch.nn.Module):
    """`document_ids` as a second argument, for torch.export."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, document_ids: Tensor) -> Tensor:
        return self.model(ids, document_ids=document_ids).last_hidden_state


def test_one_graph_of_packed_rows_is_refused() -> None:
    model = Positional(build("eff_longformer"))
    for make in (
        lambda: torch.export.export(model, (IDS, IDS)),
        lambda: torch.compile(model, fullgraph=True)(IDS, IDS),
    ):
        with pytest.raises(Exception, match="while compiling or exporting"):
            make()


def test_compiled_in_parts_packed_rows_are_the_same() -> None:
    model = build("eff_longformer", num_hidden_layers=1, attention_window=8)
    rows = pack_rows([[20, 9], [3, 25]])
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        ours, right = compiled(**rows.inputs), model(**rows.inputs)
    torch.testing.assert_close(ours.last_hidden_state, right.last_hidden_state, rtol=1e-5, atol=1e-5)


# Joint pretraining.


def test_joint_pretraining_reads_packed_rows() -> None:
    model = joint_model("eff_longformer")
    rows = pack_rows()
    found = model(**rows.inputs).discriminator_logits
    for number, (row, tokens) in enumerate(rows.documents):
        own = model(rows.alone(rows.inputs, number)["input_ids"]).discriminator_logits
        torch.testing.assert_close(found[row, tokens], own[0], rtol=1e-5, atol=2e-5)
    ids, document_ids = rows.inputs["input_ids"], rows.inputs["document_ids"]
    masked = (ids % 3 == 0) & (document_ids > 0)
    batch = {"input_ids": ids.masked_fill(masked, 4), "labels": ids.masked_fill(~masked, -100)}
    outputs = model(**batch, document_ids=document_ids)
    assert (outputs.is_replaced[document_ids == 0] == -100).all()
    total = 0.0
    for number in range(len(rows.documents)):
        own = rows.alone(batch, number)
        count = (own["labels"] != -100).sum()
        total += model(**own).generator_loss * count if count > 0 else 0.0
    torch.testing.assert_close(outputs.generator_loss, total / masked.sum(), rtol=1e-5, atol=1e-5)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_joint_pretraining_refuses_what_its_encoders_do_not_take() -> None:
    ids = random_ids(1, 6)
    with pytest.raises(ValueError, match="takes no document_ids; leave it out, or choose another encoder"):
        joint_model("bert")(ids, document_ids=IDS)
    with pytest.raises(ValueError, match=r"document_ids must be .* = \[1, 6\]"):
        joint_model()(ids, document_ids=IDS[:, :5])
    with pytest.raises(ValueError, match="Leave attention_mask out"):
        joint_model()(ids, attention_mask=torch.ones_like(IDS), document_ids=IDS)
