"""Joint pretraining with Trainer: figures in the log, accumulation, evaluation, resuming, two processes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from electra_cases import joint_config, joint_model, masked_batch
from helpers import no_warnings, random_ids, tiny_wordpieces
from processes import run_two
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_efficient_attn import (
    DataCollatorForReplacedTokenDetection,
    DataCollatorWithGlobalAttention,
    EffElectraForJointPreTraining,
    ElectraTrainer,
)


FIGURES = {
    "generator_loss",
    "discriminator_loss",
    "generator_accuracy",
    "replaced_rate",
    "replaced_precision",
    "replaced_recall",
    "original_precision",
    "original_recall",
}


def texts(count: int = 16, length: int = 24) -> Dataset:
    """Texts of one length with few different tokens, between the first and the last special one."""
    rows = random_ids(count, length - 2, vocab_size=20).tolist()
    return Dataset.from_dict({"input_ids": [[2, *row, 3] for row in rows]})


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        **options,
    }
    return TrainingArguments(str(folder), **options)


def make_trainer(folder: Path, dropout: float = 0.0, kind: type[Trainer] = ElectraTrainer, **options: Any) -> Trainer:
    set_seed(0)
    config = joint_config()
    for part in (config.generator, config.discriminator):
        part.hidden_dropout_prob = part.attention_probs_dropout_prob = dropout
    model = EffElectraForJointPreTraining(config)
    collator = DataCollatorForReplacedTokenDetection(tiny_wordpieces())
    return kind(
        model,
        arguments(folder, **options),
        train_dataset=texts(),
        eval_dataset=texts(6),
        data_collator=collator,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


def test_the_log_has_the_parts_averaged_over_its_steps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=4)
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.metrics | {"n": output.counts}))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and len(seen) == 8
    for entry, batches in zip(logs, (seen[:4], seen[4:]), strict=True):
        assert set(entry) >= FIGURES
        for name in ("generator_loss", "discriminator_loss"):
            assert entry[name] == pytest.approx(sum(x[name] for x in batches) / 4, rel=1e-4)
        # Batches have different numbers of replaced tokens: a mean of shares would be another number.
        counts = sum(x["n"] for x in batches)
        assert entry["replaced_rate"] == pytest.approx((counts[6] / counts[3]).item(), rel=1e-4)
        assert entry["replaced_recall"] == pytest.approx((counts[7] / (counts[7] + counts[8])).item(), abs=1e-4)
        assert entry["loss"] == pytest.approx(entry["generator_loss"] + 50 * entry["discriminator_loss"], rel=1e-3)


def test_it_learns(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=20, logging_steps=20)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["generator_loss"] < 0.8 * logs[0]["generator_loss"]
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_evaluation_has_figures_of_its_own_and_always_the_same_masks(tmp_path: Path) -> None:
    """Also with a smaller last batch, several sets, another prefix, and in prediction."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)
    before = trainer.evaluate()
    assert set(before) >= {f"eval_{name}" for name in FIGURES}
    both = before["eval_generator_loss"] + 50 * before["eval_discriminator_loss"]
    assert before["eval_loss"] == pytest.approx(both, rel=1e-5)
    trainer.data_collator.set_epoch(7)
    again = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset).metrics
    several = trainer.evaluate({"a": trainer.eval_dataset, "b": trainer.train_dataset})
    assert trainer.data_collator.epoch == 7
    for name in FIGURES:
        for other in (again[f"eval_{name}"], predicted[f"test_{name}"], several[f"eval_a_{name}"]):
            assert other == before[f"eval_{name}"]
    assert several["eval_b_generator_loss"] != several["eval_a_generator_loss"]


def test_figures_begin_anew_with_every_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, logging_steps=3, num_train_epochs=1)
    trainer.train()
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.metrics["generator_loss"]))
    trainer.train()
    first = [entry for entry in trainer.state.log_history if "loss" in entry][0]
    assert first["generator_loss"] == pytest.approx(sum(seen[:3]) / 3, rel=1e-5)


def test_a_generator_alone_has_no_figures_of_a_discriminator(tmp_path: Path) -> None:
    config = joint_config(generator_size=1, sharing="none", stage="generator")
    collator = DataCollatorForReplacedTokenDetection(tiny_wordpieces())
    model = EffElectraForJointPreTraining(config)
    metrics = ElectraTrainer(model, arguments(tmp_path), eval_dataset=texts(4), data_collator=collator).evaluate()
    assert "eval_generator_accuracy" in metrics and not [name for name in metrics if "recall" in name]


def test_columns_of_the_collator_are_kept(tmp_path: Path) -> None:
    """Though the model does not take them; and masks by epoch go on inside the collator for global tokens."""
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    data = texts(8)
    data = data.add_column("special_tokens_mask", [[1] * 20 + [0] * 4] * 8)
    trainer.train_dataset = data.add_column("global_attention_mask", [[1] + [0] * 23] * 8)
    inner = trainer.data_collator
    wrapped = ElectraTrainer(
        EffElectraForJointPreTraining(joint_config("eff_longformer")),
        trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=DataCollatorWithGlobalAttention(inner),
    )
    for batch in wrapped.get_train_dataloader():
        assert (batch["labels"][:, :20] == -100).all() and "global_attention_mask" in batch
    epochs = []
    wrapped.model.register_forward_hook(lambda *_: epochs.append(inner.epoch))
    wrapped.train()
    assert epochs == 2 * [0] + 2 * [1]


