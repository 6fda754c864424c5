"""Parameter groups by depth: every family and in-tree models, each parameter once, at its layer's rate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import TINY, layers_of, model_class, tiny_config
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_efficient_attn import FAMILIES, layerwise_parameter_groups


RATE, DECAY = 1.0, 0.5
LAYERS = TINY["num_hidden_layers"]
DISTILBERT = {"vocab_size": 64, "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 48}
VIT = {**TINY, "image_size": 8, "patch_size": 4}
# Config and model class -> options of the config.
IN_TREE = {
    ("BertConfig", "BertForPreTraining"): TINY,
    ("RobertaConfig", "RobertaForSequenceClassification"): TINY,
    ("ElectraConfig", "ElectraForMaskedLM"): {**TINY, "embedding_size": 16},
    ("DistilBertConfig", "DistilBertForSequenceClassification"): DISTILBERT,
    ("ViTConfig", "ViTForImageClassification"): {name: VIT[name] for name in VIT if name != "vocab_size"},
    (
        "MPNetConfig",
        "MPNetForSequenceClassification",
    ): TINY,  # one table of positions for all layers, defined after them
}


def in_tree(config_name: str, model_name: str, **options: object) -> PreTrainedModel:
    options = {**IN_TREE.get((config_name, model_name), TINY), **options}
    return getattr(transformers, model_name)(getattr(transformers, config_name)(**options))


def bert() -> PreTrainedModel:
    return in_tree("BertConfig", "BertForPreTraining")


def rates(model: nn.Module, groups: list[dict]) -> dict[str, float]:
    """Name of a parameter -> learning rate; fails where a parameter is in two groups."""
    found: dict[int, float] = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["lr"]
    assert set(found) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_rate(model: PreTrainedModel, name: str) -> float:
    """The rate by the parameter's name alone."""
    name = name.removeprefix(f"{model.base_model_prefix}.")
    if layer := re.match(r"(?:\w+\.)?layers?\.(\d+)\.", name):
        return RATE * DECAY ** (LAYERS - int(layer[1]))
    below = name.startswith(("embeddings", "embeddings_project")) or "relative_attention_bias" in name
    return RATE * DECAY ** (LAYERS + 1) if below else RATE


def check_model(model: PreTrainedModel) -> list[dict]:
    groups = layerwise_parameter_groups(model, RATE, DECAY, weight_decay=0.1)
    assert (found := rates(model, groups)) == {name: expected_rate(model, name) for name in found}
    # All depths are there: nothing was taken for another place as a whole.
    heads = {RATE} if model.base_model is not model else set()
    assert set(found.values()) >= {RATE * DECAY**step for step in range(1, LAYERS + 2)} | heads

    undecayed = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    for name, parameter in model.named_parameters():
        is_exempt = name.endswith("bias") or "norm" in name.lower() or parameter.dim() <= 1
        assert (id(parameter) in undecayed) is is_exempt, name
    return groups


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_of_every_family_has_a_rate_for_each_depth(family: str) -> None:
    for auto_name in FAMILIES[family].model_names:
        options = {"is_decoder": True} if auto_name == "AutoModelForCausalLM" else {}
        check_model(model_class(family, auto_name)(tiny_config(family, **options)))


@pytest.mark.parametrize("names", IN_TREE, ids=[model for _, model in IN_TREE])
def test_models_of_transformers_have_a_rate_for_each_depth(names: tuple[str, str]) -> None:
    model = in_tree(*names)
    check_model(model)
    groups = layerwise_parameter_groups(model.base_model, RATE, DECAY)  # without a head
    assert min(rates(model.base_model, groups).values()) == RATE * DECAY ** (LAYERS + 1)


def test_the_groups_are_named_from_the_head_down() -> None:
    groups = check_model(in_tree("RobertaConfig", "RobertaForSequenceClassification"))
    places = ["head", "layer 1", "layer 0", "embeddings"]
    assert [group["name"] for group in groups] == [f"{p}{end}" for p in places for end in ("", ", biases and norms")]
    assert [group["lr"] for group in groups[::2]] == [1.0, 0.5, 0.25, 0.125]
    assert all(group["lr"] == 0.3 for group in layerwise_parameter_groups(bert(), 0.3, 1.0))


def test_poolers_and_final_norms_belong_to_the_head() -> None:
    found = rates(model := bert(), layerwise_parameter_groups(model, RATE, DECAY))
    assert found["bert.pooler.dense.weight"] == RATE
    vit = in_tree("ViTConfig", "ViTForImageClassification")
    found = rates(vit, layerwise_parameter_groups(vit, RATE, DECAY))
    assert found["vit.layernorm.weight"] == RATE and found["vit.embeddings.cls_token"] == RATE * DECAY**3
    longformer = model_class("eff_longformer", "AutoModel")(tiny_config("eff_longformer", norm_position="pre"))
    found = rates(longformer, layerwise_parameter_groups(longformer, RATE, DECAY))
    finals = [name for name in found if "norm" in name.lower() and "layer." not in name and "embeddings" not in name]
    assert len(finals) == 2 and all(found[name] == RATE for name in finals)


