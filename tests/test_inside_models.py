"""Mechanisms inside in-tree models: order of layers, saving and loading, fresh processes, and what is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import random_ids, random_images, randomise_
from inside_cases import MODELS, NO_DROPOUT, PIXELS, SIZES, SMALL, TEXT, implementation
from torch import nn
from transformers import AutoModel, PreTrainedModel

from hf_efficient_attn import EffLongformerConfig, EffLongformerModel, use_efficient_attention
from hf_efficient_attn.integrations import register_attention
from hf_efficient_attn.integrations.layers import layer_of
from hf_efficient_attn.integrations.names import MECHANISM_NAMES
from hf_efficient_attn.integrations.options import FIELD
from hf_efficient_attn.integrations.probe import modules_with_the_interface


EVERY_MODEL = pytest.mark.parametrize("model_name", MODELS)


def numbers(model: nn.Module) -> list[int]:
    return [layer_of(module) for module in modules_with_the_interface(model)]


def some_mechanism(model_name: str) -> str:
    """One with random numbers of each layer's own."""
    return "performer" if MODELS[model_name].is_causal else "lsh"


@EVERY_MODEL
def test_layers_are_numbered_in_order(model_name: str) -> None:
    """By the helper and without it, in copies, and where two models have one config object."""
    case = MODELS[model_name]
    model = case.build()
    assert numbers(model) == [0, 1]
    config = model.config
    second = type(model)(config)
    assert numbers(second) == [0, 1]
    assert numbers(copy.deepcopy(second)) == [0, 1]
    third = use_efficient_attention(case.build(), some_mechanism(model_name))
    assert numbers(third) == [0, 1]
    assert {layer_of(x) for x in list(modules_with_the_interface(third))[1:2]} == {1}


def test_a_layer_without_a_model_raises() -> None:
    layer = transformers.models.vit.modeling_vit.ViTAttention(MODELS["ViT"].config())
    with pytest.raises(ValueError, match="ViTAttention belongs to no model"):
        layer_of(layer)


@pytest.mark.parametrize("name", ["performer", "lsh", "block_sparse"])
@torch.no_grad()
def test_layers_have_random_numbers_of_their_own(name: str) -> None:
    """Two layers that are exchanged give something else, unless they have the same numbers."""
    case = MODELS["ViT"]
    model = use_efficient_attention(case.build(), name, **SMALL[name])
    inputs = case.inputs()
    before = model(**inputs)[0]
    first, second = model.layers[0].attention, model.layers[1].attention
    first._efficient_attention_layer, second._efficient_attention_layer = 1, 0
    assert (model(**inputs)[0] - before).abs().max() > 1e-3
    seeds = {"performer": "projection_seed", "lsh": "hash_seed", "block_sparse": "random_seed"}
    use_efficient_attention(model, name, **SMALL[name], **{seeds[name]: 5})
    assert (model(**inputs)[0] - before).abs().max() > 1e-3


