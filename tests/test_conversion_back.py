"""The way back: models of ours in transformers' classes, and what those cannot hold."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conversion_cases import HEADS, IMAGE_HEADS, SEPARATOR
from helpers import mask_of, model_class, no_warnings, random_ids, random_images, randomise_, tiny_config
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_efficient_attn import FAMILIES, convert
from hf_efficient_attn.conversion import REVERSALS
from hf_efficient_attn.conversion.reverse import RULES
from hf_efficient_attn.conversion.table import OWN


CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Nyström's landmarks round more.
LOOSE = {"atol": 1e-4, "rtol": 1e-4}
ALLOWED = {to: family for (family, to), row in REVERSALS.items() if row.verdict != "refused"}
OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits", "reconstruction")

# What a tiny config of ours needs so that transformers' class can hold it.
HELD: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full", "sep_token_id": SEPARATOR},
    "electra": {"embedding_size": 24},
    "longformer": {"pad_token_id": 1},
    "nystromformer": {"inv_coeff_init_option": False, "pad_token_id": 1},
    "reformer": {"attn_layers": ["local"], "attention_head_size": 6},
    "vit": {"image_size": 16},
}
EXTRA_HEADS = {
    "electra": ("ForPreTraining",),
    "big_bird": ("ForPreTraining",),
    "reformer": ("ForCausalLM",),
}
WITHOUT = {"reformer": ("ForTokenClassification", "ForMultipleChoice")}


def our_model(to: str, head: str, **fields: Any) -> PreTrainedModel:
    """A tiny model with random weights of the family that goes back to `to`."""
    family = FAMILIES[ALLOWED[to]]
    options = {} if "Question" in head else {"num_labels": 3}
    options |= {"is_decoder": True} if head == "ForCausalLM" else {}
    config = tiny_config(ALLOWED[to], **{**HELD[to], **options, **fields})
    return randomise_(getattr(family.module("modeling"), f"Eff{family.name}{head}")(config))


def heads_of(to: str) -> tuple[str, ...]:
    heads = IMAGE_HEADS if to == "vit" else HEADS + EXTRA_HEADS.get(to, ())
    return tuple(head for head in heads if head not in WITHOUT.get(to, ()))


def compare(ours: PreTrainedModel, back: PreTrainedModel, to: str, head: str) -> None:
    """On what transformers' class handles."""
    close = LOOSE if to == "nystromformer" else CLOSE
    keep: Any = ...
    if to == "vit":
        inputs = {"pixel_values": random_images(2, 16, 16)}
    elif to in ("nystromformer", "reformer"):
        inputs = {"input_ids": random_ids(1, 48)}
    else:
        mask = mask_of([40, 33], 40)
        inputs = {"input_ids": random_ids(2, 40).masked_fill(mask == 0, ours.config.pad_token_id)}
        inputs["attention_mask"] = mask
        if to == "longformer" and head != "ForTokenClassification":
            # Its own rules for answers want three separators a text.
            inputs["input_ids"][:, [7, 8, 30]] = ours.config.sep_token_id
        keep = mask.bool()
    if head == "ForMultipleChoice":
        inputs = {name: x[:, None] for name, x in inputs.items()}
    with torch.no_grad():
        mine, theirs = ours(**inputs), back(**inputs)
    names = [name for name in OUTPUTS if mine.get(name) is not None and theirs.get(name) is not None]
    assert names or head == "ForPreTraining"
    for name in names:
        rows = keep if keep is not ... and mine[name].shape[:2] == keep.shape else ...
        assert_close(mine[name][rows], theirs[name][rows], **close)


