"""EffViT against transformers' ViT: equal weights, equal results, both spellings of names; every mechanism."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import TINY, TINY_IMAGES, model_class, no_warnings, random_images, randomise_, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import ViTConfig

from hf_efficient_attn import ATTENTIONS, EffViTConfig, EffViTForImageClassification


FAMILY = "eff_vit"
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BACKENDS = ("eager", "sdpa")
# Auto class -> transformers' class and the outputs to compare.
HEADS = {
    "AutoModel": ("ViTModel", ("last_hidden_state", "pooler_output")),
    "AutoModelForImageClassification": ("ViTForImageClassification", ("logits",)),
    "AutoModelForMaskedImageModeling": ("ViTForMaskedImageModeling", ("reconstruction",)),
}
EVERY_HEAD = pytest.mark.parametrize("auto", HEADS)
# A square, because transformers' head for masked images reads no other.
OPTIONS = {name: TINY[name] for name in TINY if name not in ("vocab_size", "max_position_embeddings")}
OPTIONS |= {**TINY_IMAGES, "image_size": 16}


def original_model(auto: str, **overrides: Any) -> Any:
    return randomise_(getattr(transformers, HEADS[auto][0])(ViTConfig(**{**OPTIONS, "num_labels": 3, **overrides})))


def pair(auto: str, folder: Path, backend: str = "sdpa", **overrides: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and ours loaded from what it saved."""
    original = original_model(auto, **overrides)
    original.save_pretrained(folder)
    with no_warnings():
        ours = model_class(FAMILY, auto).from_pretrained(folder, attn_implementation=backend)
    return original, ours.eval()


def assert_same(auto: str, ours: Any, original: Any) -> None:
    for name in HEADS[auto][1]:
        assert_close(ours[name], original[name], **CLOSE)


def some_patches(auto: str, patches: int = 16) -> dict[str, Tensor]:
    """Masked patches, for the head that has them."""
    mask = torch.arange(2 * patches).view(2, patches) % 3 == 0
    return {"bool_masked_pos": mask} if "Masked" in auto else {}


@EVERY_HEAD
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_are_equal(auto: str, backend: str, tmp_path: Path) -> None:
    original, ours = pair(auto, tmp_path, backend)
    original.set_attn_implementation(backend)
    inputs = {"pixel_values": random_images(2, 16, 16), **some_patches(auto)}
    wanted = {"output_hidden_states": True, "output_attentions": backend == "eager"}
    with torch.no_grad():
        theirs, mine = original(**inputs, **wanted), ours(**inputs, **wanted)
    assert_same(auto, mine, theirs)
    for a, b in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        assert_close(a, b, **CLOSE)
    if backend == "eager":
        for a, b in zip(mine.attentions, theirs.attentions, strict=True):
            assert_close(a, b, **CLOSE)


@EVERY_HEAD
def test_losses_and_gradients_are_equal(auto: str, tmp_path: Path) -> None:
    original, ours = pair(auto, tmp_path)
    inputs = {"pixel_values": random_images(2, 16, 16), **some_patches(auto)}
    if "Classification" in auto:
        inputs["labels"] = torch.tensor([2, 0])
    losses = []
    for model in (original.train(), ours.train()):
        outputs = model(**inputs)
        loss = outputs.last_hidden_state.square().sum() + outputs.pooler_output.sum() if auto == "AutoModel" else None
        losses.append(outputs.loss if loss is None else loss)
        losses[-1].backward()
    assert_close(losses[1], losses[0], **CLOSE)
    theirs = {_published(name, original): parameter for name, parameter in original.named_parameters()}
    found = dict(ours.named_parameters())
    assert set(found) == set(theirs)
    for name, parameter in found.items():
        assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


def _published(name: str, original: Any) -> str:
    """The name that transformers writes for one of its parameters: found by value, not by our own table."""
    return _NAMES[type(original).__name__][name]