@EVERY_MODEL
@torch.no_grad()
def test_options_and_results_survive_saving(model_name: str, tmp_path: Path) -> None:
    case, name = MODELS[model_name], some_mechanism(model_name)
    model = use_efficient_attention(case.build(), name, **SMALL[name])
    inputs = case.inputs()
    right = case.run(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert getattr(loaded.config, FIELD) == {name: SMALL[name]}
    assert loaded.config._attn_implementation == "sdpa"
    for auto in (type(model), AutoModel):
        again = auto.from_pretrained(tmp_path, attn_implementation=implementation(name)).eval()
        ours = again(**inputs)[0] if auto is type(model) else again.base_model(**inputs)[0]
        if auto is type(model) or case.head == "Model":
            torch.testing.assert_close(ours, right, rtol=0, atol=1e-6)
    loaded.set_attn_implementation(implementation(name))
    torch.testing.assert_close(case.run(loaded.eval(), **inputs), right, rtol=0, atol=1e-6)


@torch.no_grad()
def test_heads_and_towers_count_their_own_layers(tmp_path: Path) -> None:
    """A tower gives inside a larger model what it gives alone."""
    name = "performer"
    head = randomise_(transformers.ViTForImageClassification(MODELS["ViT"].config()))
    use_efficient_attention(head, name, **SMALL[name])
    pixels = random_images(1, 24, 24)
    right = head.base_model(pixels)[0]
    alone = transformers.ViTModel(MODELS["ViT"].config(), add_pooling_layer=False)
    alone.load_state_dict(head.base_model.state_dict())
    use_efficient_attention(alone.eval(), name, **SMALL[name])
    torch.testing.assert_close(alone(pixels)[0], right, rtol=0, atol=1e-6)

    text, vision = SIZES | TEXT | {"projection_size": 32, "eos_token_id": 2, "bos_token_id": 1}, SIZES | PIXELS
    both = randomise_(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))
    inputs = {"input_ids": random_ids(2, 20), "pixel_values": random_images(2, 24, 24)}
    before = both(**inputs)
    use_efficient_attention(both, name, **SMALL[name])
    after = both(**inputs)
    for output in ("text_embeds", "image_embeds"):
        assert (after[output] - before[output]).abs().max() > 1e-3, output
    both.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation(name)).eval()
    torch.testing.assert_close(loaded(**inputs).logits_per_text, after.logits_per_text, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_model_that_pools_padding_gives_something_else() -> None:
    """As README says; without a mask, or without padding, it is the model itself."""
    config = transformers.SiglipTextConfig(**SIZES, vocab_size=64, eos_token_id=2, bos_token_id=1)
    model = randomise_(transformers.SiglipTextModel(config))
    ids, mask = random_ids(1, 12), torch.tensor([[1] * 7 + [0] * 5])
    calls = {"padded": (ids, mask), "no mask": (ids, None), "alone": (ids[:, :7], torch.ones(1, 7))}
    right = {name: model(ids, mask) for name, (ids, mask) in calls.items()}
    use_efficient_attention(model, "nystrom")
    ours = {name: model(ids, mask) for name, (ids, mask) in calls.items()}
    distance = {name: (ours[name].pooler_output - right[name].pooler_output).abs().max() for name in calls}
    assert distance["padded"] > 1e-2 and max(distance["no mask"], distance["alone"]) < 1e-5
    torch.testing.assert_close(ours["padded"][0][:, :7], right["padded"][0][:, :7], rtol=0, atol=1e-5)


def test_a_projection_that_inference_drew_serves_training() -> None:
    model = use_efficient_attention(MODELS["Bert"].build(), "performer", num_features=17, projection_seed=123)
    inputs = MODELS["Bert"].inputs()
    with torch.inference_mode():
        model(**inputs)
    model(**inputs)[0].sum().backward()


def test_mechanisms_keep_their_options_beside_each_other() -> None:
    model = MODELS["Bert"].build()
    use_efficient_attention(model, "nystrom", num_landmarks=8)
    use_efficient_attention(model, "sliding_window", attention_window=[4, 8])
    assert getattr(model.config, FIELD) == {
        "nystrom": {"num_landmarks": 8},
        "sliding_window": {"attention_window": [4, 8]},
    }


FRESH = """
import sys
import hf_efficient_attn
assert "torch" not in sys.modules
from transformers import AutoModel
import torch
model = AutoModel.from_pretrained({folder!r}, attn_implementation="eff:performer").eval()
ids = torch.arange(5, 45)[None]
print(model(ids)[0].double().sum().item())
"""


@torch.no_grad()
def test_a_fresh_process_finds_the_names(tmp_path: Path) -> None:
    """With no class of this package in use."""
    model = use_efficient_attention(MODELS["DistilBert"].build(), "performer", **SMALL["performer"])
    model.save_pretrained(tmp_path)
    right = model(torch.arange(5, 45)[None])[0].double().sum().item()
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FRESH.format(folder=str(tmp_path))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert abs(float(run.stdout) - right) < 1e-3


def test_names_are_registered_at_once_where_transformers_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = list(sys.meta_path)
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", {})
        register_attention()
        assert implementation("nystrom") in interface._global_mapping
    assert sys.meta_path == finders


# What is refused.

SMALL_TEXT = SIZES | TEXT | NO_DROPOUT
IGNORING: dict[str, dict[str, object]] = {
    "BigBird": {"block_size": 4, "attention_type": "original_full"},
    "Canine": {"num_hash_buckets": 16, "local_transformer_stride": 8},
    "ConvBert": {"embedding_size": 32},
    "DebertaV2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "FNet": {},
    "IBert": {},
    "Longformer": {"attention_window": 4},
    "MPNet": {},
    "MegatronBert": {},
    "Nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "RoFormer": {},
    "SqueezeBert": {"embedding_size": 32},
    "Yoso": {},
}


@pytest.mark.parametrize("model_type", IGNORING)
def test_a_model_that_would_ignore_the_choice_raises(model_type: str) -> None:
    fields = {**SMALL_TEXT, **IGNORING[model_type]}
    config = getattr(transformers, f"{model_type}Config")(**fields)
    model = getattr(transformers, f"{model_type}Model")(config)
    implementation_before = model.config._attn_implementation
    with pytest.raises(ValueError, match="does not call attention through transformers' interface") as error:
        use_efficient_attention(model, "nystrom")
    assert model_type in str(error.value)
    assert not hasattr(model.config, FIELD)
    assert model.config._attn_implementation == implementation_before


def test_a_part_that_would_ignore_the_choice_raises() -> None:
    """Though another part follows it."""
    text, vision = transformers.MPNetConfig(**SMALL_TEXT), MODELS["ViT"].config()
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    model = transformers.VisionTextDualEncoderModel(config)
    with pytest.raises(ValueError, match="MPNetModel, a part of VisionTextDualEncoderModel, does not call.*MPNetSelf"):
        use_efficient_attention(model, "nystrom")
    assert not hasattr(model.vision_model.config, FIELD)
    text = MODELS["Bert"].config()
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)
    use_efficient_attention(transformers.VisionTextDualEncoderModel(config), "nystrom")


