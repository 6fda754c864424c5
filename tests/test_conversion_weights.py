"""Conversions: tables of positions, what new weights start as, and heads."""

from typing import Any

import pytest
import torch
from conversion_cases import CASES, SEPARATOR
from helpers import random_ids
from torch import Tensor
from torch.testing import assert_close

from hf_efficient_attn import convert
from hf_efficient_attn.conversion import build
from hf_efficient_attn.conversion.configs import bert_shaped_config
from hf_efficient_attn.conversion.positions import resize_table


@pytest.fixture
def table() -> Tensor:
    """Two rows in front and ten positions."""
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def test_tiles(table: Tensor) -> None:
    tiled = resize_table(table, 25, how="tile", reserved=2)
    assert tiled.shape == (27, 4)
    for row in range(25):
        assert torch.equal(tiled[2 + row], table[2 + row % 10])
    assert torch.equal(tiled[:2], table[:2])


def test_interpolation(table: Tensor) -> None:
    spread = resize_table(table, 19, how="interpolate", reserved=2)
    # Old positions are every second new one, the others lie between.
    assert_close(spread[2::2], table[2:])
    assert_close(spread[3::2], (table[2:-1] + table[3:]) / 2)
    assert torch.equal(spread[:2], table[:2])
    assert resize_table(table.bfloat16(), 19, how="interpolate").dtype == torch.bfloat16


def test_new_rows(table: Tensor) -> None:
    state = torch.get_rng_state()
    drawn = [resize_table(table, 4000, how="init", reserved=2, std=0.5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0][:12], table) and torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert 0.48 < drawn[0][12:].std() < 0.52 and drawn[0][12:].mean().abs() < 0.02


@pytest.mark.parametrize("how", ["tile", "interpolate", "init"])
def test_fewer_rows_are_a_copy(how: str, table: Tensor) -> None:
    cut = resize_table(table, 3, how=how, reserved=2)
    assert torch.equal(cut, table[:5]) and cut.data_ptr() != table.data_ptr()


@pytest.mark.parametrize("kind", ["bert", "roberta", "reformer"])
def test_positions_in_a_model(kind: str) -> None:
    """RoBERTa's reserved rows stay in front; Reformer's grid grows along its rows."""
    source = CASES[kind].model("ForMaskedLM")
    to = "eff_reformer" if kind == "reformer" else "eff_longformer"
    found = {}
    for how in ("tile", "interpolate", "init"):
        conversion = convert(source, to, max_length=300, positions=how, seed=3)
        found[how] = conversion.model.base_model.embeddings.position_embeddings
        assert f"-> 300 tokens ({how})" in str(conversion.report)
        exact = [measured.exact_here for measured in conversion.report.measured]
        assert (how == "interpolate" and not any(exact)) or (how != "interpolate" and any(exact)) or kind != "reformer"
    if kind == "reformer":
        old = source.reformer.embeddings.position_embeddings.weights
        assert found["tile"].weights[0].shape[:2] == (19, 1)
        assert torch.equal(found["tile"].weights[0][8:16], old[0]) and torch.equal(found["init"].weights[1], old[1])
        return
    first = 2 if kind == "roberta" else 0
    old = source.base_model.embeddings.position_embeddings.weight
    rows = len(old) - first
    tiled = found["tile"].weight
    assert len(tiled) == first + 300
    assert torch.equal(tiled[: len(old)], old) and torch.equal(tiled[len(old) : len(old) + rows], old[first:])
    assert torch.equal(found["init"].weight[: len(old)], old)
    assert torch.equal(found["interpolate"].weight[[*range(first + 1), -1]], old[[*range(first + 1), -1]])


@torch.no_grad()
def test_a_shorter_model_is_exact() -> None:
    source = CASES["roberta"].model("ForMaskedLM")
    conversion = convert(source, "eff_electra", max_length=30)
    assert conversion.model.config.max_input_length == 30
    ids = random_ids(2, 30)
    assert_close(conversion.model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="31 tokens, more than the 30"):
        conversion.model(random_ids(1, 31))


# Family and options -> (part of a weight's name, how the report says it starts).
NEW: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "global": ("eff_longformer", {}, "_global.", "copy of the local projection"),
    "convolution": ("eff_nystromformer", {}, ".conv.", "zeros, so that nothing is added"),
    "projection": ("eff_performer", {"projection_seed": 5}, ".projection", "drawn from projection_seed"),
    "tokens": ("eff_big_bird", {"num_global_tokens": 4}, "global_embeddings", "new and random: train on"),
    "named": ("eff_electra", {"attention": "longformer"}, "_global.", "copy of the local projection"),
}


