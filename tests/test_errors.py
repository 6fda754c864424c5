"""Bad input: a ValueError that names the value, the rule and the fix, and a model that still works afterwards."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from frame_family import BERT, FrameConfig, build
from helpers import (
    TINY,
    config_class,
    model_class,
    no_warnings,
    random_ids,
    random_images,
    randomise_,
    tiny_config,
    tiny_tokenizer,
)
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import tensor
from transformers import DataCollatorForMultipleChoice, DataCollatorWithPadding, default_data_collator

from hf_efficient_attn import FAMILIES, DataCollatorWithGlobalAttention
from hf_efficient_attn.auto import TEXT_FAMILIES


FAMILY = "eff_longformer"
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_TEXT_FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)
IDS = random_ids(2, 9)
ONES = torch.ones_like(IDS)
CHOICES = torch.stack([IDS, IDS.flip(1), IDS.flip(0)], dim=1)


def refuses(call: Callable[[], Any], *parts: str) -> None:
    """`call` raises a ValueError of our own whose message has every part."""
    with pytest.raises(ValueError) as info:
        call()
    missing = [part for part in parts if part not in str(info.value)]
    assert not missing, f"{missing} not in: {info.value}"


def build_tiny(auto_name: str, **overrides: Any) -> Any:
    return randomise_(model_class(FAMILY, auto_name)(tiny_config(FAMILY, **overrides)))


# Options of any family -> parts of the message.
SHARED_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "heads that do not divide": ({"hidden_size": 33}, ("hidden_size = 33", "num_attention_heads = 4", "multiple")),
    "no heads": ({"num_attention_heads": 0}, ("num_attention_heads = 0",)),
    "cross-attention": ({"add_cross_attention": True}, ("add_cross_attention = True", "leave it False")),
    "misspelt": ({"hidden_sise": 8}, ("no option 'hidden_sise'", "did you mean 'hidden_size'?")),
    "another family's": ({"num_key_value_heads": 2}, ("no option 'num_key_value_heads'",)),
    "like nothing": ({"qwertz": 8}, ("no option 'qwertz'", "attribute")),
    "activation": ({"hidden_act": "gelux"}, ("hidden_act = 'gelux'", "gelu")),
    "norm": ({"norm_position": "mid"}, ("norm_position = 'mid'", "'post'", "'pre'")),
    "pad id": ({"pad_token_id": 64}, ("pad_token_id = 64", "vocabulary of 64", "None")),
    "negative pad id": ({"pad_token_id": -1}, ("pad_token_id = -1",)),
    "dropout": ({"hidden_dropout_prob": 1.5}, ("hidden_dropout_prob = 1.5", "between 0 and 1")),
    "head dropout": ({"classifier_dropout": -0.1}, ("classifier_dropout = -0.1",)),
    "vocabulary": ({"vocab_size": 0}, ("vocab_size = 0", "1 or more")),
    "feed-forward": ({"intermediate_size": 0}, ("intermediate_size = 0",)),
    "positions": ({"max_position_embeddings": 3, "position_offset": 3}, ("max_position_embeddings = 3", "at least 4")),
    "offset": ({"position_offset": -1}, ("position_offset = -1",)),
    "embeddings": ({"embedding_size": 0}, ("embedding_size = 0", "None")),
    "token types": ({"type_vocab_size": -1}, ("type_vocab_size = -1",)),
}

LONGFORMER_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "odd window": ({"attention_window": 7}, ("attention_window = 7", "positive even", "use 8")),
    "negative window": ({"attention_window": -2}, ("attention_window = -2", "positive even", "use 2")),
    "no window": ({"attention_window": 0}, ("attention_window = 0", "positive even", "use 2")),
    "odd in one layer": ({"attention_window": [8, 5]}, ("attention_window = 5 (layer 1)", "use 6")),
    "too few windows": ({"attention_window": [8]}, ("attention_window has 1 entries for 2 layers", "one number")),
    "too many windows": (
        {"attention_window": [8, 4, 4]},
        ("attention_window has 3 entries for 2 layers", "one number"),
    ),
    "dilation": ({"attention_dilation": 0}, ("attention_dilation = 0", "1 or more")),
    "dilation of a head": ({"attention_dilation": [1, [1, 1, 1, 0]]}, ("[1, 1, 1, 0] (layer 1)", "1 or more")),
    "dilations a layer": ({"attention_dilation": [1]}, ("attention_dilation has 1 entries for 2 layers",)),
    "dilations a head": ({"attention_dilation": [1, [1, 1]]}, ("layer 1 has 2 entries for 4 heads", "one a head")),
    "misspelt": ({"attention_windw": 8}, ("did you mean 'attention_window'?",)),
    "rule": ({"global_attention": "clss"}, ("global_attention = 'clss'", "cls, question", "list of token ids")),
    "ids": ({"global_attention": [1, 64]}, ("global_attention = [1, 64]", "vocabulary of 64")),
    "negative ids": ({"global_attention": [-1]}, ("global_attention = [-1]",)),
    "separator": ({"global_attention": "question", "sep_token_id": None}, ("'question'", "sep_token_id")),
    "causal global": ({"causal_global": "all"}, ("causal_global = 'all'", "'prefix'", "None")),
    "global tokens in the causal form": (
        {"is_decoder": True, "global_attention": "cls"},
        ("global_attention = 'cls'", "causal_global = None", "causal_global='prefix'"),
    ),
    "a causal question": (
        {"is_decoder": True, "causal_global": "prefix", "global_attention": "question"},
        ("global_attention = 'question'", "choose 'cls', or 'none'"),
    ),
    "slots": ({"max_global_tokens": 0}, ("max_global_tokens = 0", "1 or more")),
}


BIG_BIRD_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "type": ({"attention_type": "sparse"}, ("attention_type = 'sparse'", "block_sparse, original_full")),
    "size": ({"block_size": 0}, ("block_size = 0", "1 token or more")),
    "random": ({"num_random_blocks": -1}, ("num_random_blocks = -1", "0 or more")),
    "global": ({"num_global_tokens": -2}, ("num_global_tokens = -2", "0 or more")),
    "seed": ({"random_seed": -3}, ("random_seed = -3", "0 or more")),
    "global in full attention": (
        {"attention_type": "original_full", "num_global_tokens": 4},
        ("num_global_tokens = 4", "already", "'block_sparse'"),
    ),
    "causal": ({"is_decoder": True}, ("is_decoder = True", "no causal form", "leave it False")),
    "misspelt": ({"blok_size": 8}, ("did you mean 'block_size'?",)),
}


NYSTROMFORMER_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no landmarks": ({"num_landmarks": 0}, ("num_landmarks = 0", "1 or more")),
    "even kernel": ({"conv_kernel_size": 64}, ("conv_kernel_size = 64", "positive odd", "use 65", "None")),
    "no kernel": ({"conv_kernel_size": 0}, ("conv_kernel_size = 0", "use 1")),
    "negative kernel": ({"conv_kernel_size": -3}, ("conv_kernel_size = -3", "use 1")),
    "no iterations": ({"pinv_iterations": 0}, ("pinv_iterations = 0", "1 or more", "None")),
    "causal": ({"is_decoder": True}, ("is_decoder = True", "no causal form", "leave it False")),
    "misspelt": ({"num_landmark": 8}, ("did you mean 'num_landmarks'?",)),
}


PERFORMER_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no features": ({"num_features": 0}, ("num_features = 0", "1 or more", "None")),
    "kernel": ({"kernel": "elu"}, ("kernel = 'elu'", "softmax, relu")),
    "seed": ({"projection_seed": -1}, ("projection_seed = -1", "0 or more")),
    "misspelt": ({"num_feature": 8}, ("did you mean 'num_features'?",)),
}


REFORMER_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "kind of layer": ({"attn_layers": ["global"]}, ("attn_layers = ['global']", "'local' or 'lsh'")),
    "too many layers": ({"attn_layers": ["lsh"] * 3}, ("attn_layers = ['lsh', 'lsh', 'lsh'] for 2 layers", "shorter")),
    "no layers": ({"attn_layers": []}, ("attn_layers = []", "'local' or 'lsh' for each layer")),
    "head size": ({"attention_head_size": 0}, ("attention_head_size = 0", "1 or more", "None")),
    "lsh chunk": ({"lsh_attn_chunk_length": 0}, ("lsh_attn_chunk_length = 0", "1 token or more")),
    "local chunk": ({"local_attn_chunk_length": -8}, ("local_attn_chunk_length = -8", "1 token or more")),
    "lsh before": ({"lsh_num_chunks_before": -1}, ("lsh_num_chunks_before = -1", "0 or more")),
    "local after": ({"local_num_chunks_after": -1}, ("local_num_chunks_after = -1", "0 or more")),
    "many buckets": ({"num_buckets": 10**7}, ("num_buckets = 10000000", "65,536", "several")),
    "many factors": ({"num_buckets": [2] * 40}, ("num_buckets", "2 ** 31")),
    "axial std": ({"axial_norm_std": -1.0}, ("axial_norm_std = -1.0", "0 or more")),
    "causal lsh after": ({"lsh_num_chunks_after": 1, "is_decoder": True}, ("lsh_num_chunks_after = 1", "set it to 0")),
    "causal local after": ({"local_num_chunks_after": 2, "is_decoder": True}, ("local_num_chunks_after = 2", "to 0")),
    "rule": ({"chunk_rule": "old"}, ("chunk_rule = 'old'", "released, paper")),
    "no rounds": ({"num_hashes": 0}, ("num_hashes = 0", "1 round or more")),
    "seed": ({"hash_seed": -1}, ("hash_seed = -1", "0 or more")),
    "odd buckets": ({"num_buckets": 5}, ("num_buckets = 5", "even", "None")),
    "odd factor": ({"num_buckets": [4, 3]}, ("num_buckets = [4, 3]", "even", "None")),
    "no buckets": ({"num_buckets": 0}, ("num_buckets = 0", "positive")),
    "no factors": ({"num_buckets": []}, ("num_buckets = []", "None")),
    "lsh dropout": ({"lsh_attention_probs_dropout_prob": 1.5}, ("lsh_attention_probs_dropout_prob = 1.5",)),
    "local dropout": ({"local_attention_probs_dropout_prob": -1}, ("local_attention_probs_dropout_prob = -1",)),
    "feed-forward chunk": ({"chunk_size_feed_forward": -1}, ("chunk_size_feed_forward = -1", "0 (all at once)")),
    "head chunk": ({"chunk_size_lm_head": -4}, ("chunk_size_lm_head = -4", "0 (all at once)")),
    "number of axes": ({"axial_pos_shape": [4, 4, 8]}, ("[4, 4, 8] and axial_pos_embds_dim = [8, 24]", "axis each")),
    "no places": ({"axial_pos_shape": [0, 200]}, ("axial_pos_shape = [0, 200]", "positive")),
    "no axes": ({"axial_pos_shape": [], "axial_pos_embds_dim": []}, ("axial_pos_shape = []", "axis each")),
    "widths": ({"axial_pos_embds_dim": [8, 8]}, ("[8, 8] join to 16", "hidden_size = 32", "add up")),
    "small grid": ({"axial_pos_shape": [8, 8]}, ("[8, 8] has 64 places", "= 128", "larger grid")),
    "tied": ({"tie_word_embeddings": True}, ("tie_word_embeddings = True", "twice as wide", "leave it False")),
    "narrow embeddings": ({"embedding_size": 16}, ("embedding_size = 16", "leave it out")),
    "types": ({"type_vocab_size": 2}, ("type_vocab_size = 2", "leave it out")),
    "pre-norm": ({"norm_position": "pre"}, ("norm_position = 'pre'", "leave it out")),
    "rescaled": ({"rescale_embeddings": True}, ("rescale_embeddings = True", "leave it False")),
    "misspelt": ({"num_hash": 8}, ("did you mean 'num_hashes'?",)),
}


@EVERY_TEXT_FAMILY
@pytest.mark.parametrize("name", SHARED_OPTIONS)
def test_shared_options(name: str, family: str) -> None:
    options, parts = SHARED_OPTIONS[name]
    refuses(lambda: tiny_config(family, **options), *parts)


OPTIONS = {
    (family, name): row
    for family, table in (
        ("eff_longformer", LONGFORMER_OPTIONS),
        ("eff_big_bird", BIG_BIRD_OPTIONS),
        ("eff_nystromformer", NYSTROMFORMER_OPTIONS),
        ("eff_performer", PERFORMER_OPTIONS),
        ("eff_reformer", REFORMER_OPTIONS),
    )
    for name, row in table.items()
}


@pytest.mark.parametrize(("family", "name"), OPTIONS)
def test_options_of_one_family(family: str, name: str, tmp_path: Path) -> None:
    options, parts = OPTIONS[family, name]
    refuses(lambda: tiny_config(family, **options), *parts)
    if name == "misspelt":
        return
    # The same rule holds for fields set later, and for what overrides a folder's config.
    config = tiny_config(family)
    for field, value in options.items():
        setattr(config, field, value)
    cls = model_class(family, "AutoModel")
    refuses(lambda: cls(config), *parts)
    cls(tiny_config(family)).save_pretrained(tmp_path)
    refuses(lambda: transformers.AutoModel.from_pretrained(tmp_path, **options), *parts)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_window": "8"},
        {"attention_window": 8.0},
        {"vocab_size": 64.5},
        {"hidden_act": None},
        {"problem_type": "guess"},
    ],
    ids=str,
)
def test_wrong_types_name_the_field(options: dict[str, Any]) -> None:
    """transformers checks types itself; its error is no ValueError. Some versions know the problem types."""
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=next(iter(options))):
        tiny_config(FAMILY, **options)


@EVERY_FAMILY
def test_unknown_names_in_a_file_are_kept(family: str, tmp_path: Path) -> None:
    """A file may come from another version; a misspelling in a call may not pass."""
    tiny_config(family).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "hidden_sise": 7}), encoding="utf-8")
    with no_warnings():
        config = config_class(family).from_pretrained(tmp_path)
    assert config.hidden_sise == 7 and config.to_dict()["hidden_sise"] == 7
    assert not any(name.startswith("_loaded") for name in config.to_dict())
    config.save_pretrained(tmp_path)
    assert config_class(family).from_pretrained(tmp_path).hidden_sise == 7


@EVERY_FAMILY
@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention", "nonsense"])
def test_unknown_backends(backend: str, family: str, tmp_path: Path) -> None:
    cls = model_class(family, "AutoModel")
    if backend == "flex_attention" and cls._supports_flex_attn:
        pytest.skip("this family has flex_attention")
    model = cls(tiny_config(family)).eval()
    model.save_pretrained(tmp_path)
    name = "flash.?attention.?2" if backend.startswith("flash") else backend
    calls: list[Callable[[], Any]] = [
        lambda: cls(tiny_config(family, attn_implementation=backend)),
        lambda: cls.from_pretrained(tmp_path, attn_implementation=backend),
        lambda: transformers.AutoModel.from_config(tiny_config(family), attn_implementation=backend),
        lambda: model.set_attn_implementation(backend),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.compile(name, re.IGNORECASE)):
            call()
    # A choice that got past transformers' checks is refused when it would be used.
    assert model.config._attn_implementation == "sdpa"
    given = IDS if family in TEXT_FAMILIES else random_images(2)
    expected = model(given).last_hidden_state
    model.config._attn_implementation_internal = backend
    refuses(lambda: model(given), repr(backend), "eager", "sdpa")
    model.config._attn_implementation_internal = "sdpa"
    assert torch.equal(model(given).last_hidden_state, expected)


FORWARD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "too long": ({"input_ids": random_ids(1, 127)}, ("127 tokens", "126", "max_length=126")),
    "too long embeds": ({"inputs_embeds": torch.zeros(1, 127, 32)}, ("127 tokens", "126")),
    "empty": ({"input_ids": IDS[:, :0]}, ("[2, 0]",)),
    "no examples": ({"input_ids": IDS[:0]}, ("[0, 9]",)),
    "both inputs": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 32)}, ("exactly one", "both")),
    "no input": ({}, ("exactly one of input_ids and inputs_embeds", "none")),
    "one dimension": ({"input_ids": IDS[0]}, ("input_ids must be [batch, length]", "[9]")),
    "narrow embeds": ({"inputs_embeds": torch.zeros(2, 9, 31)}, ("[batch, length, 32]", "[2, 9, 31]")),
    "short mask": ({"input_ids": IDS, "attention_mask": ONES[:, :8]}, ("attention_mask", "[2, 9]", "[2, 8]")),
    "mask of one": ({"input_ids": IDS, "attention_mask": ONES[:1]}, ("attention_mask", "[2, 9]", "[1, 9]")),
    "4D mask": (
        {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)},
        ("attention_mask", "[2, 9]", "[2, 1, 9, 9]"),
    ),
    "short global mask": (
        {"input_ids": IDS, "global_attention_mask": ONES[:, :8]},
        ("global_attention_mask", "[2, 9]", "[2, 8]"),
    ),
    "short positions": ({"input_ids": IDS, "position_ids": ONES[:, :8]}, ("position_ids", "[2, 9]", "[2, 8]")),
    "short types": ({"input_ids": IDS, "token_type_ids": ONES[:, :8]}, ("token_type_ids", "[2, 9]", "[2, 8]")),
    "unknown argument": ({"input_ids": IDS, "atention_mask": ONES}, ("'atention_mask'", "remove it")),
    "cache": ({"input_ids": IDS, "past_key_values": []}, ("past_key_values", "encoder", "Leave it out")),
    "cross-attention": (
        {"input_ids": IDS, "encoder_hidden_states": torch.zeros(2, 9, 32)},
        ("'encoder_hidden_states'", "cross-attention", "one input"),
    ),
    "weights from sdpa": ({"input_ids": IDS, "output_attentions": True}, ("output_attentions", "'sdpa'", "'eager'")),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    model, (inputs, parts) = build_tiny("AutoModel"), FORWARD[name]
    expected = model(IDS).last_hidden_state
    refuses(lambda: model(**inputs), *parts)
    assert torch.equal(model(IDS).last_hidden_state, expected)


def test_arguments_that_ask_for_nothing_pass() -> None:
    model = build_tiny("AutoModel")
    expected = model(IDS).last_hidden_state
    assert torch.equal(model(IDS, encoder_hidden_states=None, use_cache=False).last_hidden_state, expected)
    assert model(random_ids(1, 126)).last_hidden_state.shape == (1, 126, 32)
    weights = build_tiny("AutoModel", attn_implementation="eager")(IDS, output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in weights] == [(2, 4, 9, 9)] * 2


def test_config_cannot_ask_for_weights_from_sdpa() -> None:
    """As in a call: no tuple of None in place of the weights."""
    model = build_tiny("AutoModel", output_attentions=True)
    refuses(lambda: model(IDS), "output_attentions", "'sdpa'", "'eager'")
    model.set_attn_implementation("eager")
    assert model(IDS).attentions[0].shape == (2, 4, 9, 9)


def test_family_without_global_tokens() -> None:
    model = build(BERT, "Model")
    refuses(lambda: model(IDS, global_attention_mask=ONES), "global_attention_mask", "no global tokens", "leave it out")
    refuses(lambda: FrameConfig(**TINY, global_attention="cls"), "no option 'global_attention'")
    assert model(IDS).last_hidden_state.shape == (2, 9, 32)


# Auto class, options, wrong labels -> parts of the message.
LABELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "class too large": ("SequenceClassification", {}, {"labels": tensor([0, 3])}, ("3", "0 to 2", "num_labels=4")),
    "class negative": ("SequenceClassification", {}, {"labels": tensor([-1, 0])}, ("-1", "0 to 2", "-100")),
    "classes missing": ("SequenceClassification", {}, {"labels": tensor([0])}, ("[1]", "batch of 2")),
    "flags": ("SequenceClassification", {}, {"labels": torch.ones(2, 2)}, ("[2, 2]", "[2, 3]", "num_labels")),
    "targets": ("SequenceClassification", {"num_labels": 1}, {"labels": torch.ones(2, 2)}, ("[2, 2]", "[2, 1]")),
    "token too large": ("MaskedLM", {}, {"labels": IDS * 0 + 64}, ("64", "0 to 63", "vocab_size")),
    "token negative": ("MaskedLM", {}, {"labels": IDS * 0 - 1}, ("-1", "0 to 63", "-100")),
    "tokens missing": ("MaskedLM", {}, {"labels": IDS[:, :8]}, ("[2, 9]", "[2, 8]")),
    "float tokens": ("MaskedLM", {}, {"labels": IDS.float()}, ("labels", "float32", "integer")),
    "tag too large": ("TokenClassification", {}, {"labels": IDS * 0 + 3}, ("3", "0 to 2", "num_labels")),
    "tags flat": ("TokenClassification", {}, {"labels": IDS[0] % 3}, ("[2, 9]", "[9]")),
    "one end": (
        "QuestionAnswering",
        {"num_labels": 2},
        {"start_positions": tensor([1, 2])},
        ("end_positions", "only one"),
    ),
    "ends missing": (
        "QuestionAnswering",
        {"num_labels": 2},
        {"start_positions": tensor([1]), "end_positions": tensor([1, 2])},
        ("start_positions", "[2]", "[1]"),
    ),
    "choice too large": ("MultipleChoice", {}, {"labels": tensor([0, 3])}, ("3", "0 to 2", "right choice")),
    "choices missing": ("MultipleChoice", {}, {"labels": tensor([0])}, ("labels", "[2]", "[1]")),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(name: str) -> None:
    task, options, labels, parts = LABELS[name]
    model = build_tiny(f"AutoModelFor{task}", **{"num_labels": 3, **options})
    ids = CHOICES if task == "MultipleChoice" else IDS
    output = "start_logits" if task == "QuestionAnswering" else "logits"
    expected = model(ids)[output]
    refuses(lambda: model(ids, **labels), *parts)
    assert torch.equal(model(ids)[output], expected)


def test_next_sentence_labels() -> None:
    model = build(BERT, "ForPreTraining")
    refuses(lambda: model(IDS, next_sentence_label=tensor([0, 2])), "next_sentence_label", "2", "0 to 1", "random")
    refuses(lambda: model(IDS, next_sentence_label=tensor([0])), "next_sentence_label", "[2]", "[1]")
    assert model(IDS, next_sentence_label=tensor([0, 1])).loss.isfinite()


def test_question_answering_has_two_outputs() -> None:
    refuses(lambda: build_tiny("AutoModelForQuestionAnswering", num_labels=3), "num_labels = 3", "num_labels=2")


def test_multiple_choice_inputs() -> None:
    model = build_tiny("AutoModelForMultipleChoice")
    refuses(lambda: model(IDS), "[batch, choices, length]", "[2, 9]")
    refuses(lambda: model(), "[batch, choices, length]")
    refuses(lambda: model(inputs_embeds=torch.zeros(2, 9, 32)), "[2, 9, 32]")
    # In the shapes of the caller, not in those of the flattened batch.
    for name in ("attention_mask", "global_attention_mask", "token_type_ids", "position_ids"):
        refuses(lambda name=name: model(CHOICES, **{name: ONES}), name, "[2, 3, 9]", "[2, 9]")
    assert model(CHOICES, attention_mask=torch.ones_like(CHOICES)).logits.shape == (2, 3)


def test_collator() -> None:
    tokenizer = tiny_tokenizer()
    collate = DataCollatorWithGlobalAttention(DataCollatorWithPadding(tokenizer))
    rows = [dict(tokenizer(text)) for text in ("the fox", "a dog")]
    good = [{**row, "global_attention_mask": [1] * len(row["input_ids"])} for row in rows]
    refuses(lambda: collate([good[0], rows[1]]), "feature 1", "global_attention_mask", "all or none")
    short = {**rows[1], "global_attention_mask": [1, 0]}
    refuses(
        lambda: collate([good[0], short]), "feature 1", "2 entries", f"{len(rows[1]['input_ids'])}", "one entry a token"
    )
    nested = {name: [values, values] for name, values in good[0].items()}
    nested.update(global_attention_mask=[[1], [1]], label=0)
    choices = DataCollatorWithGlobalAttention(DataCollatorForMultipleChoice(tokenizer))
    refuses(lambda: choices([nested]), "feature 0", "1 entries", f"{len(rows[0]['input_ids'])}")
    refuses(
        lambda: DataCollatorWithGlobalAttention(default_data_collator)(good[:1]), "tokenizer", "DataCollatorWithPadding"
    )
    assert collate(good)["global_attention_mask"].shape == collate(rows)["input_ids"].shape
