"""EffReformer's reversible layers: gradients of the same layers without reversing, in memory of a few of them."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layers_of, mask_of, model_class, random_ids, randomise_, tiny_config
from processes import run_two
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hf_efficient_attn import FAMILIES
from hf_efficient_attn.attention import lsh


FAMILY = "eff_reformer"
HEADS = [auto for auto in FAMILIES[FAMILY].heads if auto not in ("AutoModelForPreTraining", "AutoModelForTextEncoding")]
EXACT = {"atol": 1e-10, "rtol": 1e-8}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def build(auto: str = "AutoModel", **overrides: Any) -> PreTrainedModel:
    """Four layers with dropout everywhere, in training, in float64."""
    options = {**DROPOUT, "num_hidden_layers": 4, **overrides}
    return randomise_(model_class(FAMILY, auto)(tiny_config(FAMILY, **options))).double().train()


def pair(auto: str = "AutoModel", **overrides: Any) -> list[PreTrainedModel]:
    """Equal models with reversible layers and without."""
    return [build(auto, reversible=reversible, **overrides) for reversible in (True, False)]


def inputs_of(auto: str, length: int, lengths: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Inputs of three texts and their labels."""
    ids = random_ids(3, length)
    inputs = {"input_ids": ids}
    if lengths:
        inputs["attention_mask"] = mask_of(list(lengths), length, "left")
    if "MultipleChoice" in auto:
        inputs = {name: torch.stack([x, x.roll(1, 0)], dim=1) for name, x in inputs.items()}
    if "QuestionAnswering" in auto:
        ends = torch.full((3,), length - 1)
        return {**inputs, "start_positions": torch.tensor([0, length - 1, 0]), "end_positions": ends}
    per_token = "LM" in auto or "Token" in auto
    return inputs if auto == "AutoModel" else {**inputs, "labels": ids % 2 if per_token else torch.tensor([0, 1, 1])}


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    outputs = model(**inputs)
    return outputs.loss if "loss" in outputs else outputs.last_hidden_state.sin().sum()


def grads_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: x.grad for name, x in model.named_parameters()}


def assert_same(found: Tensor | None, right: Tensor | None, name: str = "", **close: float) -> None:
    """Of a parameter that counts nothing, the gradient may be 0 or absent."""
    found, right = (torch.zeros(()) if x is None or (x == 0).all() else x for x in (found, right))
    assert_close(found, right, **(close or EXACT), check_dtype=False, msg=lambda text: f"{name}: {text}")


def assert_equal_grads(models: list[PreTrainedModel], inputs: dict[str, Tensor], **close: float) -> None:
    found, right = (grads_of(model, inputs) for model in models)
    for name, grad in right.items():
        assert_same(found[name], grad, name, **close)


