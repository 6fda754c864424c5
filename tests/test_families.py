"""Laws of every family and every one of its heads, over the table of families."""

import copy
import pickle
import tempfile

import pytest
import torch
from helpers import (
    DETECTOR,
    config_class,
    feed_forward_of,
    layers_of,
    mask_of,
    model_class,
    random_ids,
    randomise_,
    tiny_config,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hf_efficient_attn.auto import TEXT_FAMILIES


HEADS = [(family, auto) for family, row in TEXT_FAMILIES.items() for auto in dict.fromkeys(row.heads)]
HEADS = [(f, a) for f, a in HEADS if a not in ("AutoModelForPreTraining", "AutoModelForTextEncoding")]
HEADS += [(family, DETECTOR) for family in TEXT_FAMILIES]
HEAD = pytest.mark.parametrize(("family", "auto"), HEADS, ids=[f"{f}-{a}" for f, a in HEADS])
FAMILY = pytest.mark.parametrize("family", TEXT_FAMILIES)
LENGTHS = (1, 7, 63, 64, 100)


def build(family: str, auto: str, **overrides: object) -> PreTrainedModel:
    """A tiny model with random weights, in eval mode; a causal one with a prefix of global tokens where it may."""
    cls = config_class(family)
    if auto == "AutoModelForCausalLM" and "causal_global" in cls.__dataclass_fields__:
        overrides = {"causal_global": "prefix", **overrides}
    return randomise_(model_class(family, auto)(tiny_config(family, **overrides)))


def has_global_tokens(model: PreTrainedModel) -> bool:
    return hasattr(model.config, "global_attention")


def mark_global(keep: Tensor, causal: bool) -> Tensor:
    """The last token of each example, in a causal model the first: `[..., length]` 0 or 1 like the mask `keep`."""
    counted = keep.long().cumsum(-1) if causal else keep.flip(-1).long().cumsum(-1).flip(-1)
    return ((counted == 1) & keep.bool()).long()


def batch_of(model: PreTrainedModel, auto: str, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs and labels for a head; one token is global where the family has global tokens."""
    ids = random_ids(batch, length, seed=seed)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if has_global_tokens(model):
        inputs["global_attention_mask"] = mark_global(torch.ones_like(ids), model.config.is_decoder)
    if auto == "AutoModelForMultipleChoice":
        inputs = {name: torch.stack([x, x.flip(0)], dim=1) for name, x in inputs.items()}
        return {**inputs, "labels": torch.arange(batch) % 2}
    if auto == "AutoModelForSequenceClassification":
        return {**inputs, "labels": torch.arange(batch) % 2}
    if auto in ("AutoModelForTokenClassification", DETECTOR):
        return {**inputs, "labels": ids % 2}
    if auto in ("AutoModelForMaskedLM", "AutoModelForCausalLM"):
        return {**inputs, "labels": ids}
    if auto == "AutoModelForQuestionAnswering":
        return {
            **inputs,
            "start_positions": torch.zeros(batch).long(),
            "end_positions": torch.full((batch,), length - 1),
        }
    return inputs


def result_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first output that is not the loss, with the batch first."""
    inputs = {name: x for name, x in inputs.items() if "label" not in name and "positions" not in name}
    return model(**inputs).to_tuple()[0]


def loss_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    if "loss" in outputs:
        return outputs.loss
    # Some published base models have no pooler.
    pooled = outputs.get("pooler_output")
    return outputs.last_hidden_state.square().mean() + (0.0 if pooled is None else pooled.sum())


@HEAD
@pytest.mark.parametrize("train", [False, True])
def test_any_length_works_and_is_the_callers(family: str, auto: str, train: bool) -> None:
    model = build(family, auto, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train(train)
    for length in (*LENGTHS, model.config.max_input_length):
        inputs = batch_of(model, auto, 2, length)
        loss_of(model, inputs).backward()
        outputs = model(**inputs, output_hidden_states=True)
        assert all(states.shape[1] == length for states in outputs.hidden_states)
        for name in ("last_hidden_state", "start_logits", "end_logits"):
            assert name not in outputs or outputs[name].shape[1] == length
        if auto in ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForTokenClassification", DETECTOR):
            assert outputs.logits.shape[:2] == (2, length)


@HEAD
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_alone_is_padded_is_batched(family: str, auto: str, side: str, backend: str) -> None:
    """Also with other ids and types in the padding, and with token types of its own."""
    model = build(family, auto, attn_implementation=backend)
    lengths, length = [45, 100, 1], 100
    keep = mask_of(lengths, length, side)
    inputs = batch_of(model, auto, 3, length)
    choices = auto == "AutoModelForMultipleChoice"
    mask = keep[:, None].expand(-1, 2, -1) if choices else keep
    inputs = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask", "global_attention_mask")}
    inputs["attention_mask"] = mask.clone()
    if "global_attention_mask" in inputs:
        inputs["global_attention_mask"] = mark_global(mask, model.config.is_decoder)
    batched = result_of(model, inputs)
    typed = dict(inputs)
    if model.config.type_vocab_size > 0:
        typed["token_type_ids"] = inputs["input_ids"] % 2
    poisoned = {name: torch.where(mask.bool(), typed[name], 1) for name in typed if name.endswith("_ids")}
    found = result_of(model, {**typed, **poisoned})
    per_token = found.dim() >= 2 and found.shape[1] == length
    for row in range(3):
        own = keep[row].bool()
        pick = own if per_token else slice(None)
        for together, given in ((batched, inputs), (found, typed)):
            alone = result_of(model, {name: x[row : row + 1, ..., own] for name, x in given.items()})
            torch.testing.assert_close(together[row][pick], alone[0], rtol=1e-5, atol=2e-5)


@HEAD
def test_the_loss_does_not_depend_on_the_amount_of_padding(family: str, auto: str) -> None:
    model = build(family, auto)
    inputs = batch_of(model, auto, 2, 20)
    padded = {name: x if x.dim() == 1 else nn.functional.pad(x, (0, 9)) for name, x in inputs.items()}
    if "labels" in inputs and inputs["labels"].dim() > 1:
        padded["labels"] = nn.functional.pad(inputs["labels"], (0, 9), value=-100)
    if auto != "AutoModel":
        torch.testing.assert_close(loss_of(model, padded), loss_of(model, inputs), rtol=1e-5, atol=1e-5)


@HEAD
@pytest.mark.parametrize("idle", [True, False])
def test_every_parameter_gets_a_gradient(family: str, auto: str, idle: bool) -> None:
    model = build(family, auto).train()
    inputs = batch_of(model, auto, 2, 33)
    if idle and "global_attention_mask" in inputs:
        inputs["global_attention_mask"] = torch.zeros_like(inputs["global_attention_mask"])
    loss_of(model, inputs).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@HEAD
def test_eval_is_deterministic_and_changes_nothing(family: str, auto: str) -> None:
    model = build(family, auto)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    config, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    long, short = batch_of(model, auto, 2, 100), batch_of(model, auto, 2, 3)
    first = result_of(model, long)
    loss_of(model, short), loss_of(model.train(), long), model.eval()
    assert torch.equal(result_of(model, long), first), "no call may change what the next one computes"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())


@HEAD
def test_gradient_checkpointing_gives_equal_gradients(family: str, auto: str) -> None:
    plain = build(family, auto, attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2).train()
    checkpointed = copy.deepcopy(plain)
    # transformers renamed the switch and keeps the old name, with a warning.
    name = "activation_checkpointing" if hasattr(plain, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(checkpointed, f"{name}_enable")()
    assert getattr(checkpointed, f"is_{name}")
    inputs = batch_of(plain, auto, 2, 41)
    calls = []
    feed_forward_of(layers_of(checkpointed)[0])[0].register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        loss_of(model, inputs).backward()
    assert len(calls) == 2, "the layer is computed again in the backward pass"
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=lambda m: f"{name}: {m}")  # noqa: B023


@FAMILY
def test_recorded_states_and_weights_have_the_documented_shapes(family: str) -> None:
    model = build(family, "AutoModel", attn_implementation="eager")
    inputs = batch_of(model, "AutoModel", 2, 37)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    config = model.config
    assert [x.shape for x in outputs.hidden_states] == [(2, 37, config.hidden_size)] * (config.num_hidden_layers + 1)
    assert [x.shape for x in outputs.attentions] == [(2, config.num_attention_heads, 37, 37)] * config.num_hidden_layers
    assert outputs.last_hidden_state.shape == (2, 37, config.output_size)
    if config.output_size == config.hidden_size:
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    sdpa = build(family, "AutoModel")
    found = sdpa(**inputs, output_hidden_states=True)
    for a, b in zip(outputs.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    as_tuple = sdpa(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found.last_hidden_state)


@FAMILY
def test_copies_and_pickles_still_record(family: str) -> None:
    model = build(family, "AutoModel")
    inputs = batch_of(model, "AutoModel", 1, 9)
    states = model(**inputs, output_hidden_states=True).hidden_states
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = again(**inputs, output_hidden_states=True).hidden_states
        assert len(found) == len(states)
        assert all(torch.equal(a, b) for a, b in zip(found, states, strict=True))


@FAMILY
def test_a_copy_keeps_the_users_hooks(family: str) -> None:
    model = build(family, "AutoModel")
    layers_of(model)[0].register_forward_hook(_halve)
    inputs = batch_of(model, "AutoModel", 1, 9)
    assert torch.equal(result_of(copy.deepcopy(model), inputs), result_of(model, inputs))


def _halve(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return output / 2 if isinstance(output, Tensor) else tuple(x / 2 for x in output)


@FAMILY
def test_answers_in_padding_or_past_the_input_are_ignored(family: str) -> None:
    model = build(family, "AutoModelForQuestionAnswering")
    ids, keep = random_ids(3, 20), mask_of([20, 12, 7], 20, "left")
    positions = torch.tensor([3, 0, 40])
    loss = model(ids, keep, start_positions=positions, end_positions=positions).loss
    alone = model(ids[:1], keep[:1], start_positions=positions[:1], end_positions=positions[:1]).loss
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    none = torch.full((3,), 40)
    assert model(ids, keep, start_positions=none, end_positions=none).loss == 0


@HEAD
def test_loads_through_meta_device_and_dtype(family: str, auto: str) -> None:
    model = build(family, auto)
    inputs = batch_of(model, auto, 2, 37)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cls = type(model)
        for loaded in (cls.from_pretrained(folder), cls.from_pretrained(folder, device_map="cpu")):
            assert not any(x.is_meta for x in (*loaded.parameters(), *loaded.buffers()))
            for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
                assert torch.equal(a, b), name
            torch.testing.assert_close(result_of(loaded.eval(), inputs), result_of(model, inputs), rtol=1e-6, atol=1e-6)
        half = cls.from_pretrained(folder, dtype=torch.bfloat16)
        assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
        assert result_of(half.eval(), inputs).dtype == torch.bfloat16


@FAMILY
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.bfloat16, "sdpa"), (torch.float16, "sdpa"), (torch.bfloat16, "eager")]
)
def test_trains_in_half_precision(family: str, dtype: torch.dtype, backend: str) -> None:
    """Autocast training learns a tiny problem: no inf or NaN, and a last loss of at most 0.7 of the first."""
    torch.manual_seed(0)
    auto = "AutoModelForSequenceClassification"
    config = tiny_config(family, attn_implementation=backend, attention_probs_dropout_prob=0.1)
    model = model_class(family, auto)(config).train()
    inputs = batch_of(model, auto, 8, 50)
    inputs["input_ids"][:, 10:20] = inputs["labels"][:, None] + 7
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    losses = []
    for _ in range(30):
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


class _Allocations(TorchDispatchMode):
    """Sums the bytes of every tensor that an operation makes."""

    total = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # What an operation is given to write into, it does not make.
        given = (*args, *kwargs.values())
        storages = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.total += tensor.untyped_storage().nbytes()
        return result


@FAMILY
def test_memory_is_linear_in_length(family: str) -> None:
    """Bytes allocated forward and backward at 8,192 tokens against 4,096, and the largest tensor kept for backward."""
    # Softmax attention over everything is linear in memory where torch has a fused kernel: not with dropout on a CPU.
    quadratic = getattr(tiny_config(family), "attention", None) == "softmax"
    dropout = 0.0 if quadratic else 0.1
    model = build(family, "AutoModel", max_position_embeddings=8200, attention_probs_dropout_prob=dropout)
    model.train()

    def run(length: int) -> tuple[int, int]:
        largest = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        inputs = batch_of(model, "AutoModel", 1, length)
        with _Allocations() as allocations, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss_of(model, inputs).backward()
        return allocations.total, largest

    short, _ = run(4096)
    long, largest = run(8192)
    assert long <= 2.1 * short
    assert largest < 8192**2


@FAMILY
def test_resize_of_embeddings(family: str) -> None:
    model = build(family, "AutoModelForMaskedLM")
    inputs = batch_of(model, "AutoModelForMaskedLM", 2, 12)
    before = result_of(model, inputs)
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == 80
    after = result_of(model, inputs)
    assert after.shape[-1] == 80
    torch.testing.assert_close(after[..., :64], before, rtol=0, atol=1e-6)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
    torch.testing.assert_close(result_of(again, inputs), after, rtol=0, atol=1e-7)


@HEAD
def test_modules_are_named_for_sharding(family: str, auto: str) -> None:
    model = build(family, auto)
    names = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= names
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.main_input_name == "input_ids"


@FAMILY
@pytest.mark.parametrize("train", [False, True])
def test_shapes_without_values(family: str, train: bool) -> None:
    """On the meta device, as tools that plan memory run a model."""
    with torch.device("meta"):
        model = model_class(family, "AutoModel")(tiny_config(family, hidden_dropout_prob=0.1)).train(train)
        ids = torch.zeros(2, 20, dtype=torch.long)
    assert model(ids).last_hidden_state.shape == (2, 20, model.config.output_size)


@FAMILY
def test_layers_of_the_users_own(family: str) -> None:
    """Whatever stands in for a linear map or a dropout, and whoever watches them, training goes on."""
    model = build(family, "AutoModelForSequenceClassification", hidden_dropout_prob=0.3).train()
    first, second = layers_of(model)
    output = feed_forward_of(first)[1]
    output.dense = nn.Sequential(output.dense, nn.Tanh())
    first.attention.output.dropout = nn.AlphaDropout(0.5)
    first.attention.output.dense.register_full_backward_hook(lambda *_: None)
    seen = []
    feed_forward_of(second)[1].dropout.register_forward_pre_hook(lambda module, args: seen.append(args))
    second.attention.output.dropout = nn.Identity()
    loss_of(model, batch_of(model, "AutoModelForSequenceClassification", 2, 20)).backward()
    assert len(seen) == 1
    assert all(parameter.grad is not None for parameter in model.parameters())
