"""The checkpoint to go on from: which folders count, other models, and what other ways of training write."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import collect_warnings, model_class, no_warnings, random_ids, tiny_config
from processes import run_two
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_efficient_attn import checkpoint_problems, last_complete_checkpoint


def make_arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False}
    steps = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**fixed, **steps, **options})


def make_model(seed: int = 0, family: str = "eff_electra", **overrides: Any) -> nn.Module:
    set_seed(seed)
    return model_class(family, "AutoModelForMaskedLM")(tiny_config(family, hidden_dropout_prob=0.1, **overrides))


def make_trainer(folder: Path, model: nn.Module, **options: Any) -> Trainer:
    rows = [random_ids(1, 12, seed=row)[0].tolist() for row in range(6)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model, make_arguments(folder, **options), train_dataset=data, data_collator=default_data_collator)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, make_model()).train()
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copied")


def at_step(checkpoint: Path, step: int) -> Path:
    """A copy of `checkpoint` beside it that says it is of `step`."""
    other = shutil.copytree(checkpoint, checkpoint.with_name(f"checkpoint-{step}"))
    state = json.loads((other / "trainer_state.json").read_text())
    (other / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    return other


def test_which_folders_count(copied: Path, tmp_path: Path) -> None:
    with no_warnings():
        for nothing in (tmp_path / "nowhere", copied / "checkpoint-4" / "config.json", tmp_path):
            assert last_complete_checkpoint(nothing) is None
        last = str(copied / "checkpoint-4")
        assert last_complete_checkpoint(str(copied)) == last_complete_checkpoint(copied) == last
        for name in ("checkpoint", "checkpoint-", "checkpoint-9x", "my-checkpoint-9", "checkpoint-\u0669", "runs"):
            shutil.copytree(copied / "checkpoint-4", copied / name)
        (copied / "checkpoint-12").write_text("a file")
        (copied / "checkpoint-13").symlink_to(copied / "gone")
        assert last_complete_checkpoint(copied) == last
        # By number, and not as text; and a link to a folder on another disk.
        at_step(copied / "checkpoint-4", 10)
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-10")
        moved = shutil.move(at_step(copied / "checkpoint-4", 11), tmp_path / "elsewhere")
        (copied / "checkpoint-11").symlink_to(moved)
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-11")
        # A folder of any name can be asked about.
        assert checkpoint_problems(moved) == checkpoint_problems(copied / "checkpoint-9x") == []
    (copied / "checkpoint-20").symlink_to(copied / "checkpoint-4")
    (copied / "checkpoint-21").mkdir()
    with pytest.warns(UserWarning) as said:
        assert last_complete_checkpoint(copied) == str(copied / "checkpoint-11")
    assert [Path(str(warning.message).split()[0]).name for warning in said] == ["checkpoint-21", "checkpoint-20"]
    assert all(warning.filename == __file__ for warning in said)
    assert "trainer_state.json: it is of step 4" in str(said[1].message)
    (problem,) = checkpoint_problems(tmp_path / "nowhere")
    assert problem == f"{tmp_path / 'nowhere'}: there is no such folder"


def test_all_damaged(copied: Path) -> None:
    for step in (2, 4):
        (copied / f"checkpoint-{step}" / "scheduler.pt").unlink()
    with collect_warnings() as said:
        assert last_complete_checkpoint(copied) is None
    assert len(said) == 2 and all("scheduler.pt: missing" in text for text in said)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: make_model(intermediate_size=40),
            "'electra.encoder.layer.0.intermediate.dense.weight' has the shape [48, 32] there and [40, 32] in the "
            "EffElectraForMaskedLM",
        ),
        (lambda: make_model(num_hidden_layers=3), "'electra.encoder.layer.2.attention.self.query.weight' of the "),
        (lambda: make_model(num_hidden_layers=1), "its 'electra.encoder.layer.1."),
        (lambda: make_model(family="eff_longformer"), "of the EffLongformerForMaskedLM is not in it"),
        (lambda: nn.Linear(2, 2), "'weight' of the Linear is not in it"),
    ],
)
def test_another_model(model: Callable[[], nn.Module], reason: str, run: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint-4 is of another model: ") as error:
        last_complete_checkpoint(run, model=model())
    assert reason in str(error.value) and "give the options that the run was begun with" in str(error.value)


def test_the_same_model(run: Path, tmp_path: Path) -> None:
    last = str(run / "checkpoint-4")
    with no_warnings():
        # Other weights and another type of numbers are no other model.
        assert last_complete_checkpoint(run, model=make_model(seed=1).bfloat16()) == last
        # In-tree models too; weights without a model class; untied weights.
        fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        for tie in (True, False):
            bert = BertForMaskedLM(BertConfig(**fields, intermediate_size=40, tie_word_embeddings=tie))
            make_trainer(tmp_path / f"bert-{tie}", bert, max_steps=2).train()
            assert last_complete_checkpoint(tmp_path / f"bert-{tie}", model=bert)
    with pytest.raises(ValueError, match="is not in it"):
        last_complete_checkpoint(tmp_path / "bert-True", model=bert)


def test_names_that_transformers_changes_in_saving(tmp_path: Path) -> None:
    """Trainer leaves the experts as they are when it goes on; it goes on exactly with a model that has them already."""
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**fields, **experts))
    make_trainer(tmp_path, model, max_steps=2).train()
    last = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="has other names for 3 tensors than the MixtralForCausalLM, such as") as error:
        last_complete_checkpoint(tmp_path, model=model)
    assert f"from_pretrained({last!r})" in str(error.value) and last_complete_checkpoint(tmp_path) == last
    other = MixtralForCausalLM(MixtralConfig(**{**fields, "hidden_size": 48}, **experts))
    with pytest.raises(ValueError, match="checkpoint-2 is of another model"):
        last_complete_checkpoint(tmp_path, model=other)
    # Both ways of going on, with steps that change nothing.
    for again, exact in ((MixtralForCausalLM(model.config), False), (MixtralForCausalLM.from_pretrained(last), True)):
        trainer = make_trainer(tmp_path, again, max_steps=2)
        trainer.train(resume_from_checkpoint=last)
        wanted, found = model.state_dict(), again.state_dict()
        assert all(found[name].equal(wanted[name]) for name in wanted) == exact


def test_numbers_of_processes_out_of_range(run: Path) -> None:
    for call in (last_complete_checkpoint, checkpoint_problems):
        with pytest.raises(ValueError, match="world_size = 0: give the number of processes, 1 or more"):
            call(run, world_size=0)


def test_only_the_model_saved(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_model(), save_only_model=True).train()
    problems = checkpoint_problems(tmp_path / "checkpoint-4")
    assert [problem.split(": ")[0] for problem in problems] == ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    assert all(problem.endswith(": missing (save_only_model)") for problem in problems)
    with collect_warnings() as said:
        assert last_complete_checkpoint(tmp_path) is None
    assert len(said) == 2


def test_the_scaler_of_half_precision(copied: Path) -> None:
    """A run in fp16 has one more file; that it was in fp16 stands in its arguments."""
    checkpoint = copied / "checkpoint-4"
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    arguments.fp16 = True
    torch.save(arguments, checkpoint / "training_args.bin")
    assert checkpoint_problems(checkpoint) == ["scaler.pt: missing"]
    torch.save(torch.amp.GradScaler("cpu").state_dict(), checkpoint / "scaler.pt")
    assert checkpoint_problems(checkpoint) == []
    (checkpoint / "scaler.pt").write_bytes((checkpoint / "scaler.pt").read_bytes()[:-100])
    assert len(checkpoint_problems(checkpoint)) == 1
    torch.save([1], checkpoint / "scaler.pt")
    assert checkpoint_problems(checkpoint) == ["scaler.pt: it holds no state of a gradient scaler"]


def test_weights_in_pickles(copied: Path) -> None:
    """`pytorch_model.bin`, alone and in parts, as older versions wrote it."""
    checkpoint, model = copied / "checkpoint-4", make_model()
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    assert checkpoint_problems(checkpoint) == ["model.safetensors: missing, and there are no weights in another form"]
    torch.save(weights, checkpoint / "pytorch_model.bin")
    assert last_complete_checkpoint(copied, model=model) == str(checkpoint)
    with pytest.raises(ValueError, match="is of another model"):
        last_complete_checkpoint(copied, model=make_model(num_hidden_layers=1))
    content = (checkpoint / "pytorch_model.bin").read_bytes()
    at = content.index(weights["electra.encoder.layer.1.output.dense.weight"].numpy().tobytes())
    (checkpoint / "pytorch_model.bin").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert "pytorch_model.bin: " in checkpoint_problems(checkpoint)[0]

    (checkpoint / "pytorch_model.bin").unlink()
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, held in parts.items():
        torch.save({name: weights[name] for name in held}, checkpoint / file)
    assert "pytorch_model-00001-of-00002.bin, " in checkpoint_problems(checkpoint)[0]
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert last_complete_checkpoint(copied, model=model) == str(checkpoint)
    (checkpoint / "pytorch_model-00002-of-00002.bin").unlink()
    assert checkpoint_problems(checkpoint) == ["pytorch_model-00002-of-00002.bin: missing"]


TWO = """
from pathlib import Path
from test_checkpoint_layouts import make_model, make_trainer
from hf_efficient_attn import last_complete_checkpoint
trainer = make_trainer(Path(folder) / "run", make_model(), ddp_find_unused_parameters=False)
trainer.train()
dist.barrier()
assert last_complete_checkpoint(Path(folder) / "run", model=trainer.model, world_size=2).endswith("checkpoint-4")
"""


def test_two_processes(tmp_path: Path) -> None:
    """Each has a file with its random states, and how many there were stands in the arguments."""
    run_two(TWO, tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert checkpoint_problems(checkpoint) == checkpoint_problems(checkpoint, world_size=2) == []
    assert checkpoint_problems(checkpoint, world_size=3) == ["rng_state_2.pth: missing"]
    assert checkpoint_problems(checkpoint, world_size=1) == ["rng_state.pth: missing"]
    content = (checkpoint / "rng_state_1.pth").read_bytes()
    (checkpoint / "rng_state_1.pth").write_bytes(content[:-20])
    assert len(checkpoint_problems(checkpoint)) == 1
    (checkpoint / "rng_state_1.pth").unlink()
    assert checkpoint_problems(checkpoint) == ["rng_state_1.pth: missing"]
    # A node with a disk of its own has the files of its own processes only.
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    arguments.save_on_each_node = True
    torch.save(arguments, checkpoint / "training_args.bin")
    (checkpoint / "rng_state_0.pth").rename(checkpoint / "rng_state_1.pth")
    assert checkpoint_problems(checkpoint) == []
    (checkpoint / "rng_state_1.pth").unlink()
    assert checkpoint_problems(checkpoint) == ["rng_state_0.pth: missing", "rng_state_1.pth: missing"]


def test_shards_of_fsdp(copied: Path) -> None:
    """Sharded weights and optimizer, as `torch.distributed.checkpoint` writes them; nothing else is there then."""
    checkpoint = copied / "checkpoint-4"
    for name in ("model.safetensors", "optimizer.pt", "training_args.bin", "config.json"):
        (checkpoint / name).unlink()
    save = partial(distributed_checkpoint.save, {"weight": torch.ones(4)}, no_dist=True)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        save(checkpoint_id=checkpoint / name)
    assert checkpoint_problems(checkpoint) == []
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        table = checkpoint / name / ".metadata"
        content = table.read_bytes()
        table.write_bytes(b"")
        assert checkpoint_problems(checkpoint) == [f"{name}/.metadata: empty"]
        table.unlink()
        assert checkpoint_problems(checkpoint) == [f"{name}/.metadata: missing"]
        table.write_bytes(content)
        for part in (checkpoint / name).glob("*.distcp"):
            part.unlink()
        assert checkpoint_problems(checkpoint) == [f"{name}: it has no parts (*.distcp)"]
        save(checkpoint_id=checkpoint / name)
    shutil.rmtree(checkpoint / "optimizer_0")
    assert checkpoint_problems(checkpoint) == ["optimizer.pt: missing"]
    # In whole files.
    torch.save({"state": {}, "param_groups": []}, checkpoint / "optimizer.bin")
    shutil.rmtree(checkpoint / "pytorch_model_fsdp_0")
    torch.save({"weight": torch.ones(4)}, checkpoint / "pytorch_model_fsdp.bin")
    assert checkpoint_problems(checkpoint) == []
    (checkpoint / "pytorch_model_fsdp.bin").write_bytes(b"PK")
    assert "pytorch_model_fsdp.bin: " in checkpoint_problems(checkpoint)[0]


def test_states_of_deepspeed(copied: Path) -> None:
    """A folder of its own for weights and optimizer, named in `latest`."""
    checkpoint = copied / "checkpoint-4"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    (checkpoint / "global_step4").mkdir()
    assert checkpoint_problems(checkpoint) == ["latest: missing"]
    (checkpoint / "latest").write_text("global_step4\n")
    assert checkpoint_problems(checkpoint) == ["global_step4: it has no states (*.pt), and 'latest' names it"]
    part = checkpoint / "global_step4" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"state": torch.ones(100)}, part)
    assert checkpoint_problems(checkpoint) == []
    part.write_bytes(part.read_bytes()[:-1])
    assert f"global_step4/{part.name}: " in checkpoint_problems(checkpoint)[0]


def test_adapters(tmp_path: Path) -> None:
    """Low-rank adapters of PEFT: only they are saved, and compared."""
    peft = pytest.importorskip("peft")

    def adapted(rank: int = 2, **overrides: Any) -> nn.Module:
        return peft.get_peft_model(make_model(**overrides), peft.LoraConfig(r=rank, target_modules=["query", "value"]))

    make_trainer(tmp_path, adapted()).train()
    checkpoint, last = tmp_path / "checkpoint-4", str(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path, model=adapted()) == last
    for other, reason in (
        (adapted(rank=3), "has the shape"),
        (adapted(num_hidden_layers=1), "has no place in the"),
        (make_model(), "it holds an adapter of PEFT"),
    ):
        with pytest.raises(ValueError, match=reason):
            last_complete_checkpoint(tmp_path, model=other)
    make_trainer(tmp_path, adapted(), max_steps=6).train(resume_from_checkpoint=last)
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (checkpoint / "adapter_config.json").write_bytes(b"")
    problems = checkpoint_problems(checkpoint)
    assert problems[0].startswith("adapter_model.safetensors: ") and problems[1:] == ["adapter_config.json: empty"]
    weights.unlink()
    assert "model.safetensors: missing, and there are no weights in another form" in checkpoint_problems(checkpoint)