@pytest.mark.parametrize("case", NEW)
def test_new_weights(case: str) -> None:
    to, options, part, how = NEW[case]
    source = CASES["bert"].model("ForMaskedLM")
    conversion = convert(source, to, **options)
    state, report = conversion.model.state_dict(), conversion.report
    assert set(report.new.values()) == {how} and how in str(report)
    assert set(report.new) == {name for name in state if part in name}
    for name in report.new:
        if part == "_global.":
            local = name.replace("_global", "")
            assert torch.equal(state[name], state[local])
            assert state[name].data_ptr() != state[local].data_ptr()
        elif part == ".conv.":
            assert not state[name].any()
        elif part == ".projection":
            layer = conversion.model.bert.encoder.layer[int(name.split(".")[3])].attention.self
            assert_close(state[name], layer.drawn_projection().float())


def test_no_convolution_needs_no_weight() -> None:
    report = convert(CASES["bert"].model("ForMaskedLM"), "eff_nystromformer", conv_kernel_size=None).report
    assert report.new == {}


def test_a_pooler_that_the_source_has_not() -> None:
    conversion = convert(CASES["distilbert"].model("Model"), "eff_longformer")
    assert (
        torch.equal(conversion.model.pooler.dense.weight, torch.eye(32))
        and not conversion.model.pooler.dense.bias.any()
    )
    assert len(conversion.report.new) == 2 + 12


def test_mechanisms_without_the_sources_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing for .*query_key.*the source has what is not read: .*self\.query\."):
        convert(CASES["bert"].model("ForMaskedLM"), "eff_electra", attention="lsh")
    with pytest.raises(ValueError, match="needs tokens in rows and columns"):
        convert(CASES["bert"].model("ForMaskedLM"), "eff_electra", attention="neighborhood")


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("longformer", {"attention_window": 80}),
        ("nystromformer", {"num_landmarks": 40}),
        ("big_bird", {"block_size": 16}),
        ("local", {"local_attn_chunk_length": 20}),
        ("softmax", None),
    ],
)
@torch.no_grad()
def test_exact_with_a_named_mechanism(attention: str, options: dict[str, Any] | None) -> None:
    """As far as the table says of the mechanism's own family."""
    source = CASES["electra"].model("ForPreTraining")
    conversion = convert(source, "eff_electra", attention=attention, attention_options=options, sample_length=40)
    (found,) = conversion.report.measured
    assert found.exact_here and max(found.hidden_states, *found.outputs.values()) < 1e-5
    if attention != "softmax":
        longer = convert(source, "eff_electra", attention=attention, attention_options=options, sample_length=70)
        reaches = attention == "big_bird"  # all blocks of so short a text
        assert longer.report.measured[0].exact_here is reaches
        assert (longer.report.measured[0].hidden_states < 1e-5) is reaches


@torch.no_grad()
def test_an_own_output_projection() -> None:
    """A head that is not tied to the embeddings stays so."""
    for kind in ("bert", "roberta", "distilbert", "electra"):
        source = CASES[kind].model("ForMaskedLM", tie_word_embeddings=False)
        for to in ("eff_longformer", "eff_big_bird", "eff_electra"):
            ours = convert(source, to, sep_token_id=SEPARATOR).model
            ids = random_ids(1, 20)
            assert not ours.config.tie_word_embeddings
            assert_close(ours(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)


def test_dropout_and_labels_follow_the_source() -> None:
    source = CASES["distilbert"].model("ForSequenceClassification", seq_classif_dropout=0.4, dropout=0.3)
    source.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    ours = convert(source, "eff_nystromformer").model
    assert (ours.classifier.dropout.p, ours.config.hidden_dropout_prob) == (0.4, 0.3)
    assert ours.config.id2label == {0: "bad", 1: "fair", 2: "good"} and ours.config.head_act == "relu"
    performer = convert(CASES["bert"].model("Model", attention_probs_dropout_prob=0.2), "eff_performer").model
    assert performer.config.attention_probs_dropout_prob == 0.0


def test_a_wrong_conversion_would_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are compared where they are promised to be equal."""
    source = CASES["bert"].model("ForMaskedLM")
    monkeypatch.setattr(build, "bert_shaped_config", lambda *x: _with(bert_shaped_config(*x), layer_norm_eps=0.5))
    with pytest.raises(ValueError, match=r"differs by .* at 70 tokens, where it should be exact. Nothing was written"):
        convert(source, "eff_electra")


def _with(config: Any, **fields: Any) -> Any:
    for name, value in fields.items():
        setattr(config, name, value)
    return config
