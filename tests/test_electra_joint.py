"""Joint pretraining against its definition: losses, gradients, sampling, the paper's ablations."""

import copy
from typing import Any

import pytest
import torch
from electra_cases import BACKBONES, LENGTHS, PROJECTING, joint_config, joint_model, masked_batch, originals
from oracles import electra as oracle
from torch import Tensor, nn
from torch.testing import assert_close

from hf_efficient_attn import EffElectraForJointPreTraining
from hf_efficient_attn.pretraining.sampling import row_seeds, sample_tokens


EVERY_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_equal_grads(found: dict[str, Tensor], expected: dict[str, Tensor], **close: float) -> None:
    for name, grad in expected.items():
        assert_close(found[name], grad, msg=lambda m: f"{name}: {m}", **(close or CLOSE))  # noqa: B023


def expected_loss(model: Any, batch: dict[str, Tensor], corrupted: Tensor) -> Tensor:
    """The loss from logits of all tokens, as the formulas say."""
    inputs = {"attention_mask": batch["attention_mask"]}
    keep, masked = batch["attention_mask"].bool(), batch["labels"] != -100
    original, config = originals(batch), model.config
    generator = model.generator(input_ids=batch["input_ids"], **inputs).logits
    loss = oracle.masked_lm_loss(generator, batch["labels"])
    if config.detects:
        logits = model.discriminator(input_ids=corrupted, **inputs)
        logits = logits.logits if hasattr(logits, "logits") else logits[0]
        counted = masked if config.objective == "electra_15" else keep
        return loss + config.loss_weight * oracle.detection_loss(logits, corrupted, original, counted)
    outputs = model.discriminator(input_ids=corrupted, **inputs, output_hidden_states=True)
    if config.objective == "replace_mlm":
        return loss + config.loss_weight * oracle.masked_lm_loss(outputs.logits, batch["labels"])
    copied = model.copy_head(outputs.hidden_states[-1]).squeeze(-1)
    return loss + config.loss_weight * oracle.copy_loss(outputs.logits, copied, corrupted, original, keep)


@EVERY_BACKBONE
@pytest.mark.parametrize("objective", ["electra", "electra_15"])
def test_loss_and_gradients_are_those_of_the_formulas(backbone: str, objective: str) -> None:
    """Logits of masked tokens alone are what the head would have said of them among all."""
    model, batch = joint_model(backbone, objective=objective).train(), masked_batch()
    outputs = model(**batch)
    found = grads(model, outputs.loss)
    assert set(found) == {name for name, _ in model.named_parameters()}, "every parameter learns at every step"
    expected = expected_loss(model, batch, outputs.corrupted_ids)
    assert_close(outputs.loss.double(), expected, **CLOSE)
    assert_equal_grads(found, grads(model, expected.float()), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["eff_electra", "eff_longformer", "bert"])
@pytest.mark.parametrize("objective", ["replace_mlm", "all_tokens_mlm"])
def test_objectives_that_predict_tokens(backbone: str, objective: str) -> None:
    model, batch = joint_model(backbone, objective=objective).train(), masked_batch()
    outputs = model(**batch)
    found = grads(model, outputs.loss)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert outputs.discriminator_logits is None and "replaced_recall" not in outputs.metrics
    expected = expected_loss(model, batch, outputs.corrupted_ids)
    assert_close(outputs.loss.double(), expected, **CLOSE)
    assert_equal_grads(found, grads(model, expected.float()), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="predicts tokens, which takes labels"):
        model(batch["input_ids"])


@EVERY_BACKBONE
def test_what_the_discriminator_reads(backbone: str) -> None:
    """Only masked tokens are replaced, by tokens of the vocabulary; what equals the original counts as original."""
    model, batch = joint_model(backbone), masked_batch()
    outputs, keep = model(**batch), batch["attention_mask"].bool()
    masked, original = batch["labels"] != -100, originals(batch)
    assert torch.equal(outputs.corrupted_ids[~masked], original[~masked])
    assert (outputs.corrupted_ids < 64).all()
    assert torch.equal(outputs.is_replaced[keep], (outputs.corrupted_ids != original).long()[keep])
    assert (outputs.is_replaced[~keep] == -100).all()