@pytest.mark.parametrize("to", ALLOWED)
def test_every_head_goes_back(to: str, tmp_path: Path) -> None:
    for head in heads_of(to):
        ours = our_model(to, head)
        if to == "reformer" and hasattr(ours, "lm_head"):
            report = convert(ours, to).report
            assert any("lm_head.bias" in note for note in report.notes) and report.measured[0].outputs["logits"] > 1e-3
            torch.nn.init.zeros_(ours.lm_head.bias)
        segment = {"segment_means_seq_len": 48} if to == "nystromformer" else {}
        conversion = convert(ours, to, **segment)
        back = conversion.model
        assert type(back).__module__.startswith(f"transformers.models.{to}.") and not conversion.report.next_steps
        assert conversion.report.measured and all(found.exact_here for found in conversion.report.measured)
        storages = {x.untyped_storage().data_ptr() for x in ours.state_dict().values()}
        assert not any(x.untyped_storage().data_ptr() in storages for x in back.state_dict().values())
        compare(ours, back, to, head)
        if head in ("ForMaskedLM", "ForMaskedImageModeling"):
            conversion.save_pretrained(tmp_path / head)
            with no_warnings():
                again = type(back).from_pretrained(tmp_path / head).eval()
            compare(ours, again, to, head)


@pytest.mark.parametrize("to", WITHOUT)
def test_heads_that_transformers_has_not(to: str) -> None:
    for head in (*WITHOUT[to], "ForReplacedTokenDetection"):
        with pytest.raises(ValueError, match=f"{head}: transformers' .* has no class for this head; convert the base"):
            convert(our_model(to, head), to)


def test_a_backbone_stays() -> None:
    with pytest.raises(ValueError, match="EffViTBackbone: transformers' ViT has no class for this head"):
        convert(our_model("vit", "Backbone"), "vit")


# Model type -> a value that each field with a rule cannot have there, and what has to be set with it.
CANNOT: dict[str, dict[str, dict[str, Any]]] = {
    "longformer": {
        "norm_position": {"norm_position": "pre"},
        "head_act": {"head_act": "relu"},
        "is_decoder": {"is_decoder": True},
        "rescale_embeddings": {"rescale_embeddings": True},
        "embedding_size": {"embedding_size": 24},
        "classifier_dropout": {"classifier_dropout": 0.3},
        "attention_dilation": {"attention_dilation": [1, [1, 1, 2, 2]]},
        "causal_global": {"causal_global": "prefix"},
        "global_attention": {"global_attention": "cls"},
        "pad_token_id": {"pad_token_id": None},
    },
    "big_bird": {
        "norm_position": {"norm_position": "pre"},
        "head_act": {"head_act": "tanh"},
        "embedding_size": {"embedding_size": 24},
        "num_global_tokens": {"num_global_tokens": 4, "attention_type": "block_sparse"},
        "global_ends": {"global_ends": False},
        "plain_span_head": {"plain_span_head": True},
        "num_random_blocks": {"num_random_blocks": 0, "attention_type": "block_sparse"},
    },
    "nystromformer": {
        "norm_position": {"norm_position": "pre"},
        "head_act": {"head_act": "tanh"},
        "rescale_embeddings": {"rescale_embeddings": True},
        "embedding_size": {"embedding_size": 24},
        "classifier_dropout": {"classifier_dropout": 0.3},
        "pinv_iterations": {"pinv_iterations": None},
        "inv_coeff_init_option": {"inv_coeff_init_option": True},
    },
    "reformer": {
        "head_act": {"head_act": "gelu"},
        "chunk_rule": {"chunk_rule": "paper"},
        "position_offset": {"position_offset": 3},
    },
    "electra": {
        "norm_position": {"norm_position": "pre"},
        "head_act": {"head_act": "tanh"},
        "rescale_embeddings": {"rescale_embeddings": True},
        "attention": {"attention": "longformer", "attention_options": {"attention_window": 8}},
    },
    "vit": {
        "attention": {"attention": "neighborhood", "attention_options": {"radius": 1}},
        "num_register_tokens": {"num_register_tokens": 2},
        "use_cls_token": {"use_cls_token": False, "pooling": "mean"},
        "pooling": {"pooling": "mean"},
    },
}
# Rules that the config of the family keeps already.
KEPT_BY_CONFIG = {
    "big_bird": {"is_decoder"},
    "nystromformer": {"is_decoder"},
    "electra": {"is_decoder"},
    "reformer": {"norm_position"},
}


