"""Laws of every vision family and every one of its heads, over the table of families."""

import copy
import pickle

import pytest
import torch
from helpers import feed_forward_of, layers_of, model_class, random_images, randomise_, tiny_config
from test_families import _Allocations
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_efficient_attn.attention import ATTENTIONS
from hf_efficient_attn.auto import VISION_FAMILIES


HEADS = [(family, auto) for family, row in VISION_FAMILIES.items() for auto in row.heads]
HEADS = [(family, auto) for family, auto in HEADS if auto != "AutoModelForPreTraining"]
HEAD = pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{family}-{auto}" for family, auto in HEADS])
FAMILY = pytest.mark.parametrize("family", VISION_FAMILIES)
BACKEND = pytest.mark.parametrize("backend", ["sdpa", "eager"])
# Smaller and larger than the table of 4 x 3 patches, and uneven ones, in pixels.
SIZES = [(4, 4), (16, 12), (12, 16), (40, 24), (17, 9), (1, 30)]

# Mechanisms with options small enough for some tens of patches.
MECHANISMS: dict[str, dict[str, object]] = {
    "big_bird": {"block_size": 4, "num_random_blocks": 1},
    "local": {"local_attn_chunk_length": 4, "local_num_chunks_after": 1},
    "longformer": {"attention_window": 8},
    "lsh": {"lsh_attn_chunk_length": 4, "num_hashes": 2},
    "neighborhood": {"radius": [1, 2]},
    "nystromformer": {"num_landmarks": 4, "conv_kernel_size": 3},
    "performer": {"num_features": 16},
    "softmax": {},
}
MECHANISM = pytest.mark.parametrize("mechanism", ATTENTIONS)


def build(family: str, auto: str, mechanism: str = "softmax", **overrides: object) -> PreTrainedModel:
    """A tiny model with random weights and one register, in eval mode."""
    options = {"attention": mechanism, "attention_options": MECHANISMS[mechanism], "num_register_tokens": 1}
    return randomise_(model_class(family, auto)(tiny_config(family, **{**options, **overrides})))


def one_layer_of(mechanism: str) -> dict[str, object]:
    """What makes `build(..., mechanism)` a model of a single layer."""
    one_radius = {"attention_options": {"radius": 2}} if mechanism == "neighborhood" else {}
    return {"num_hidden_layers": 1, **one_radius}


