"""The paper's ablations of joint pretraining: copying, adversarial generators, two stages."""

from typing import Any

import pytest
import torch
from electra_cases import joint_model, masked_batch
from oracles import electra as oracle
from test_electra_joint import CLOSE, assert_equal_grads, grads
from torch import Tensor, nn
from torch.testing import assert_close

from hf_efficient_attn import EffElectraForJointPreTraining
from hf_efficient_attn.pretraining import modeling_eff_electra_joint as joint_module
from hf_efficient_attn.pretraining.objectives import adversarial_losses, copy_nll
from hf_efficient_attn.pretraining.sampling import sample_tokens


def test_copying_or_predicting() -> None:
    """Also where one of the two is nearly certain."""
    logits = (torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    copied = torch.linspace(-60, 60, 40).requires_grad_()
    read, targets = torch.arange(40) % 9, torch.arange(40) % 9
    targets[::3] = 4
    found = copy_nll(logits, copied, read, targets)
    found[copied.abs() < 30].sum().backward()
    assert found.isfinite().all() and logits.grad.isfinite().all() and copied.grad.isfinite().all()
    near = copied.detach().abs() < 30
    args = [x.detach()[near][None] for x in (logits, copied, read, targets)]
    expected = oracle.copy_loss(*args, torch.ones(1, int(near.sum()), dtype=torch.bool))
    assert_close(found[near].mean().double(), expected, **CLOSE)


def test_reinforce_is_the_gradient_of_the_expected_reward() -> None:
    """The mean over many samples, against the sum over all possible ones."""
    logits = torch.tensor([0.3, -0.5, 1.2, 0.0])
    rewards, baseline = torch.tensor([0.1, 2.0, 0.7, 0.4]), torch.tensor(0.2)
    expected = oracle.policy_gradient(logits, rewards, -nn.functional.logsigmoid(baseline))
    count = 200_000
    sampled = sample_tokens(logits.expand(count, -1), [count], [0])
    leaf = logits.clone().requires_grad_()
    policy, fit = adversarial_losses(leaf.expand(count, -1), sampled, rewards[sampled], baseline.expand(count))
    policy.mean().backward()
    # It is minimised, and the reward is to rise.
    assert_close(-leaf.grad.double(), expected, atol=5e-3, rtol=0)
    # The baseline's loss is least where it equals the reward.
    grid = torch.linspace(-6, 6, 4001)
    reward = torch.tensor(0.7)
    _, losses = adversarial_losses(torch.zeros(4001, 2), torch.zeros(4001).long(), reward.expand(4001), grid)
    assert_close(-nn.functional.logsigmoid(grid[losses.argmin()]), reward, atol=5e-3, rtol=0)


def test_an_adversarial_generator_fools_the_discriminator() -> None:
    """Against a discriminator that stands still, its loss rises; a masked-LM generator would not care."""
    options = {"objective": "electra_15", "sharing": "none", "sampling_seed": None}
    model = joint_model(generator_training="adversarial", **options).train()
    model.discriminator.requires_grad_(False)
    batch, losses = masked_batch([40] * 8), []
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=5e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(**batch)
        outputs.generator_loss.backward()
        optimizer.step()
        losses.append(outputs.discriminator_loss.item())
    assert sum(losses[-10:]) > 1.1 * sum(losses[:10]), losses


def test_adversarial_gradients_go_where_they_should() -> None:
    """The generator's loss teaches the policy and the baseline: not the discriminator, whose loss is the reward."""
    options = {"generator_training": "adversarial", "sharing": "none"}
    model, batch = joint_model(**options).train(), masked_batch()
    assert set(grads(model, model(**batch).loss)) == {name for name, _ in model.named_parameters()}
    mine = {name for name, x in grads(model, model(**batch).generator_loss).items() if x.abs().max() > 0}
    assert {name.split(".")[0] for name in mine} == {"generator", "baseline"}
    found = grads(model, model(**batch).discriminator_loss)
    assert {name.split(".")[0] for name, x in found.items() if x.abs().max() > 0} == {"discriminator"}


def test_the_baseline_learns_from_its_own_loss_alone() -> None:
    """It neither shapes the states it reads nor feels the policy."""
    logits, rewards = torch.randn(7, 5), torch.rand(7)
    baseline = torch.randn(7, requires_grad=True)
    policy, fit = adversarial_losses(logits.requires_grad_(), torch.arange(7) % 5, rewards, baseline)
    policy.sum().backward()
    assert baseline.grad is None and logits.grad.abs().max() > 0
    model, batch = joint_model(generator_training="adversarial", sharing="none").train(), masked_batch()
    found = {name for name, x in grads(model, _fit_of(model, batch)).items() if x.abs().max() > 0}
    assert found == {"baseline.weight", "baseline.bias"}


def _fit_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The generator's loss with the policy's part taken out: logits that do not learn."""
    logits_at = joint_module.logits_at

    def frozen(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logits, states = logits_at(*args, **kwargs)
        return logits.detach(), states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_module, "logits_at", frozen)
        return model(**batch).generator_loss


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_reinforce_at_other_temperatures(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What learns is the distribution that was sampled."""
    model = joint_model(generator_training="adversarial", sharing="none", temperature=temperature)
    seen = []

    def spy(logits: Tensor, *args: Any) -> Any:
        seen.append(logits)
        return adversarial_losses(logits, *args)

    monkeypatch.setattr(joint_module, "adversarial_losses", spy)
    batch = masked_batch()
    model(**batch)
    expected = model.generator(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = expected[batch["labels"] != -100] / temperature
    assert_close(seen[0][:, 1:], expected[:, 1:], **CLOSE)
    assert (seen[0][:, 0] == -torch.inf).all(), "padding is never drawn"


def test_two_stages() -> None:
    """First the generator alone; then the discriminator, which starts with its encoder, on samples of a frozen one."""
    model, batch = joint_model(generator_size=1, sharing="none", stage="generator").train(), masked_batch()
    first = grads(model, model(**batch).loss)
    assert {name.split(".")[0] for name in first} == {"generator"}
    alone = grads(model.generator, model.generator(**batch).loss)
    assert_equal_grads({name.removeprefix("generator."): x for name, x in first.items()}, alone)
    model.begin_discriminator_stage_()
    for ours, theirs in zip(
        model.generator.electra.parameters(), model.discriminator.electra.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs) and ours is not theirs
    outputs = model(**batch)
    assert_close(outputs.loss, 50 * outputs.discriminator_loss)
    second = grads(model, outputs.loss)
    assert {name.split(".")[0] for name in second} == {"discriminator"}
    assert set(second) == {name for name, x in model.named_parameters() if x.requires_grad}
    with pytest.raises(ValueError, match="the second stage follows the first one"):
        model.begin_discriminator_stage_()


def test_a_saved_stage_is_the_stage_that_loads(tmp_path: Any) -> None:
    model = joint_model(generator_size=1, sharing="none", stage="discriminator")
    model.save_pretrained(tmp_path)
    again = EffElectraForJointPreTraining.from_pretrained(tmp_path)
    assert not any(x.requires_grad for x in again.generator.parameters())
    assert all(x.requires_grad for x in again.discriminator.parameters())