@pytest.mark.parametrize("to", RULES)
def test_what_transformers_cannot_hold_is_named(to: str) -> None:
    assert set(CANNOT[to]) | KEPT_BY_CONFIG.get(to, set()) == {field for field, _, _ in RULES[to]}
    for field, values in CANNOT[to].items():
        with pytest.raises(ValueError, match=rf"^{field} = .*: transformers' \w+ cannot hold it, its? "):
            convert(our_model(to, "Model", **values), to)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_ways_are_refused(family: str) -> None:
    """Also from one family of ours to another."""
    row = FAMILIES[family]
    model = getattr(row.module("modeling"), f"Eff{row.name}Model")(tiny_config(family))
    for to in OWN:
        if REVERSALS[family, to].verdict == "refused":
            with pytest.raises(ValueError, match=f"{family} cannot become {to}: "):
                convert(model, to)
    with pytest.raises(ValueError, match=f"to = '{family}': from '{family}' choose one of big_bird, "):
        convert(model, family)


@torch.no_grad()
def test_what_is_held_in_another_shape() -> None:
    """Positions of another offset, no token types, no convolution: transformers' tables take them."""
    shapes = {
        "longformer": {"position_offset": 0, "type_vocab_size": 0, "pad_token_id": 3},
        "electra": {"position_offset": 2, "type_vocab_size": 0},
        "big_bird": {"position_offset": 5, "type_vocab_size": 1},
        "nystromformer": {"position_offset": 0, "type_vocab_size": 0, "conv_kernel_size": None},
    }
    for to, fields in shapes.items():
        head = "ForQuestionAnswering" if to == "big_bird" else "ForMaskedLM"
        ours = our_model(to, head, **fields)
        segment = {"segment_means_seq_len": 48} if to == "nystromformer" else {}
        conversion = convert(ours, to, **segment)
        assert any("shifted from row" in how for how in conversion.report.new.values())
        if to == "electra":
            # Without a mask ours takes pad ids for one, because its positions have an offset.
            ids = random_ids(2, 30)
            assert_close(conversion.model(ids).logits, ours(ids).logits, **CLOSE)
        else:
            compare(ours, conversion.model, to, head)


def test_nystromformer_as_softmax_at_every_length() -> None:
    """Landmarks for the longest text: transformers' class is told to compute softmax."""
    ours = our_model("nystromformer", "ForMaskedLM", num_landmarks=126, inv_coeff_init_option=True)
    back = convert(ours, "nystromformer").model
    assert back.config.segment_means_seq_len == back.config.num_landmarks == 126
    for length in (7, 100):
        ids = random_ids(2, length)
        with torch.no_grad():
            assert_close(back(ids).logits, ours(ids).logits, **CLOSE)


def test_lsh_layers_hash_otherwise_there() -> None:
    ours = our_model("reformer", "ForMaskedLM", attn_layers=["local", "lsh"])
    report = convert(ours, "reformer").report
    assert not any(found.exact_here for found in report.measured) and report.measured[0].hidden_states > 1e-4


def test_options_of_the_way_back() -> None:
    model = our_model("nystromformer", "Model")
    with pytest.raises(ValueError, match=r"segment_means_seq_len = 50 is no multiple of num_landmarks = 8"):
        convert(model, "nystromformer", segment_means_seq_len=50)
    with pytest.raises(ValueError, match=r"max_length: transformers' class takes everything from the model"):
        convert(model, "nystromformer", max_length=64)
    with pytest.raises(ValueError, match=r"num_landmarks: transformers' class takes everything"):
        convert(model, "nystromformer", num_landmarks=64)
    with pytest.raises(ValueError, match=r"only Nystromformer has it"):
        convert(our_model("electra", "Model"), "electra", segment_means_seq_len=64)


def test_there_and_back() -> None:
    """BERT -> EffLongformer -> Longformer reads what BERT read."""
    bert = randomise_(
        transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
            )
        )
    )
    ours = convert(bert, "eff_longformer", attention_window=64, max_length=64).model
    back = convert(ours, "longformer").model
    ids = random_ids(2, 30)
    with torch.no_grad():
        assert_close(back(ids, torch.ones_like(ids)).logits, bert(ids).logits, **CLOSE)
    assert model_class("eff_longformer", "AutoModelForMaskedLM") is type(ours)