_NAMES: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="module", autouse=True)
def names_on_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Parameters of each class of transformers -> the names that it writes by default."""
    for auto, (name, _) in HEADS.items():
        model, folder = original_model(auto), tmp_path_factory.mktemp(name)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(number)
        model.save_pretrained(folder)
        written = {tensor.flatten()[0].item(): name for name, tensor in load_file(folder / "model.safetensors").items()}
        _NAMES[name] = {name: written[number] for number, (name, _) in enumerate(model.named_parameters())}


@EVERY_HEAD
@pytest.mark.parametrize(
    "overrides",
    [{"qkv_bias": False}, {"hidden_act": "relu"}, {"pooler_output_size": 9, "pooler_act": "relu"}, {"num_channels": 1}],
    ids=str,
)
def test_other_options(auto: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    original, ours = pair(auto, tmp_path, **overrides)
    images = random_images(2, 16, 16)[:, : ours.config.num_channels]
    with torch.no_grad():
        assert_same(auto, ours(images), original(images))


@pytest.mark.parametrize("size", [(24, 16), (8, 32), (4, 4), (16, 20)])
def test_other_sizes_need_no_argument(size: tuple[int, int], tmp_path: Path) -> None:
    """What transformers computes with `interpolate_pos_encoding=True`."""
    auto = "AutoModelForImageClassification"
    original, ours = pair(auto, tmp_path)
    images = random_images(2, *size)
    with torch.no_grad():
        assert_same(auto, ours(images), original(images, interpolate_pos_encoding=True))


@EVERY_HEAD
@pytest.mark.parametrize("save_original_format", [True, False])
def test_both_spellings_on_disk_load_in_silence(auto: str, save_original_format: bool, tmp_path: Path) -> None:
    original = original_model(auto)
    original.save_pretrained(tmp_path / "theirs", save_original_format=save_original_format)
    written = set(load_file(tmp_path / "theirs" / "model.safetensors"))
    assert save_original_format == any(".query." in name for name in written)
    assert save_original_format != any(".q_proj." in name for name in written)
    with no_warnings():
        ours, report = model_class(FAMILY, auto).from_pretrained(tmp_path / "theirs", output_loading_info=True)
        ours.save_pretrained(tmp_path / "ours")
        again = model_class(FAMILY, auto).from_pretrained(tmp_path / "ours")
        again.save_pretrained(tmp_path / "again")
    assert not any(report.values()), report
    names = set(ours.state_dict())
    for folder in ("ours", "again"):
        assert set(load_file(tmp_path / folder / "model.safetensors")) == names, "one spelling, in memory and on disk"
    assert names == set(_NAMES[HEADS[auto][0]].values()), "the published one"
    images = random_images(2, 16, 16)
    with torch.no_grad():
        for model in (ours, again):
            assert_same(auto, model.eval()(images), original(images))


@EVERY_HEAD
def test_the_spelling_in_memory_loads(auto: str) -> None:
    original, images = original_model(auto), random_images(2, 16, 16)
    state = original.state_dict()
    assert any(".q_proj." in name for name in state), "transformers has other names in memory than on disk"
    with no_warnings():
        config = EffViTConfig(**{**OPTIONS, "num_labels": 3})
        loaded = model_class(FAMILY, auto).from_pretrained(None, config=config, state_dict=dict(state)).eval()
        filled = model_class(FAMILY, auto)(config).eval()
        assert not any(filled.load_state_dict(state)), "no key is missing, none is too many"
    assert any(".q_proj." in name for name in state), "the caller's dictionary stays as it is"
    with torch.no_grad():
        for model in (loaded, filled):
            assert_same(auto, model(images), original(images))
    assert set(loaded.state_dict()) == set(filled.state_dict()) == set(_NAMES[HEADS[auto][0]].values())


@EVERY_HEAD
def test_what_ours_saves_loads_in_transformers(auto: str, tmp_path: Path) -> None:
    ours = randomise_(model_class(FAMILY, auto)(EffViTConfig(**{**OPTIONS, "num_labels": 3})))
    ours.save_pretrained(tmp_path)
    loaded, report = getattr(transformers, HEADS[auto][0]).from_pretrained(
        tmp_path, config=ViTConfig.from_pretrained(tmp_path), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    images = random_images(2, 16, 16)
    with torch.no_grad():
        assert_same(auto, ours(images), loaded.eval()(images))


@pytest.mark.parametrize("head", ["AutoModelForImageClassification", "AutoBackbone"])
def test_a_head_loads_from_the_base_model_and_the_base_model_from_a_head(head: str, tmp_path: Path) -> None:
    base, images = original_model("AutoModel"), random_images(1, 16, 16)
    base.save_pretrained(tmp_path / "base")
    loaded = model_class(FAMILY, head).from_pretrained(tmp_path / "base")
    loaded.save_pretrained(tmp_path / "head")
    again = model_class(FAMILY, "AutoModel").from_pretrained(tmp_path / "head")
    with torch.no_grad():
        for model in (loaded.vit, again):
            assert_close(model.eval()(images).last_hidden_state, base(images).last_hidden_state, **CLOSE)


def test_parameters_of_base_at_224_pixels() -> None:
    with torch.device("meta"):
        model = EffViTForImageClassification(EffViTConfig(num_labels=1000))
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656


@pytest.mark.parametrize("how", ["argument", "config", "auto", "state"])
def test_positions_are_resized_at_load(how: str, tmp_path: Path) -> None:
    """Afterwards images of the new size read the table as it is."""
    auto = "AutoModelForImageClassification"
    original = original_model(auto)
    original.save_pretrained(tmp_path)
    cls, size = model_class(FAMILY, auto), [24, 32]
    with no_warnings():
        config = EffViTConfig.from_pretrained(tmp_path, image_size=size)
        if how == "argument":
            ours = cls.from_pretrained(tmp_path, image_size=size)
        elif how == "config":
            ours = cls.from_pretrained(tmp_path, config=config)
        elif how == "state":
            ours = cls.from_pretrained(None, config=config, state_dict=original.state_dict())
        else:
            cls.from_pretrained(tmp_path).save_pretrained(tmp_path / "ours")
            ours = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours", image_size=size)
    assert config.image_size == size, "the caller's config stays as it is"
    assert ours.config.native_grid == (6, 8) and ours.vit.embeddings.position_embeddings.shape == (1, 49, 32)
    images = random_images(2, *size)
    with torch.no_grad():
        assert_same(auto, ours.eval()(images), original(images, interpolate_pos_encoding=True))
    ours.save_pretrained(tmp_path / "resized")
    assert json.loads((tmp_path / "resized" / "config.json").read_text())["image_size"] == size
    with torch.no_grad():
        assert torch.equal(cls.from_pretrained(tmp_path / "resized").eval()(images).logits, ours(images).logits)


MECHANISMS: dict[str, dict[str, Any]] = {
    "big_bird": {"block_size": 4, "num_random_blocks": 1, "num_global_tokens": 2, "global_ends": False},
    "local": {"local_attn_chunk_length": 4, "local_num_chunks_after": 1},
    "longformer": {"attention_window": [4, 8]},
    "lsh": {"lsh_attn_chunk_length": 4, "num_hashes": 2, "hash_seed": 3},
    "neighborhood": {"radius": [1, 2]},
    "nystromformer": {"num_landmarks": 4, "conv_kernel_size": 3},
    "performer": {"num_features": 16, "projection_seed": 5},
    "softmax": {},
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mechanism_by_name(name: str, backend: str, tmp_path: Path) -> None:
    """Options arrive, survive a folder, backends are equal, weights come where asked, every parameter learns."""
    auto = "AutoModelForImageClassification"
    config = tiny_config(FAMILY, attention=name, attention_options=MECHANISMS[name], num_register_tokens=1)
    config._attn_implementation = backend
    model = randomise_(model_class(FAMILY, auto)(config))
    for attention in model.vit.encoder.attentions():
        assert type(attention) is ATTENTIONS[name]
        assert all(getattr(attention.options, key) == value for key, value in MECHANISMS[name].items())
    images = random_images(2, 20, 28)
    outputs = model(images, output_attentions=backend == "eager")
    if backend == "eager":
        assert [weights.shape for weights in outputs.attentions] == [(2, 4, 37, 37)] * 2
    model.save_pretrained(tmp_path)
    with no_warnings():
        again = model_class(FAMILY, auto).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert_close(again(images).logits, outputs.logits, atol=1e-5, rtol=1e-5)
    model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_class_token_and_registers_are_global() -> None:
    """A window of one patch alone would carry nothing from a far patch to the class token in one layer."""
    options = {"attention": "longformer", "attention_options": {"attention_window": 2}, "num_hidden_layers": 1}
    for registers in (0, 3):
        model = randomise_(
            model_class(FAMILY, "AutoModel")(tiny_config(FAMILY, num_register_tokens=registers, **options))
        )
        images = random_images(1).requires_grad_()
        states = model(images).last_hidden_state
        for token in (0, registers):
            (gradient,) = torch.autograd.grad(states[0, token].sum(), images, retain_graph=True)
            assert (gradient.abs().amax(dim=(0, 1)) > 0).all()
        (gradient,) = torch.autograd.grad(states[0, 1 + registers].sum(), images)
        assert (gradient[0, :, 12:, 8:] == 0).all(), "the first patch does not see the last one"