def grid_of(height: int, width: int) -> tuple[int, int]:
    return -(-height // 4), -(-width // 4)


def batch_of(auto: str, batch: int, height: int = 16, width: int = 12) -> dict[str, Tensor]:
    """Images, and labels for a head."""
    inputs = {"pixel_values": random_images(batch, height, width)}
    if auto == "AutoModelForImageClassification":
        return {**inputs, "labels": torch.arange(batch) % 2}
    if auto == "AutoModelForMaskedImageModeling":
        rows, columns = grid_of(height, width)
        inputs["bool_masked_pos"] = torch.arange(batch * rows * columns).view(batch, -1) % 2 == 0
    return inputs


def result_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output that is not the loss, with the batch first."""
    outputs = model(**{name: x for name, x in inputs.items() if name != "labels"})
    for name in ("feature_maps", "reconstruction", "logits", "last_hidden_state"):
        if name in outputs:
            return outputs[name][-1] if name == "feature_maps" else outputs[name]
    raise AssertionError(f"{type(outputs)} has no result")


def loss_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    if outputs.get("loss") is not None:
        return outputs.loss
    if "feature_maps" in outputs:
        return outputs.feature_maps[-1].square().mean()
    return outputs.last_hidden_state.square().mean() + outputs.pooler_output.sum()


def mixed_sizes(images: list[Tensor], corner: str, poison: float | None = None) -> dict[str, Tensor]:
    """Images `[3, height, width]` in one batch with their patch mask; `poison` stands in the padding."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height // 4, width // 4, dtype=torch.long)
    if poison is not None:
        pixels.fill_(poison)
    for row, image in enumerate(images):
        top = height - image.shape[1] if "bottom" in corner else 0
        left = width - image.shape[2] if "right" in corner else 0
        pixels[row, :, top : top + image.shape[1], left : left + image.shape[2]] = image
        mask[row, top // 4 : (top + image.shape[1]) // 4, left // 4 : (left + image.shape[2]) // 4] = 1
    return {"pixel_values": pixels, "patch_mask": mask}


@HEAD
@MECHANISM
def test_any_size_works_and_is_the_callers(family: str, auto: str, mechanism: str) -> None:
    model = build(family, auto, mechanism)
    for train in (False, True):
        model.train(train)
        for size in SIZES:
            rows, columns = grid_of(*size)
            inputs = batch_of(auto, 2, *size)
            loss_of(model, inputs).backward()
            outputs = model(**inputs, output_hidden_states=True)
            assert all(x.shape == (2, 2 + rows * columns, 32) for x in outputs.hidden_states)
            if "reconstruction" in outputs:
                assert outputs.reconstruction.shape == (2, 3, *size)
            if "feature_maps" in outputs:
                assert outputs.feature_maps[-1].shape == (2, 32, rows, columns)


@HEAD
@MECHANISM
@BACKEND
@pytest.mark.parametrize("corner", ["top left", "bottom right"])
def test_alone_is_padded_is_batched(family: str, auto: str, mechanism: str, backend: str, corner: str) -> None:
    """Images of different size in one batch: padding on any side, whatever is in it, changes nothing."""
    model = build(family, auto, mechanism, attn_implementation=backend, pooling="mean")
    images = [random_images(1, *size, seed=size[0])[0] for size in ((20, 36), (8, 12), (4, 4), (32, 8))]
    alone = [result_of(model, {"pixel_values": image[None]})[0] for image in images]
    for poison in (None, 1e3, float("inf"), float("nan")):
        batch = mixed_sizes(images, corner, poison)
        flat = {**batch, "patch_mask": batch["patch_mask"].flatten(1).bool()}
        found = result_of(model, batch)
        assert (
            torch.equal(
                result_of(model, flat),
                found,
            )
            or poison is not None
        )
        for row, expected in enumerate(alone):
            keep, mine = batch["patch_mask"][row].bool(), found[row]
            if auto == "AutoModel":
                mine = mine[torch.cat([keep.new_ones(2), keep.flatten()])]
            elif auto == "AutoBackbone":
                assert (mine[:, ~keep] == 0).all()
                mine, expected = mine[:, keep], expected.flatten(1)
            elif auto == "AutoModelForMaskedImageModeling":
                pixels = keep.repeat_interleave(4, 0).repeat_interleave(4, 1)
                mine, expected = mine[:, pixels], expected.flatten(1)
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-5)


@FAMILY
@MECHANISM
def test_weights_of_a_mixed_batch_stand_at_their_tokens(family: str, mechanism: str) -> None:
    model = build(family, "AutoModel", mechanism, attn_implementation="eager")
    images = [random_images(1, *size, seed=size[0])[0] for size in ((20, 36), (8, 12))]
    batch = mixed_sizes(images, "top left")
    weights = model(**batch, output_attentions=True).attentions
    alone = model(images[1][None], output_attentions=True).attentions
    keep = torch.cat([torch.ones(2), batch["patch_mask"][1].flatten()]).bool()
    for a, b in zip(weights, alone, strict=True):
        assert (a[1][:, ~keep] == 0).all() and (a[1][:, :, ~keep] == 0).all()
        torch.testing.assert_close(a[1][:, keep][:, :, keep], b[0], rtol=1e-5, atol=1e-5)


@HEAD
def test_poisoned_padding_reaches_no_gradient(family: str, auto: str) -> None:
    model = build(family, auto).train()
    images = [random_images(1, *size, seed=size[0])[0] for size in ((8, 12), (16, 8))]
    gradients = []
    for poison in (None, float("nan")):
        batch = mixed_sizes(images, "top left", poison)
        if "Masked" in auto:
            batch["bool_masked_pos"] = torch.arange(24).view(2, 12) % 2 == 0
        outputs = model(**batch)
        if auto == "AutoModel":
            loss = outputs.pooler_output.square().sum()
        elif auto == "AutoBackbone":
            loss = outputs.feature_maps[-1].square().sum()
        else:
            loss = outputs.logits.square().sum() if outputs.get("loss") is None else outputs.loss
        parameters = [parameter for parameter in model.parameters()]
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@HEAD
def test_a_mask_of_ones_is_no_mask(family: str, auto: str) -> None:
    model = build(family, auto)
    inputs = batch_of(auto, 2, 20, 28)
    ones = torch.ones(2, 5, 7, dtype=torch.long)
    assert torch.equal(result_of(model, {**inputs, "patch_mask": ones}), result_of(model, inputs))


@HEAD
@pytest.mark.parametrize(
    "overrides",
    [{}, {"pooling": "mean"}, {"pooling": "mean", "use_cls_token": False}, {"num_register_tokens": 0}],
    ids=str,
)
def test_every_parameter_gets_a_gradient(family: str, auto: str, overrides: dict[str, object]) -> None:
    model = build(family, auto, **overrides).train()
    inputs = batch_of(auto, 2, 20, 28)
    loss_of(model, inputs).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not [name for name in missing if auto != "AutoBackbone"], missing
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@HEAD
def test_eval_is_deterministic_and_changes_nothing(family: str, auto: str) -> None:
    model = build(family, auto)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    large, small = batch_of(auto, 2, 40, 24), batch_of(auto, 2, 8, 8)
    first = result_of(model, large)
    loss_of(model, small), loss_of(model.train(), large), model.eval()
    assert torch.equal(result_of(model, large), first), "no call may change what the next one computes"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())