def test_no_random_number_is_drawn() -> None:
    """ViTMAE's forward pass draws a mask, in evaluation too."""
    fields = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES, **PIXELS, **fields))
    before = torch.get_rng_state()
    use_efficient_attention(model, "nystrom")
    assert torch.equal(torch.get_rng_state(), before)


SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2}


@pytest.mark.parametrize(("model_type", "fields"), [("Swin", SWIN), ("LayoutLM", SMALL_TEXT)])
def test_a_model_with_a_mask_of_its_own_raises(model_type: str, fields: dict[str, object]) -> None:
    model = getattr(transformers, f"{model_type}Model")(getattr(transformers, f"{model_type}Config")(**fields))
    with pytest.raises(ValueError, match=f"{model_type}.*Attention makes a mask or bias of its own, of shape"):
        use_efficient_attention(model, "nystrom")
    assert not hasattr(model.config, FIELD)


@pytest.mark.parametrize("model_type", ["Bart", "Marian"])
def test_models_with_cross_attention_raise(model_type: str) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_layers": 1, "vocab_size": 64, "d_kv": 8}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_heads": 4, "pad_token_id": 0}
    config = getattr(transformers, f"{model_type}Config")(**sizes, decoder_start_token_id=0)
    model = getattr(transformers, f"{model_type}Model")(config)
    with pytest.raises(ValueError, match="cross-attention"):
        use_efficient_attention(model, "sliding_window")
    assert not hasattr(model.config, FIELD)


def bert() -> PreTrainedModel:
    return MODELS["Bert"].build()


