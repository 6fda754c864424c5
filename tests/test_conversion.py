"""Conversions by the table: every row holds, for every head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_cases import CASES, EXACT, OPTIONS, SEPARATOR, padded_batch
from helpers import mask_of, random_images
from torch import Tensor
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, PreTrainedModel

from hf_efficient_attn import FAMILIES, convert
from hf_efficient_attn.conversion import CONVERSIONS, REVERSALS, render_tables
from hf_efficient_attn.conversion.table import BERT_SHAPED, OWN, SOURCES


ROOT = Path(__file__).resolve().parents[1]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits", "reconstruction")
ALLOWED = [pair for pair, row in CONVERSIONS.items() if row.verdict != "refused"]
REFUSED = [pair for pair, row in CONVERSIONS.items() if row.verdict == "refused"]
BETWEEN = [pair for pair in ALLOWED if pair[0] in BERT_SHAPED and OWN.get(pair[0]) != pair[1]]


def test_every_pair_has_a_row() -> None:
    assert set(CONVERSIONS) == {(source, to) for source in SOURCES for to in FAMILIES}
    assert set(REVERSALS) == {(family, to) for family in FAMILIES for to in OWN}
    assert {source for source, _ in ALLOWED} == set(CASES), "every source that is converted is tested"
    assert set(OPTIONS) == set(FAMILIES)
    assert {source for source, _ in REFUSED} >= {"albert", "mpnet", "deberta", "deberta-v2", "modernbert"}


def test_the_card_shows_the_table() -> None:
    card = (ROOT / "model_cards" / "CONVERSION.md").read_text(encoding="utf-8")
    assert render_tables() in card, "put the output of hf_efficient_attn.conversion.render_tables() into the card"


def assert_same(mine: Any, theirs: Any, mask: Tensor | None = None) -> None:
    """All outputs that both have, where there is text."""
    names = [name for name in OUTPUTS if mine.get(name) is not None and theirs.get(name) is not None]
    assert names
    for name in names:
        per_token = mask is not None and mine[name].shape[: mask.dim()] == mask.shape
        keep = mask.bool() if per_token else ...
        assert_close(mine[name][keep], theirs[name][keep], **CLOSE)


def assert_copied(ours: PreTrainedModel, source: PreTrainedModel) -> None:
    places = {tensor.untyped_storage().data_ptr() for tensor in source.state_dict().values()}
    shared = [name for name, x in ours.state_dict().items() if x.untyped_storage().data_ptr() in places]
    assert not shared


@pytest.mark.parametrize(("kind", "to"), BETWEEN, ids=lambda name: name)
@torch.no_grad()
def test_encoders_of_berts_shape(kind: str, to: str) -> None:
    """Equal where the mechanism is softmax, padding included; measured and said where it is not."""
    for head in CASES[kind].heads:
        source = CASES[kind].model(head).train()
        before = {name: x.clone() for name, x in source.state_dict().items()}
        conversion = convert(source, to, max_length=150, sep_token_id=SEPARATOR, **OPTIONS[to])
        ours, report = conversion.model, conversion.report
        assert source.training and all(torch.equal(x, before[name]) for name, x in source.state_dict().items())
        source.eval()
        assert_copied(ours, source)
        assert ours.config.max_input_length == 150
        assert str(report).startswith(f"{kind} ({type(source).__name__}) -> {to} ({type(ours).__name__})")
        assert "pretrain_masked_lm.py --model OUT" in report.next_steps[0]
        (long,) = report.measured
        assert long.exact_here is (to == "eff_electra")
        assert (long.hidden_states > 1e-3) is (to != "eff_electra") or head == "ForMultipleChoice"
        if report.verdict == "approximate":
            assert to == "eff_performer" and long.outputs or head in ("Model", "ForPreTraining")
            continue
        inputs = padded_batch(source, head, [EXACT, EXACT - 7, 3])
        mine, theirs = ours(**inputs), source(**inputs)
        if kind == "bert" and head == "ForPreTraining":
            logits = mine.get("logits") if to != "eff_big_bird" else mine.prediction_logits
            keep = inputs["attention_mask"].bool()
            assert_close(logits[keep], theirs.prediction_logits[keep], **CLOSE)
            if to == "eff_big_bird":
                assert_close(mine.seq_relationship_logits, theirs.seq_relationship_logits, **CLOSE)
            else:
                assert {"head.relationship.weight", "pooler.dense.weight"} <= set(report.left_out)
            continue
        assert_same(mine, theirs, inputs["attention_mask"])


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_families_of_their_own(kind: str) -> None:
    """As in the tests of parity; here through `convert`, with more positions."""
    to, case = OWN[kind], CASES[kind]
    for head in case.heads:
        source = case.model(head)
        longer = {} if kind == "vit" else {"max_length": 200}
        conversion = convert(source, to, **longer)
        assert_copied(conversion.model, source)
        assert conversion.report.verdict == "exact" and conversion.report.measured
        for found in conversion.report.measured:
            if found.exact_here:
                assert max(found.hidden_states, *found.outputs.values(), 0.0) < 1e-5
        assert kind == "big_bird" or all(found.exact_here for found in conversion.report.measured)
        if kind != "vit":
            assert conversion.model.config.max_input_length == 200
            conversion.model.base_model(torch.full((1, 200), 7))


@torch.no_grad()
def test_random_blocks_are_said_to_be_others() -> None:
    source = CASES["big_bird"].model("ForMaskedLM", max_position_embeddings=128)
    with_blocks = convert(source, "eff_big_bird", sample_length=100).report.measured[0]
    full = convert(source, "eff_big_bird", sample_length=40).report.measured[0]
    assert not with_blocks.exact_here and with_blocks.hidden_states > 1e-3
    assert full.exact_here and full.hidden_states < 1e-5
    assert source.config.attention_type == "block_sparse", "a short sample turns transformers' model dense"
    assert source.bert.attention_type == "block_sparse"


@pytest.mark.parametrize("kind", ["vit", "deit"])
@torch.no_grad()
def test_images(kind: str) -> None:
    for head in CASES[kind].heads:
        source = CASES[kind].model(head)
        ours = convert(source, "eff_vit").model
        assert_copied(ours, source)
        images = random_images(3, 16, 16)
        assert_same(ours(images), source(images))
        named = convert(source, "eff_vit", attention="longformer", attention_options={"attention_window": 4}).report
        assert set(named.new.values()) == {"copy of the local projection"} and not named.measured[0].exact_here
        assert named.measured[0].hidden_states > 1e-3 and "train_vit.py" in named.next_steps[0]
        resized = convert(source, "eff_vit", image_size=24).model
        larger = random_images(1, 24, 24)
        assert_same(resized(larger), source(larger, interpolate_pos_encoding=True))


def test_what_has_no_image_or_text_to_read() -> None:
    with pytest.raises(ValueError, match=r"max_length = 9: images have no length"):
        convert(CASES["vit"].model("Model"), "eff_vit", max_length=9)
    teacher = CASES["deit"].model("ForImageClassificationWithTeacher")
    with pytest.raises(ValueError, match=r"ForImageClassificationWithTeacher\) is none that eff_vit can take over"):
        convert(teacher, "eff_vit")


@pytest.mark.parametrize("kind", dict.fromkeys(source for source, _ in REFUSED))
def test_refused_rows_give_their_reason(kind: str, tmp_path: Any) -> None:
    """Before any weight is read: here is only a config."""
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    for source, to in REFUSED:
        if source == kind:
            with pytest.raises(ValueError) as error:
                convert(tmp_path, to)
            assert CONVERSIONS[kind, to].why.replace("`", "") in str(error.value)
    if kind == "modernbert":
        assert "attn_implementation" in str(error.value)


@torch.no_grad()
def test_longer_than_the_mechanism_reaches() -> None:
    """Two lengths in the report: equal at the short one, not at the long one."""
    source = CASES["roberta"].model("ForMaskedLM", max_position_embeddings=300)
    report = convert(source, "eff_longformer", attention_window=256).report
    short, long = report.measured
    assert (short.size, short.exact_here, long.exact_here) == ("128 tokens", True, False)
    assert max(short.hidden_states, short.outputs["logits"]) < 1e-5 < 1e-3 < long.hidden_states
    assert "with these options exact for texts of up to 129 tokens" in report.notes
    assert "at 128 tokens (exact)" in str(report) and "(approximate)" in str(report)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    source = CASES["camembert"].model("ForMaskedLM")
    ours = convert(source, "eff_longformer", attention_window=60).model
    ids = padded_batch(source, "ForMaskedLM", [EXACT])["input_ids"]
    left = torch.cat([torch.full((1, 9), 2), ids], dim=1)
    mask = mask_of([EXACT], EXACT + 9, side="left")
    assert_close(ours(left, mask).logits[:, 9:], source(ids).logits, **CLOSE)