def test_frozen_parameters_are_left_out_and_tied_ones_come_once() -> None:
    model = bert()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    found = rates(model, layerwise_parameter_groups(model, RATE, DECAY))
    assert found["bert.embeddings.word_embeddings.weight"] == RATE * DECAY ** (LAYERS + 1)
    # One weight in two layers has the lower one's rate.
    layers = layers_of(model)
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    shared = "bert.encoder.layer.0.intermediate.dense.weight"
    assert rates(model, layerwise_parameter_groups(model, RATE, DECAY))[shared] == RATE * DECAY**2

    model.bert.embeddings.requires_grad_(False)
    layers[0].requires_grad_(False)
    groups = layerwise_parameter_groups(model, RATE, DECAY)
    assert {group["name"].split(",")[0] for group in groups} == {"head", "layer 1"} and all(g["params"] for g in groups)
    assert set(rates(model, groups).values()) == {RATE, RATE * DECAY}


def test_norms_biases_and_vectors_of_any_kind_do_not_decay() -> None:
    model = bert()
    transform = model.cls.predictions.transform
    transform.LayerNorm = nn.LayerNorm([4, 8])
    transform.scale = nn.Parameter(torch.ones(8))
    transform.bias = nn.Parameter(torch.ones(4, 8))
    transform.table = nn.Parameter(torch.ones(4, 8))
    groups = layerwise_parameter_groups(model, RATE, weight_decay=0.1)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert all(decays[id(p)] == 0.0 for p in (transform.LayerNorm.weight, transform.scale, transform.bias))
    assert decays[id(transform.table)] == 0.1


def test_a_list_inside_a_layer_is_none_of_layers() -> None:
    model = bert()
    for layer in layers_of(model):
        layer.extra = nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))
    found = rates(model, layerwise_parameter_groups(model, RATE, DECAY))
    assert found["bert.encoder.layer.0.extra.1.weight"] == RATE * DECAY**2


def test_a_step_of_trainer_moves_every_depth_by_its_rate(tmp_path: Path) -> None:
    model = model_class("eff_reformer", "AutoModelForSequenceClassification")(tiny_config("eff_reformer"))
    groups = layerwise_parameter_groups(model, 1e-2, DECAY)
    expected = rates(model, groups)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-30)  # whose first step is the rate, whatever the gradient
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, lr_scheduler_type="constant", save_strategy="no", use_cpu=True, report_to="none"
    )
    data = [{"input_ids": list(range(5 + label, 21 + label)), "labels": label} for label in (0, 1)] * 4
    with torch.random.fork_rng():
        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
    assert trainer.lr_scheduler.base_lrs == [group["lr"] for group in groups]
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    still = [name for name, distance in moved.items() if distance == 0.0]
    assert len(still) < len(moved) // 4, still  # those without a gradient: the keys' biases
    for name in set(moved) - set(still):
        assert moved[name] == pytest.approx(expected[name], rel=1e-2), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, r"layer_decay = 0.0: .*above 0 and at most 1; give 0.8"),
        ({"layer_decay": 1.1}, r"layer_decay = 1.1"),
        ({"layer_decay": float("nan")}, r"layer_decay = nan"),
        ({"learning_rate": 0.0}, r"learning_rate = 0.0: .*above 0; give"),
        ({"learning_rate": float("inf")}, r"learning_rate = inf"),
        ({"weight_decay": -0.1}, r"weight_decay = -0.1: it must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_explained(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layerwise_parameter_groups(bert(), **{"learning_rate": RATE, **options})


def test_models_without_one_list_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear with config.num_hidden_layers = None has nothing"):
        layerwise_parameter_groups(nn.Linear(2, 2), RATE)
    albert = in_tree("AlbertConfig", "AlbertModel", embedding_size=16)
    with pytest.raises(ValueError, match=r"AlbertModel with config.num_hidden_layers = 2 has nothing .*exactly one"):
        layerwise_parameter_groups(albert, RATE)
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2}
    for decoder_layers, lists in ((2, "encoder.layers, decoder.layers"), (1, "encoder.layers")):
        config = transformers.BartConfig(**sizes, decoder_layers=decoder_layers)
        with pytest.raises(ValueError, match=rf"has {lists} as lists .*encoder-decoder"):
            layerwise_parameter_groups(transformers.BartModel(config), RATE)
