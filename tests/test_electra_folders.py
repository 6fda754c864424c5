"""Joint models on disk, the two models they are made of, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from electra_cases import BACKBONES, PROJECTING, encoder_config, joint_config, joint_model, masked_batch
from helpers import collect_warnings, model_class, no_warnings, randomise_
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BartConfig,
    BertModel,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraForSequenceClassification,
    ElectraModel,
    GPT2Config,
    ViTConfig,
)

from hf_efficient_attn import (
    ELECTRA_SIZES,
    FAMILIES,
    EffElectraConfig,
    EffElectraForJointPreTraining,
    EffElectraForPreTraining,
    EffElectraJointConfig,
    EffReformerConfig,
)


EVERY_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def sharing_of(backbone: str) -> list[str]:
    return ["embeddings", "all", "none"] if backbone in PROJECTING else ["all", "none"]


CASES = [(backbone, sharing) for backbone in BACKBONES for sharing in sharing_of(backbone)]


def build(backbone: str, sharing: str, **options: Any) -> Any:
    return joint_model(backbone, 1 if sharing == "all" else 0.5, sharing=sharing, **options)


@pytest.mark.parametrize(("backbone", "sharing"), CASES)
def test_saved_and_loaded(backbone: str, sharing: str, tmp_path: Path) -> None:
    """One copy of what is shared on disk, and one weight again in memory."""
    model, batch = build(backbone, sharing), masked_batch()
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert not names & set(model._tied_weights_keys) and names >= set(model._tied_weights_keys.values())
    with no_warnings():
        again, report = EffElectraForJointPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(again.eval()(**batch).loss, model(**batch).loss, **CLOSE)
    for ours, theirs in model._tied_weights_keys.items():
        assert again.get_parameter(ours) is again.get_parameter(theirs)
    count = sum(x.numel() for x in model.parameters())
    assert sum(x.numel() for x in again.parameters()) == count
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is EffElectraForJointPreTraining
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["sharing"] == sharing


def test_what_is_shared() -> None:
    """Token, position and type embeddings; nothing; every weight of both encoders."""
    tables = {f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    tied = {sharing: build("eff_electra", sharing)._tied_weights_keys for sharing in ("embeddings", "none", "all")}
    assert {name.removeprefix("generator.electra.") for name in tied["embeddings"]} == tables
    assert tied["none"] == {}
    encoder = dict(build("eff_electra", "all").discriminator.electra.named_parameters())
    assert {name.removeprefix("generator.electra.") for name in tied["all"]} == set(encoder)
    model = build("eff_electra", "embeddings")
    ours, theirs = model.generator.electra, model.discriminator.electra
    words = theirs.embeddings.word_embeddings.weight
    assert ours.embeddings.word_embeddings.weight is words and model.generator.generator_lm_head.weight is words
    assert ours.embeddings_project.weight is not theirs.embeddings_project.weight


@EVERY_BACKBONE
def test_the_two_models_are_ordinary_folders(backbone: str, tmp_path: Path) -> None:
    """They load without a warning, by class and by Auto class, and say the same."""
    model, batch = joint_model(backbone), masked_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model.save_generator(tmp_path / "generator"), model.save_discriminator(tmp_path / "discriminator")
    with no_warnings():
        generator = AutoModelForMaskedLM.from_pretrained(tmp_path / "generator").eval()
    keep = batch["attention_mask"].bool()
    assert_close(generator(**inputs).logits[keep], model.generator(**inputs).logits[keep], **CLOSE)
    if backbone in FAMILIES or backbone == "electra":
        family = FAMILIES.get(backbone)
        cls = ElectraForPreTraining if family is None else getattr(family.module("modeling"), family.detector_name)
        with no_warnings():
            discriminator, report = cls.from_pretrained(tmp_path / "discriminator", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert_close(discriminator.eval()(**inputs).logits[keep], model._detect(*inputs.values(), {})[keep], **CLOSE)
    else:
        with no_warnings():
            pooler = {} if backbone == "distilbert" else {"add_pooling_layer": False}
            encoder = AutoModel.from_pretrained(tmp_path / "discriminator", **pooler).eval()
        states = model.discriminator.backbone(**inputs)[0]
        assert_close(encoder(**inputs)[0][keep], states[keep], **CLOSE)
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "discriminator")
    ours = model.discriminator.base_model.state_dict()
    theirs = tuned.base_model.state_dict()
    assert all(torch.equal(theirs[name], x) for name, x in ours.items())


def test_electra_folders_load_in_transformers_own_classes(tmp_path: Path) -> None:
    model, batch = joint_model(), masked_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    keep = batch["attention_mask"].bool()
    for stock in (False, True):
        folder = tmp_path / str(stock)
        model.save_generator(folder / "generator", stock=stock)
        model.save_discriminator(folder / "discriminator", stock=stock)
        for cls, name, part in (
            (ElectraForMaskedLM, "generator", model.generator),
            (ElectraForPreTraining, "discriminator", model.discriminator),
            (ElectraModel, "discriminator", model.discriminator.electra),
        ):
            with collect_warnings() as warned:
                loaded, report = cls.from_pretrained(folder / name, output_loading_info=True)
            assert not report["missing_keys"] and not report["mismatched_keys"]
            assert cls is ElectraModel or not report["unexpected_keys"]
            # That the folder says 'eff_electra' is worth a word; that it says 'electra', none.
            assert cls is ElectraModel or bool(warned) == (not stock), warned
            assert_close(loaded.eval()(**inputs)[0][keep], part(**inputs)[0][keep], **CLOSE)
    assert AutoConfig.from_pretrained(tmp_path / "True" / "generator").architectures == ["ElectraForMaskedLM"]
    by_auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "True" / "discriminator")
    assert type(by_auto) is ElectraForSequenceClassification
    assert (
        type(AutoModelForPreTraining.from_pretrained(tmp_path / "False" / "discriminator")) is EffElectraForPreTraining
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention": "nystromformer"}, "stock = True with attention = 'nystromformer': .* 'softmax' there"),
        ({"norm_position": "pre"}, "stock = True with norm_position = 'pre'"),
        ({"position_offset": 1}, "stock = True with position_offset = 1"),
        ({"rescale_embeddings": True}, "stock = True with rescale_embeddings = True"),
    ],
)
def test_what_transformers_electra_cannot_hold(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = encoder_config("eff_electra", **overrides)
    model = EffElectraForJointPreTraining(EffElectraJointConfig.from_discriminator(config, 0.5))
    with pytest.raises(ValueError, match=message):
        model.save_discriminator(tmp_path / "out", stock=True)
    assert not (tmp_path / "out").exists()
    model.save_discriminator(tmp_path / "out")
    with pytest.raises(ValueError, match="only ELECTRA has a stock form"):
        joint_model("eff_longformer").save_generator(tmp_path / "other", stock=True)


@pytest.mark.parametrize(("backbone", "sharing"), CASES)
def test_going_on_from_a_pair(backbone: str, sharing: str, tmp_path: Path) -> None:
    model, batch = build(backbone, sharing), masked_batch()
    folders = tmp_path / "generator", tmp_path / "discriminator"
    model.save_generator(folders[0]), model.save_discriminator(folders[1])
    again = EffElectraForJointPreTraining.from_pretrained_pair(*folders, sharing=sharing, temperature=0.7).eval()
    assert again.config.temperature == 0.7
    own_head = backbone in FAMILIES or backbone == "electra"
    for name, weight in model.state_dict().items():
        if own_head or ".dense" not in name.removeprefix("discriminator.backbone") or "backbone" in name:
            assert torch.equal(again.state_dict()[name], weight), name
    if own_head:
        again.config.temperature = 1.0
        assert_close(again(**batch).loss, model(**batch).loss, **CLOSE)
    for ours, theirs in again._tied_weights_keys.items():
        assert again.get_parameter(ours) is again.get_parameter(theirs)


def test_a_pair_of_transformers_models_in_memory(tmp_path: Path) -> None:
    """Published pairs are of type electra; models given instead of folders say of which class they are."""
    theirs = joint_model("electra")
    theirs.save_generator(tmp_path / "g"), theirs.save_discriminator(tmp_path / "d")
    ours = EffElectraForJointPreTraining.from_pretrained_pair(
        model_class("eff_electra", "AutoModelForMaskedLM").from_pretrained(tmp_path / "g"),
        EffElectraForPreTraining.from_pretrained(tmp_path / "d"),
    ).eval()
    assert ours.config.generator.model_type == "eff_electra"
    batch = masked_batch()
    assert_close(ours(**batch).loss, theirs(**batch).loss, atol=1e-4, rtol=1e-5)


def test_pairs_that_do_not_belong_together(tmp_path: Path) -> None:
    model, other = joint_model(), joint_model()
    randomise_(other, seed=1)
    model.save_generator(tmp_path / "g"), other.save_discriminator(tmp_path / "d")
    with pytest.raises(ValueError, match="differ; these two were not trained together: set sharing = 'none'"):
        EffElectraForJointPreTraining.from_pretrained_pair(tmp_path / "g", tmp_path / "d")
    EffElectraForJointPreTraining.from_pretrained_pair(tmp_path / "g", tmp_path / "d", sharing="none")


@EVERY_BACKBONE
def test_resize_of_embeddings(backbone: str, tmp_path: Path) -> None:
    model, batch = joint_model(backbone), masked_batch()
    with torch.no_grad():
        before = model(batch["input_ids"], batch["attention_mask"]).discriminator_logits
    model.resize_token_embeddings(80)
    assert model.config.generator.vocab_size == model.config.discriminator.vocab_size == 80
    with torch.no_grad():
        assert_close(model(batch["input_ids"], batch["attention_mask"]).discriminator_logits, before)
    for ours, theirs in model._tied_weights_keys.items():
        assert model.get_parameter(ours) is model.get_parameter(theirs)
    model(**batch).loss.backward()
    model.save_pretrained(tmp_path)
    again = EffElectraForJointPreTraining.from_pretrained(tmp_path).eval()
    assert_close(again(**batch).loss, model(**batch).loss, **CLOSE)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backend_and_dtype_reach_both(backbone: str, tmp_path: Path) -> None:
    model, batch = joint_model(backbone), masked_batch()
    model.save_pretrained(tmp_path)
    eager = EffElectraForJointPreTraining.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert {eager.generator.config._attn_implementation, eager.discriminator.config._attn_implementation} == {"eager"}
    assert_close(eager(**batch).loss, model(**batch).loss, atol=1e-4, rtol=1e-4)
    half = EffElectraForJointPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    assert half(**batch).loss.isfinite()


@pytest.mark.parametrize("size", ELECTRA_SIZES)
def test_published_sizes(size: str) -> None:
    """Table 6 of the paper; generators of the published base and large models are 256 wide with 4 heads."""
    config = EffElectraJointConfig.from_size(size, options={"sharing": "embeddings"}, vocab_size=1000)
    generator, discriminator = config.generator, config.discriminator
    expected = {
        "small": ((64, 1, 256, 12), (256, 4, 1024, 12), 128),
        "small++": ((256, 4, 1024, 12), (256, 4, 1024, 12), 128),
        "base": ((256, 4, 1024, 12), (768, 12, 3072, 12), 768),
        "large": ((256, 4, 1024, 24), (1024, 16, 4096, 24), 1024),
    }[size]
    for part, numbers in zip((generator, discriminator), expected, strict=False):
        found = (part.hidden_size, part.num_attention_heads, part.intermediate_size, part.num_hidden_layers)
        assert found == numbers and part.embedding_size == expected[2] and part.vocab_size == 1000
    with torch.device("meta"):
        model = EffElectraForJointPreTraining(config)
    assert len(model._tied_weights_keys) == 3


def test_a_size_for_another_family() -> None:
    cls = FAMILIES["eff_nystromformer"].module("configuration").EffNystromformerConfig
    config = EffElectraJointConfig.from_size("small", family=cls, num_landmarks=32, vocab_size=500)
    assert type(config.generator) is type(config.discriminator) is cls
    assert config.generator.num_landmarks == 32 and config.generator.hidden_size == 64


def test_a_shallower_generator_keeps_the_first_layers_options() -> None:
    config = EffElectraJointConfig.from_discriminator(encoder_config("eff_longformer"), 0.5, generator_layers=0.5)
    assert config.generator.num_hidden_layers == 1 and config.generator.attention_window == [8]


def test_the_config_without_arguments_is_electra_small() -> None:
    config = EffElectraJointConfig()
    assert (config.generator.hidden_size, config.discriminator.hidden_size) == (64, 256)
    assert config.loss_weight == 50 and config.objective == "electra" and config.sharing == "embeddings"


REFUSED = {
    "sharing": ({"sharing": "some"}, "sharing = 'some': choose one of embeddings, all, none"),
    "objective": ({"objective": "gan"}, "objective = 'gan': choose one of electra, electra_15"),
    "stage": ({"stage": "first"}, "stage = 'first': choose one of"),
    "training": ({"generator_training": "rl"}, "generator_training = 'rl': choose one of"),
    "temperature": ({"temperature": 0}, "temperature = 0: give a number from 0.001"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature = inf"),
    "weight": ({"discriminator_weight": -1}, "discriminator_weight = -1"),
    "no weight": ({"discriminator_weight": float("nan")}, "discriminator_weight = nan"),
    "seed": ({"sampling_seed": -1}, "sampling_seed = -1"),
    "large seed": ({"sampling_seed": 2**64}, "sampling_seed = 18446744073709551616"),
    "unknown": ({"sharings": "none"}, "has no option 'sharings'; did you mean 'sharing'"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings = False with sharing = 'embeddings'"),
    "vision": (
        {"generator": EffElectraConfig(), "discriminator": ViTConfig()},
        "the discriminator is a ViTConfig, which reads no text",
    ),
    "adversarial": (
        {"generator_training": "adversarial", "objective": "replace_mlm"},
        "the reward is how badly replaced tokens are detected",
    ),
    "stage and sharing": ({"stage": "generator"}, "nothing can be shared; set sharing = 'none'"),
    "stage and training": (
        {"stage": "generator", "sharing": "none", "generator_training": "adversarial"},
        "set stage = 'joint'",
    ),
    "vocabularies": ({"generator": EffElectraConfig(vocab_size=9)}, "the generator has 9 tokens and the discriminator"),
    "dict": ({"generator": {"vocab_size": 9}}, "generator is a dict without 'model_type'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_configs_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        EffElectraJointConfig(**options)


@pytest.mark.parametrize(("size", "layers"), [(0, 1.0), (1.5, 1.0), (0.5, 0.0), (0.5, 2.0), ("0.5", 1.0), (None, 1)])
def test_a_generator_is_a_share_of_the_discriminator(size: float, layers: float) -> None:
    with pytest.raises(ValueError, match="the generator is a share of the discriminator"):
        EffElectraJointConfig.from_discriminator(EffElectraConfig(), size, generator_layers=layers)


def test_names_of_sizes() -> None:
    with pytest.raises(ValueError, match="size = 'tiny': choose one of small, small"):
        EffElectraJointConfig.from_size("tiny")


SHARED_IN_VAIN = {
    "narrower BERT": ("bert", 0.5, "embeddings", "\\[64, 32\\] in the discriminator; give both one embedding_size"),
    "all of unequal size": ("eff_electra", 0.5, "all", "give both the same size, or set sharing = 'none'"),
}


@pytest.mark.parametrize("case", SHARED_IN_VAIN)
def test_sharing_that_sizes_forbid(case: str) -> None:
    backbone, size, sharing, message = SHARED_IN_VAIN[case]
    with pytest.raises(ValueError, match=message):
        EffElectraForJointPreTraining(joint_config(backbone, size, sharing=sharing))


def test_sharing_between_families() -> None:
    """Tables of other sizes or names cannot be shared; without sharing any two encoders go together."""
    parts = {"generator": encoder_config("eff_electra"), "discriminator": EffReformerConfig(vocab_size=64)}
    with pytest.raises(ValueError, match="only the (generator|discriminator) has the embeddings"):
        EffElectraForJointPreTraining(EffElectraJointConfig(**parts))
    mixed = {"generator": encoder_config("bert"), "discriminator": encoder_config("eff_performer"), "sharing": "none"}
    model = randomise_(EffElectraForJointPreTraining(EffElectraJointConfig(**mixed)))
    assert model(**masked_batch()).loss.isfinite()


@pytest.mark.parametrize("part", ["generator", "discriminator"])
@pytest.mark.parametrize("config", [GPT2Config, BartConfig])
def test_encoders_that_are_none(part: str, config: Any) -> None:
    parts = {"generator": EffElectraConfig(), "discriminator": EffElectraConfig(), part: config(vocab_size=30522)}
    with pytest.raises(ValueError, match=f"the {part} is a {config.__name__}, which is no encoder"):
        EffElectraForJointPreTraining(EffElectraJointConfig(**parts, sharing="none"))
    causal = encoder_config("eff_longformer", is_decoder=True, vocab_size=30522)
    with pytest.raises(ValueError, match=f"the {part} has is_decoder = True"):
        EffElectraJointConfig(**{**parts, part: causal})


def test_models_that_were_given_stay_as_they_are() -> None:
    model = joint_model(sharing="none")
    first, second = model.generator.bfloat16(), model.discriminator.bfloat16()
    joint = EffElectraForJointPreTraining.from_pretrained_pair(first, second, sharing="none")
    assert {x.dtype for x in joint.parameters()} == {torch.bfloat16}
    joint.resize_token_embeddings(80)
    assert first.config.vocab_size == second.config.vocab_size == 64


def test_pairs_of_other_classes_are_refused() -> None:
    model = joint_model("bert", 1)
    headless = BertModel(model.generator.config, add_pooling_layer=False)
    with pytest.raises(ValueError, match="there is no 'generator.*give models of these classes: BertForMaskedLM"):
        EffElectraForJointPreTraining.from_pretrained_pair(headless, model.discriminator, sharing="none")
    with pytest.raises(ValueError, match="has no option 'objectiv'; did you mean 'objective'"):
        EffElectraForJointPreTraining.from_pretrained_pair(model.generator, model.discriminator, objectiv="electra")


def test_the_second_stage_takes_encoders_of_one_size() -> None:
    model = joint_model(generator_size=0.5, sharing="none", stage="generator")
    with pytest.raises(ValueError, match="takes encoders of one size: derive the generator with generator_size = 1"):
        model.begin_discriminator_stage_()


def test_words_of_both_are_replaced_where_they_are_shared() -> None:
    for sharing in ("embeddings", "none"):
        model = joint_model(sharing=sharing)
        new = torch.nn.Embedding(64, 24)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new
        assert (model.generator.get_input_embeddings() is new) == (sharing == "embeddings")


def test_the_id_of_padding_is_that_of_both() -> None:
    config = joint_config("bert", sharing="none")
    config.pad_token_id = 3
    assert config.generator.pad_token_id == config.discriminator.pad_token_id == config.pad_token_id == 3
    config.discriminator.pad_token_id = None
    assert config.pad_token_id == 3


def test_hyperparameters_of_the_sizes() -> None:
    """Table 6 of the paper."""
    found = {
        name: (size.mask_probability, size.learning_rate, size.batch_size, size.train_steps, size.layer_decay)
        for name, size in ELECTRA_SIZES.items()
    }
    assert found["small"] == (0.15, 5e-4, 128, 1_000_000, 0.8)
    assert found["base"] == (0.15, 2e-4, 256, 766_000, 0.8)
    assert found["large"] == (0.25, 2e-4, 2048, 400_000, 0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, 39).long()}, r"labels must be \[batch, length\] = \[3, 40\], got \[3, 39\]"),
        ({"labels": torch.full((3, 40), 64)}, "labels contains 64, outside 0 to 63"),
        ({"labels": torch.ones(3, 40).bool()}, "labels are torch.bool"),
        ({"attention_mask": torch.ones(3, 7)}, "attention_mask must be"),
        ({"attention_mask": torch.full((3, 40), -1e4)}, "attention_mask contains -10000"),
        ({"input_ids": torch.full((3, 40), 64)}, "input_ids contains 64"),
        ({"input_ids": torch.rand(3, 40)}, "input_ids are torch.float32"),
        ({"output_attentions": True}, "ask model.generator or model.discriminator"),
        ({"input_ids": torch.zeros(4).long()}, "input_ids must be"),
        ({"next_sentence_label": torch.zeros(3)}, "unknown argument 'next_sentence_label'"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_model()(**{**masked_batch(), **change})


def test_another_config_is_refused() -> None:
    with pytest.raises(ValueError, match="needs an EffElectraJointConfig, got a EffElectraConfig"):
        EffElectraForJointPreTraining(EffElectraConfig())