@pytest.mark.parametrize("auto", HEADS)
@pytest.mark.parametrize("lengths", [(), (50, 23, 1)], ids=["whole", "padded"])
def test_gradients_of_every_head(auto: str, lengths: tuple[int, ...]) -> None:
    assert_equal_grads(pair(auto), inputs_of(auto, 50, lengths), atol=1e-6, rtol=1e-6)  # losses are in float32


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("length", [1, 16, 17, 64, 1030])
def test_gradients_at_any_length(length: int, decoder: bool) -> None:
    """Beyond 1,024 tokens the feed-forward branch goes through chunks, and so does its dropout."""
    models = pair(is_decoder=decoder, max_position_embeddings=1100)
    assert_equal_grads(models, inputs_of("AutoModel", length, (length, length // 2 + 1, 1)))


def test_gradients_where_saved_tensors_are_moved_away() -> None:
    model, inputs = build(), inputs_of("AutoModel", 20)
    right = grads_of(model, inputs)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss_of(model, inputs).backward()
    for name, x in model.named_parameters():
        assert_same(x.grad, right[name], name)


def _switch(model: nn.Module, loss: Tensor) -> None:
    model.eval()
    loss.backward()


REFUSED: dict[str, tuple[str, Callable[[nn.Module, Tensor], Any]]] = {
    "eval": (r"train\(\) and eval\(\)", _switch),
    "graph of a gradient": ("create_graph=True", lambda model, loss: loss.backward(create_graph=True)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_computed_again_is_refused(name: str) -> None:
    message, call = REFUSED[name]
    model = build()
    with pytest.raises(RuntimeError, match=message):
        call(model, loss_of(model, inputs_of("AutoModel", 20)))


def test_a_hooks_own_weights_are_not_forgotten() -> None:
    model = build()
    factor = nn.Parameter(torch.ones(32, dtype=torch.float64))
    attention = layers_of(model)[1].attention
    attention.register_forward_hook(lambda module, args, output: (output[0] * factor, output[1]))
    with pytest.raises(RuntimeError, match=r"shape \[32\].*reversible=False"):
        loss_of(model, inputs_of("AutoModel", 20)).backward()
    attention.scale = factor  # now it is the layer's
    loss_of(model, inputs_of("AutoModel", 20)).backward()
    assert (factor.grad != 0).any()


OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {"chunk_size_feed_forward": 7},
    "one chunk": {"chunk_size_feed_forward": 1000},
    "eager": {"attn_implementation": "eager"},
    "paper": {"chunk_rule": "paper"},
    "local": {"attn_layers": ["local"]},
    "lsh": {"attn_layers": ["lsh"], "num_hashes": 4},
    "hundreds of buckets": {"num_buckets": [16, 32], "attn_layers": ["lsh"]},
    "many buckets": {"num_buckets": [256, 256], "attn_layers": ["lsh"]},
    "one layer": {"num_hidden_layers": 1, "attn_layers": ["lsh"]},
    "learned positions": {"axial_pos_embds": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_with_options(name: str) -> None:
    assert_equal_grads(pair(**OPTIONS[name]), inputs_of("AutoModel", 50, (50, 23, 1)))


def test_gradients_under_autocast() -> None:
    """Branches in bfloat16, states in float32: what is computed again may be rounded to the other side."""
    found = []
    for model in pair():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model.float(), inputs_of("AutoModel", 50, (50, 23, 1)))
        loss.backward()
        found.append({name: x.grad for name, x in model.named_parameters()})
    for name, grad in found[1].items():
        assert found[0][name].dtype == torch.float32
        assert (found[0][name] - grad).norm() <= 0.02 * grad.norm(), name


class _Made(TorchDispatchMode):
    """Every storage that operations make, other than views of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, tuple | list) else [result]:
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def kept(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if not storage.expired())


def kept_bytes(layers: int, **overrides: Any) -> int:
    """What one forward pass in training leaves for the backward pass."""
    options = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 256, **overrides}
    model = build(**options, max_position_embeddings=1024).float()
    inputs = {"input_ids": random_ids(2, 1024), "attention_mask": mask_of([1024, 700], 1024)}
    with _Made() as storages:
        loss = loss_of(model, inputs)
        kept = storages.kept()
    loss.backward()
    return kept


def test_memory_does_not_grow_with_depth() -> None:
    few, many = kept_bytes(2), kept_bytes(12)
    assert many <= 1.1 * few, (few, many)
    assert kept_bytes(12, reversible=False) >= 3 * kept_bytes(2, reversible=False) > 3 * few


def test_backward_twice() -> None:
    model, inputs = build(), inputs_of("AutoModel", 50)
    right = {name: 2 * grad for name, grad in grads_of(model, inputs).items()}
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, x in model.named_parameters():
        assert torch.equal(x.grad, right[name]), name


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gradients_of_some_parameters(layer: int) -> None:
    found = []
    for model in pair():
        wanted = list(model.encoder.layers[layer].parameters())[:3]
        found.append(torch.autograd.grad(loss_of(model, inputs_of("AutoModel", 50)), wanted))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **EXACT)


FROZEN = {
    "embeddings": lambda model: [model.embeddings],
    "lower layers": lambda model: [model.embeddings, *model.encoder.layers[:2]],
    "lower layers alone": lambda model: model.encoder.layers[:2],
    "upper layers": lambda model: model.encoder.layers[2:],
    "all but a norm": lambda model: [model.embeddings, model.encoder.layers[0], model.encoder.layers[1].attention],
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parts(name: str) -> None:
    models = pair()
    for model in models:
        for part in FROZEN[name](model):
            part.requires_grad_(False)
    assert_equal_grads(models, inputs_of("AutoModel", 50))


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_embedded_inputs(frozen: bool) -> None:
    """Also with nothing else to learn, as in prompt tuning."""
    found = []
    for model in pair():
        model.requires_grad_(not frozen)
        embedded = model.get_input_embeddings()(random_ids(3, 50)).detach().requires_grad_()
        keep = mask_of([50, 23, 1], 50)
        loss = loss_of(model, {"inputs_embeds": embedded, "attention_mask": keep})
        found.append(torch.autograd.grad(loss, embedded)[0])
        assert (found[-1][keep == 0] == 0).all()
    assert_close(*found, **EXACT)


@pytest.mark.parametrize("wanted", [(1,), (4,), (2, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("last", [False, True], ids=["", "and last"])
def test_gradients_of_recorded_states(wanted: tuple[int, ...], last: bool) -> None:
    """Where only those of a middle layer count, the layers above have no backward pass that could find its states."""
    found = []
    for model in pair():
        torch.manual_seed(0)
        outputs = model(**inputs_of("AutoModel", 50), output_hidden_states=True)
        loss = sum(outputs.hidden_states[index].sin().sum() for index in wanted)
        loss = loss + outputs.last_hidden_state.cos().sum() if last else loss
        found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


def test_recorded_weights() -> None:
    found = []
    for model in pair(attn_implementation="eager"):
        torch.manual_seed(0)
        outputs = model(**inputs_of("AutoModel", 50), output_attentions=True)
        loss = sum(weights.square().sum() for weights in outputs.attentions) + outputs.last_hidden_state.sin().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, **EXACT)


# What a user's hook may make of a layer's outputs `(y2, y1)`.
HOOKS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "half": lambda module, args, output: tuple(x / 2 for x in output),
    "one of them": lambda module, args, output: (output[0], output[1].tanh()),
    "swapped": lambda module, args, output: output[::-1],
    "nothing": lambda module, args, output: None,
    "copies": lambda module, args, output: tuple(x.clone() for x in output),
    "detached": lambda module, args, output: tuple(x.detach() for x in output),
    "one detached": lambda module, args, output: (output[0].detach(), output[1]),
}


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_hooks_that_change_a_layers_output(name: str, layer: int) -> None:
    models = pair()
    for model in models:
        layers_of(model)[layer].register_forward_hook(HOOKS[name])
    assert_equal_grads(models, inputs_of("AutoModel", 50))


@pytest.mark.parametrize("stream", [0, 1])
def test_changes_in_place_are_refused(stream: int) -> None:
    model, inputs = build(), inputs_of("AutoModel", 50)
    right = grads_of(model, inputs)
    model.zero_grad()
    handle = layers_of(model)[1].register_forward_hook(lambda module, args, output: (output[stream].mul_(2), None)[1])
    with pytest.raises(RuntimeError, match="changed in place.*makes a new tensor, or reversible=False"):
        loss_of(model, inputs).backward()
    handle.remove()
    for name, grad in grads_of(model, inputs).items():
        assert torch.equal(grad, right[name]), name


def test_exchanged_parameters_are_refused() -> None:
    """They would get no gradient at all."""
    model, inputs = build(), inputs_of("AutoModel", 20)
    other = {name: x.detach().clone().requires_grad_() for name, x in model.named_parameters()}
    states = torch.func.functional_call(model, other, (inputs["input_ids"],)).last_hidden_state
    with pytest.raises(RuntimeError, match="other parameters than in its forward pass.*reversible=False"):
        states.sum().backward()


@pytest.mark.parametrize("reversible", [True, False])
def test_gradient_checkpointing(reversible: bool) -> None:
    """Accepted; it works where layers are not reversed, and is idle where they are."""
    plain = build(reversible=reversible)
    checkpointed = copy.deepcopy(plain)
    # transformers renamed the switch and keeps the old name, with a warning.
    name = "activation_checkpointing" if hasattr(plain, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(checkpointed, f"{name}_enable")()
    calls: list[int] = []
    layers_of(checkpointed)[1].register_forward_pre_hook(lambda *_: calls.append(1))
    assert_equal_grads([checkpointed, plain], inputs_of("AutoModel", 50, (50, 23, 1)))
    assert len(calls) == (1 if reversible else 2)


def test_layers_hash_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are computed again would fall into other buckets now and then."""
    calls, right = [], lsh.hash_buckets

    def spy(vectors: Tensor, *args: Any) -> Tensor:
        calls.append(vectors.shape[0])
        # As if rounding had moved every vector.
        return right(vectors, *args) if len(calls) <= 2 else right(-vectors, *args)

    monkeypatch.setattr(lsh, "hash_buckets", spy)
    model, inputs = build(), inputs_of("AutoModel", 50)
    found = grads_of(model, inputs)
    assert calls == [3, 3], "one call for each of the two LSH layers"
    monkeypatch.undo()
    for name, grad in grads_of(model, inputs).items():
        assert torch.equal(grad, found[name]), name


@pytest.mark.parametrize("reversible", [True, False])
def test_a_step_leaves_config_and_random_state_alone(reversible: bool) -> None:
    """But for the dropout of the forward pass, as anywhere."""
    model = build(reversible=reversible, num_buckets=None, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    loss = model(**inputs_of("AutoModel", 100)).last_hidden_state.sum()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == config
    model = build(reversible=reversible)
    loss = loss_of(model, inputs_of("AutoModel", 100))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state), "the backward pass draws nothing that others see"


DISTRIBUTED = """
from torch.nn.parallel import DistributedDataParallel
from test_reformer import build, inputs_of, loss_of

model = DistributedDataParallel(build("AutoModelForCausalLM"), find_unused_parameters=False)
for step in range(2):
    mine = {name: x[rank : rank + 1] for name, x in inputs_of("AutoModelForCausalLM", 50).items()}
    model.zero_grad()
    loss_of(model, mine).backward()
if rank == 0:
    torch.save({name: x.grad for name, x in model.module.named_parameters()}, f"{folder}/grads")
"""


def test_two_processes(tmp_path: Path) -> None:
    """The mean of the gradients that each text has alone; every parameter is used, in the eyes of DDP, too."""
    run_two(DISTRIBUTED, tmp_path)
    model, inputs = build("AutoModelForCausalLM"), inputs_of("AutoModelForCausalLM", 50)
    alone = [
        {name: x.clone() for name, x in grads_of(model, {k: x[row : row + 1] for k, x in inputs.items()}).items()}
        for row in range(2)
    ]
    for name, grad in torch.load(tmp_path / "grads").items():
        assert_close(
            grad, (alone[0][name] + alone[1][name]) / 2, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("auto", HEADS)
def test_gradients_on_a_gpu(auto: str) -> None:
    """The GPU's random state is replayed as well."""
    models = [model.cuda() for model in pair(auto)]
    inputs = {name: x.cuda() for name, x in inputs_of(auto, 50, (50, 23, 1)).items()}
    state = torch.cuda.get_rng_state()
    assert_equal_grads(models, inputs, atol=1e-6, rtol=1e-6)
    assert not torch.equal(torch.cuda.get_rng_state(), state)