def test_streamed_data_has_other_masks_in_every_pass(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=10)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    epochs = []
    trainer.model.register_forward_hook(lambda *_: epochs.append(trainer.data_collator.epoch))
    trainer.train()
    assert epochs == 4 * [0] + 4 * [1] + 2 * [2]


def test_every_epoch_has_its_masks(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=3)
    epochs = []
    trainer.model.register_forward_hook(lambda *_: epochs.append(trainer.data_collator.epoch))
    trainer.train()
    assert epochs == 4 * [0] + 4 * [1] + 4 * [2]


def test_transformers_own_trainer_and_collator(tmp_path: Path) -> None:
    """Without any class of this package but the model."""
    set_seed(0)
    collator = DataCollatorForLanguageModeling(tiny_wordpieces(), mlm_probability=0.15)
    data = Dataset.from_dict({"input_ids": [[2, *([5, 6, 7, 8] * 4), 3]] * 8})
    model = EffElectraForJointPreTraining(joint_config())
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data, eval_dataset=data, data_collator=collator)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path, logging_steps=1)
    parts = make_trainer(tmp_path, logging_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole.train(), parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    for name, weight in weights(whole).items():
        assert_close(weights(parts)[name], weight, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_resuming_goes_on_bit_exactly(tmp_path: Path) -> None:
    """In the middle of an epoch, with dropout and accumulation: weights, masks, samples, optimizer."""
    options = {
        "dropout": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 3,
    }
    undisturbed = make_trainer(tmp_path / "a", **options)
    undisturbed.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-6", tmp_path / "b" / "checkpoint-6")
    resumed = make_trainer(tmp_path / "b", **options)
    with no_warnings():
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
    assert resumed.state.global_step == undisturbed.state.global_step == 12
    assert all(torch.equal(weights(resumed)[name], weight) for name, weight in weights(undisturbed).items())
    assert (
        weights(resumed)["generator.generator_lm_head.weight"].data_ptr()
        == weights(resumed)["discriminator.electra.embeddings.word_embeddings.weight"].data_ptr()
    )


TWO = """
from pathlib import Path
from test_electra_trainer import losses, make_trainer, weights

trainer = make_trainer(Path(folder) / "out", per_device_train_batch_size=2, logging_steps=1,
                       ddp_find_unused_parameters=False)
trainer.train()
figures = [{k: v for k, v in entry.items() if k.startswith(("replaced", "generator", "loss"))}
           for entry in trainer.state.log_history]
if rank == 0:
    torch.save((figures, weights(trainer)), f"{folder}/result")
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The same global batches, masks and samples: the same losses and figures, and the same weights at the end."""
    run_two(TWO, tmp_path)
    figures, trained = torch.load(tmp_path / "result")
    alone = make_trainer(tmp_path / "alone", logging_steps=1)
    before = {name: x.clone() for name, x in weights(alone).items()}
    alone.train()
    assert len(figures) == len(alone.state.log_history)
    for theirs, mine in zip(figures, alone.state.log_history, strict=True):
        for name, value in theirs.items():
            assert value == pytest.approx(mine[name], rel=1e-4, abs=1e-6), name
    for name, weight in weights(alone).items():
        assert_close(trained[name], weight, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any((before[name] - x).abs().max() > 1e-2 for name, x in trained.items()), "the weights have moved"


def test_workers_mask_as_the_main_process_does(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path)
    workers = make_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    plain.train(), workers.train()
    assert losses(workers) == losses(plain)


def test_other_models_are_refused(tmp_path: Path) -> None:
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="ElectraTrainer got a BertForMaskedLM; it trains EffElectraForJoint"):
        ElectraTrainer(BertForMaskedLM(tiny), arguments(tmp_path))
    with pytest.raises(ValueError, match="ElectraTrainer got a Linear"):
        ElectraTrainer(torch.nn.Linear(2, 2), arguments(tmp_path))
    model = EffElectraForJointPreTraining(joint_config())
    with pytest.raises(ValueError, match="label_smoothing_factor = 0.1"):
        ElectraTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))


SHARDED = """
from electra_cases import joint_model, masked_batch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

model = joint_model().train()
for part in (model.generator, model.discriminator):
    for layer in part.electra.encoder.layer:
        fully_shard(layer)
fully_shard(model)
assert all(isinstance(x, DTensor) for x in model.parameters())
for ours, theirs in model._tied_weights_keys.items():
    assert model.get_parameter(ours) is model.get_parameter(theirs)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mine = {name: x[2 * rank : 2 * rank + 2] for name, x in masked_batch([40] * 4).items()}
losses = []
for _ in range(3):
    optimizer.zero_grad()
    loss = model(**mine).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.detach())
total = torch.stack(losses)
dist.all_reduce(total)
whole = {name: x.full_tensor() for name, x in model.state_dict().items()}
if rank == 0:
    torch.save((total / 2, whole), f"{folder}/result")
"""


def test_sharded_parameters_keep_what_is_shared(tmp_path: Path) -> None:
    """FSDP2 on two processes: parameters are DTensors, tied ones still one, and training is that of one process."""
    run_two(SHARDED, tmp_path)
    losses, trained = torch.load(tmp_path / "result")
    model, batch = joint_model().train(), masked_batch([40] * 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for loss in losses:
        optimizer.zero_grad()
        alone = model(**batch).loss
        alone.backward()
        optimizer.step()
        assert_close(loss, alone.detach(), atol=1e-4, rtol=1e-4)
    for name, weight in model.state_dict().items():
        assert_close(trained[name], weight, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