def test_a_perfect_generator_replaces_nothing() -> None:
    """All labels are 'original', whatever the masks."""
    model, batch = joint_model(), masked_batch()
    original = originals(batch)
    masked = batch["labels"] != -100
    right = nn.functional.one_hot(original, 64).float() * 1e4

    class Knows(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return right[masked][None]

    model.generator.generator_lm_head = Knows()
    outputs = model(**batch)
    assert torch.equal(outputs.corrupted_ids, original)
    assert (outputs.is_replaced[batch["attention_mask"].bool()] == 0).all()
    assert outputs.metrics["generator_accuracy"] == 1.0 and outputs.metrics["replaced_rate"] == 0.0


@pytest.mark.parametrize("backbone", PROJECTING)
def test_no_gradient_from_the_discriminator_but_through_shared_weights(backbone: str) -> None:
    model, batch = joint_model(backbone).train(), masked_batch()
    outputs = model(**batch)
    alone = {name: x for name, x in grads(model, outputs.discriminator_loss).items() if x.abs().max() > 0}
    # What is tied goes by its first name, the generator's.
    shared = set(model._tied_weights_keys)
    assert {name for name in alone if name.startswith("generator.")} == shared
    assert any("word_embeddings" in name for name in shared)
    mine = grads(model, model(**batch).generator_loss)
    assert all(mine[name].abs().max() > 0 for name in shared)
    assert all(x.abs().max() == 0 for name, x in mine.items() if name.startswith("discriminator."))


def test_without_weight_the_generator_learns_as_a_masked_lm() -> None:
    model, batch = joint_model(discriminator_weight=0, sharing="none").train(), masked_batch()
    found = grads(model, model(**batch).loss)
    alone = grads(model.generator, model.generator(**batch).loss)
    assert_equal_grads({name.removeprefix("generator."): x for name, x in found.items()}, alone)
    assert all(grad.abs().max() == 0 for name, grad in found.items() if name.startswith("discriminator."))


@EVERY_BACKBONE
def test_padding_and_batch_mates_never_matter(backbone: str) -> None:
    """Samples included: what is drawn depends on the text alone."""
    model, batch = joint_model(backbone), masked_batch()
    together = model(**batch)
    wider = {name: nn.functional.pad(x, (0, 5), value=-100 if name == "labels" else 0) for name, x in batch.items()}
    pad = wider["attention_mask"] == 0
    # Neither ids nor labels in padding count.
    wider["input_ids"][pad], wider["labels"][pad] = 7, 9
    padded = model(**wider)
    keep = batch["attention_mask"].bool()
    assert torch.equal(padded.corrupted_ids[:, :40][keep], together.corrupted_ids[keep])
    assert_close(padded.loss, together.loss, **CLOSE)
    assert_close(padded.counts, together.counts, **CLOSE)
    losses = []
    for row, length in enumerate(LENGTHS):
        alone = model(**{name: x[row : row + 1, :length] for name, x in batch.items()})
        assert torch.equal(alone.corrupted_ids[0], together.corrupted_ids[row, keep[row]])
        assert_close(alone.discriminator_logits[0], together.discriminator_logits[row, keep[row]], **CLOSE)
        losses.append(alone.discriminator_loss * length)
    assert_close(together.discriminator_loss, sum(losses) / sum(LENGTHS), **CLOSE)


def test_padding_on_the_left() -> None:
    """In this package's encoders; transformers' own count positions from the first column."""
    model = joint_model()
    right, left = model(**masked_batch()), model(**masked_batch(side="left"))
    assert_close(left.loss, right.loss, **CLOSE)
    keep = [masked_batch(side=side)["attention_mask"].bool() for side in ("right", "left")]
    assert torch.equal(right.corrupted_ids[keep[0]], left.corrupted_ids[keep[1]])


def test_without_a_mask_padding_is_where_the_pad_id_stands() -> None:
    model, batch = joint_model(), masked_batch()
    given = model(**batch)
    del batch["attention_mask"]
    assert_close(model(**batch).loss, given.loss, atol=0, rtol=0)


@EVERY_BACKBONE
def test_nothing_to_predict(backbone: str) -> None:
    """A batch of special tokens alone: no NaN, and a gradient of 0 in the generator, which DDP waits for."""
    model, batch = joint_model(backbone, sharing="none").train(), masked_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    outputs = model(**batch)
    assert outputs.generator_loss == 0 and torch.equal(outputs.corrupted_ids, batch["input_ids"])
    found = grads(model, outputs.loss)
    assert all(grad.isfinite().all() for grad in found.values())
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(grad.abs().max() == 0 for name, grad in found.items() if name.startswith("generator."))
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    assert model(**batch).loss == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0, -30.0])
    count = 100_000
    expected = oracle.frequencies(logits, temperature)
    for seeds in ([3], None):
        torch.manual_seed(0)
        found = sample_tokens(logits.expand(count, -1) / temperature, [count], seeds)
        rates = torch.bincount(found, minlength=5) / count
        # Five standard deviations of a share of so many draws.
        assert ((rates - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 1e-12).all(), rates


def test_samples_are_a_function_of_seed_and_text() -> None:
    ids, keep, masked = torch.arange(12).view(2, 6), torch.ones(2, 6).bool(), torch.eye(2, 6).bool()
    seeds = row_seeds(0, ids, keep, masked)
    assert row_seeds(0, ids + 1, keep, masked) != seeds, "by the tokens"
    assert len({*seeds, *row_seeds(1, ids, keep, masked), *row_seeds(0, ids, keep, ~masked)}) == 6
    assert row_seeds(0, ids.flip(0), keep, masked.flip(0)) == seeds[::-1]
    logits, state = torch.randn(7, 50), torch.get_rng_state()
    drawn = sample_tokens(logits, [3, 4], [5, 6])
    assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are touched"
    assert torch.equal(sample_tokens(logits[3:], [4], [6]), drawn[3:])
    assert torch.equal(sample_tokens(logits, [3, 0, 4], [5, 9, 6]), drawn)
    before = joint_model(sampling_seed=1)(**masked_batch()).corrupted_ids
    assert not torch.equal(joint_model(sampling_seed=2)(**masked_batch()).corrupted_ids, before)
    free = joint_model(sampling_seed=None)
    assert not torch.equal(free(**masked_batch()).corrupted_ids, free(**masked_batch()).corrupted_ids)


def test_padding_is_never_drawn() -> None:
    """Even where the generator would: RoBERTa's positions go by the ids."""
    model, batch = joint_model(), masked_batch()
    with torch.no_grad():
        model.generator.generator_lm_head.bias[0] = 1e3
    assert (model(**batch).corrupted_ids[batch["attention_mask"] == 1] != 0).all()


def test_figures_of_a_batch() -> None:
    model, batch = joint_model(), masked_batch([100, 91, 64])
    outputs, keep = model(**batch), batch["attention_mask"].bool()
    called, replaced = (outputs.discriminator_logits > 0)[keep], outputs.is_replaced[keep] == 1
    logits = model.generator(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    masked = batch["labels"] != -100
    right = (logits.argmax(-1) == batch["labels"])[masked]
    expected = {
        "generator_loss": outputs.generator_loss.item(),
        "discriminator_loss": outputs.discriminator_loss.item(),
        "generator_accuracy": right.double().mean().item(),
        "replaced_rate": replaced.double().mean().item(),
        "replaced_precision": (called & replaced).sum().item() / called.sum().item(),
        "replaced_recall": (called & replaced).sum().item() / replaced.sum().item(),
        "original_precision": (~called & ~replaced).sum().item() / (~called).sum().item(),
        "original_recall": (~called & ~replaced).sum().item() / (~replaced).sum().item(),
    }
    assert outputs.metrics == pytest.approx(expected)
    assert 0 < expected["replaced_precision"] < 1 and 0 < expected["replaced_recall"] < 1


def test_without_labels_it_reads_the_text_as_it_is() -> None:
    model, batch = joint_model(), masked_batch()
    ids, mask = originals(batch), batch["attention_mask"]
    assert_close(model(ids, mask).discriminator_logits, model.discriminator(ids, mask).logits)
    assert model(ids, mask).loss is None


def test_eval_is_deterministic_and_changes_nothing() -> None:
    model, batch = joint_model(), masked_batch()
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    config = copy.deepcopy(model.config.to_dict())
    first = model(**batch)
    assert torch.equal(model(**batch).loss, first.loss)
    assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == config
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks for module in (model.generator.electra, model.generator))


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    plain, batch = joint_model().train(), masked_batch()
    checkpointed = copy.deepcopy(plain)
    name = "activation_checkpointing" if hasattr(plain, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(checkpointed, f"{name}_enable")()
    calls: list[int] = []
    checkpointed.discriminator.electra.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    assert_equal_grads(grads(checkpointed, checkpointed(**batch).loss), grads(plain, plain(**batch).loss))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, batch = EffElectraForJointPreTraining(joint_config()).train(), masked_batch([40] * 8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(**batch)
        scaler.scale(outputs.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(outputs.generator_loss.item())
    assert losses[-1] < 0.7 * losses[0] and all(x.isfinite().all() for x in model.parameters())


def test_torch_compile() -> None:
    """With breaks around what depends on the number of masked tokens."""
    model, batch = joint_model(), masked_batch()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(compiled(**batch).loss, model(**batch).loss, **CLOSE)
    other = masked_batch([12, 33])
    assert_close(compiled(**other).loss, model(**other).loss, **CLOSE)


def test_global_tokens_and_token_types_reach_both() -> None:
    model, batch = joint_model("eff_longformer"), masked_batch()
    plain = model(**batch)
    moved = torch.arange(40).flip(0)[None].expand(3, -1).contiguous()
    for name, value in (
        ("position_ids", moved),
        ("global_attention_mask", torch.eye(3, 40).long()),
        ("token_type_ids", torch.ones(3, 40).long()),
    ):
        given = model(**batch, **{name: value * batch["attention_mask"]})
        assert (given.generator_loss - plain.generator_loss).abs() > 1e-4, name
        assert (given.discriminator_logits - plain.discriminator_logits)[:, 0].abs().max() > 1e-4, name
    # DistilBERT has no types, and its tokenizer gives some all the same.
    distil = joint_model("distilbert")
    assert_close(distil(**batch, token_type_ids=torch.zeros(3, 40).long()).loss, distil(**batch).loss)
    with pytest.raises(ValueError, match="takes no global_attention_mask"):
        distil(**batch, global_attention_mask=torch.zeros(3, 40).long())


def test_fresh_models_start_as_the_paper_has_them() -> None:
    """The generator knows nothing, the discriminator is undecided."""
    torch.manual_seed(0)
    outputs = EffElectraForJointPreTraining(joint_config("bert"))(**masked_batch())
    assert outputs.generator_loss.item() == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.2)
    assert outputs.discriminator_loss.item() == pytest.approx(0.693, abs=0.1)