REFUSED = [
    ({"mechanism": "nystorm"}, "there is no mechanism 'nystorm'.*Did you mean 'nystrom'"),
    ({"mechanism": "nystrom", "landmarks": 8}, "'nystrom' has no option 'landmarks'.*Did you mean 'num_landmarks'"),
    ({"mechanism": "nystrom", "conv_kernel_size": 3}, "'nystrom' has no option 'conv_kernel_size'"),
    ({"mechanism": "nystrom", "num_landmarks": 0}, "num_landmarks = 0: it must be 1 or more"),
    ({"mechanism": "lsh", "chunk_rule": "paper"}, "'lsh' has no option 'chunk_rule'"),
    ({"mechanism": "lsh", "num_buckets": 3}, "num_buckets = 3"),
    ({"mechanism": "block_sparse", "block_size": 0}, "block_size = 0"),
    ({"mechanism": "performer", "kernel": "cosine"}, "kernel = 'cosine'"),
    ({"mechanism": "sliding_window", "attention_window": 7}, "attention_window = 7.*use 8"),
    ({"mechanism": "sliding_window", "attention_window": [4]}, "1 entries and none for layer 1"),
    ({"mechanism": "sliding_window", "attention_dilation": 0}, "attention_dilation = 0"),
    ({"mechanism": "sliding_window", "num_global_tokens": -1}, "num_global_tokens = -1"),
    ({"mechanism": "neighborhood"}, "needs tokens in rows and columns, and a BertConfig has no image_size"),
    ({"mechanism": None, "num_landmarks": 3}, "mechanism = None takes no options, got num_landmarks"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_there_is_not_raises_and_leaves_the_model_as_it_was(arguments: dict, message: str) -> None:
    model = bert()
    use_efficient_attention(model, "lsh", num_hashes=3)
    with pytest.raises(ValueError, match=message):
        use_efficient_attention(model, **arguments)
    assert getattr(model.config, FIELD) == {"lsh": {"num_hashes": 3}}
    assert model.config._attn_implementation == "eff:lsh"


def test_models_of_this_package_and_wrapped_ones_raise() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
    ours = EffLongformerModel(EffLongformerConfig(**sizes, vocab_size=32))
    with pytest.raises(ValueError, match="has a mechanism of its own"):
        use_efficient_attention(ours, "nystrom")
    with pytest.raises(ValueError, match="model is a DataParallel; give a model of transformers, unwrapped"):
        use_efficient_attention(nn.DataParallel(bert()), "nystrom")


def test_a_config_by_hand_is_checked() -> None:
    model = MODELS["Bert"].build(attn_implementation="eff:nystrom")
    setattr(model.config, FIELD, {"num_landmarks": 8})
    with pytest.raises(ValueError, match="dictionary of options by mechanism.*'num_landmarks'"):
        model(random_ids(1, 5))
    setattr(model.config, FIELD, {"nystrom": {"landmarks": 8}})
    with pytest.raises(ValueError, match="Did you mean 'num_landmarks'"):
        model(random_ids(1, 5))


def test_a_grid_that_is_not_the_images_raises() -> None:
    model = use_efficient_attention(MODELS["ViT"].build(), "neighborhood", grid=[9, 9])
    with pytest.raises(ValueError, match="grid of 9 x 9 patches and 1 before them, but the input has 37 tokens"):
        model(**MODELS["ViT"].inputs())
    with pytest.raises(ValueError, match="rows and columns of patches, both 1 or more"):
        use_efficient_attention(model, "neighborhood", grid=[0, 9])
    assert set(MECHANISM_NAMES) == set(SMALL)


@pytest.mark.parametrize(("model_name", "front"), [("Dinov2", 1), ("Dinov2WithRegisters", 4), ("SiglipVision", 0)])
@pytest.mark.parametrize("helped", [True, False])
@torch.no_grad()
def test_images_of_another_size_have_a_grid_of_their_own(model_name: str, front: int, helped: bool) -> None:
    """A radius that reaches everything is softmax at the right grid, and the wrong one is refused, never guessed."""
    fields = SIZES | PIXELS | {"image_size": 24, "num_register_tokens": 3, "mlp_ratio": 2}
    config = getattr(transformers, f"{model_name}Config")(**fields)
    model = randomise_(getattr(transformers, f"{model_name}Model")(config))
    other, options = random_images(1, 32, 16), {"interpolate_pos_encoding": True} if front == 0 else {}
    right = model(other, **options)[0]
    grid = {"radius": [7, 3], "grid": [8, 4]}
    if helped:
        use_efficient_attention(model, "neighborhood", radius=1)
    else:
        setattr(model.config, FIELD, {"neighborhood": {"radius": 1}})
        model.set_attn_implementation(implementation("neighborhood"))
    own = model(random_images(1, 24, 24), output_hidden_states=True)
    assert len(own.hidden_states) == 3
    before = f" and {front} before them" if front else ""
    for size, tokens in (((32, 16), 32), ((32, 32), 64)):
        with pytest.raises(ValueError, match=f"6 x 6 patches{before}, but the input has {tokens + front} tokens.*give"):
            model(random_images(1, *size), **options)
    if helped:
        use_efficient_attention(model, "neighborhood", **grid)
    else:
        setattr(model.config, FIELD, {"neighborhood": grid})
    torch.testing.assert_close(model(other, **options)[0], right, rtol=0, atol=1e-5)