@HEAD
@MECHANISM
def test_gradient_checkpointing_gives_equal_gradients(family: str, auto: str, mechanism: str) -> None:
    dropout = {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.2}
    plain = build(family, auto, mechanism, **dropout).train()
    checkpointed = copy.deepcopy(plain)
    name = "activation_checkpointing" if hasattr(plain, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(checkpointed, f"{name}_enable")()
    inputs, calls = batch_of(auto, 2, 20, 28), []
    feed_forward_of(layers_of(checkpointed)[0])[0].register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        loss_of(model, inputs).backward()
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=lambda m: f"{name}: {m}")  # noqa: B023


@FAMILY
def test_recorded_states_and_weights_have_the_documented_shapes(family: str) -> None:
    model = build(family, "AutoModel", attn_implementation="eager")
    images = random_images(2, 20, 28)
    outputs = model(images, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in outputs.hidden_states] == [(2, 37, 32)] * 3
    assert [x.shape for x in outputs.attentions] == [(2, 4, 37, 37)] * 2
    assert torch.equal(model.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    found = build(family, "AutoModel")(images, output_hidden_states=True)
    for a, b in zip(outputs.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    as_tuple = model(images, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.last_hidden_state)
    with pytest.raises(ValueError, match="only the eager backend has attention weights"):
        build(family, "AutoModel")(images, output_attentions=True)


@HEAD
def test_copies_and_pickles_still_record(family: str, auto: str) -> None:
    model = build(family, auto)
    inputs = batch_of(auto, 1)
    states = model(**inputs, output_hidden_states=True).hidden_states
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = again(**inputs, output_hidden_states=True).hidden_states
        assert len(found) == len(states) == 3
        assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))


@FAMILY
@MECHANISM
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "sdpa"), (torch.float16, "sdpa"), (torch.bfloat16, "eager")]
)
def test_trains_in_half_precision(family: str, mechanism: str, dtype: torch.dtype, backend: str) -> None:
    """Autocast training learns a tiny problem: no inf or NaN, and a last loss of at most 0.7 of the first."""
    torch.manual_seed(0)
    auto = "AutoModelForImageClassification"
    options = {"attention": mechanism, "attention_options": MECHANISMS[mechanism], "attn_implementation": backend}
    model = model_class(family, auto)(tiny_config(family, **options, attention_probs_dropout_prob=0.1)).train()
    inputs = batch_of(auto, 8, 20, 28)
    inputs["pixel_values"][:, :, 4:12, 4:12] += 2.0 * (2 * inputs["labels"] - 1)[:, None, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] <= 0.7 * losses[0], losses


@FAMILY
@MECHANISM
def test_memory_is_linear_in_the_patches(family: str, mechanism: str) -> None:
    """Bytes allocated forward and backward at 8,192 patches against 4,096, and the largest tensor kept for backward."""
    # Softmax attention over everything is linear in memory where torch has a fused kernel: not with dropout on a CPU.
    dropout = 0.0 if mechanism == "softmax" else 0.1
    model = build(family, "AutoModel", mechanism, attention_probs_dropout_prob=dropout, num_hidden_layers=1).train()

    def run(rows: int) -> tuple[int, int]:
        largest = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        inputs = batch_of("AutoModel", 1, 4 * rows, 256)
        with _Allocations() as allocations, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss_of(model, inputs).backward()
        return allocations.total, largest

    short, _ = run(64)
    long, largest = run(128)
    assert long <= 2.1 * short
    assert largest < 8192**2


@HEAD
def test_modules_are_named_for_sharding(family: str, auto: str) -> None:
    model = build(family, auto)
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    assert model.main_input_name == "pixel_values" and model.input_modalities == ("image",)
    assert isinstance(model.get_input_embeddings().projection, nn.Conv2d)


@FAMILY
@MECHANISM
@pytest.mark.parametrize("train", [False, True])
def test_shapes_without_values(family: str, mechanism: str, train: bool) -> None:
    """On the meta device, as tools that plan memory run a model."""
    options = {"attention": mechanism, "attention_options": MECHANISMS[mechanism]}
    with torch.device("meta"):
        model = model_class(family, "AutoModel")(tiny_config(family, hidden_dropout_prob=0.1, **options)).train(train)
        images = torch.zeros(2, 3, 20, 28)
    assert model(images).last_hidden_state.shape == (2, 36, 32)


@FAMILY
def test_layers_of_the_users_own(family: str) -> None:
    """Whatever stands in for a linear map or a dropout, and whoever watches them, training goes on."""
    model = build(family, "AutoModelForImageClassification", hidden_dropout_prob=0.3).train()
    first, second = layers_of(model)
    first.output.dense = nn.Sequential(first.output.dense, nn.Tanh())
    first.attention.output.dropout = nn.AlphaDropout(0.5)
    first.attention.output.dense.register_full_backward_hook(lambda *_: None)
    seen = []
    second.output.dropout.register_forward_pre_hook(lambda module, args: seen.append(args))
    second.attention.output.dropout = nn.Identity()
    loss_of(model, batch_of("AutoModelForImageClassification", 2)).backward()
    assert len(seen) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())
