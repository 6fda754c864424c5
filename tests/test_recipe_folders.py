"""What the recipes do with the folder of an earlier run: begun anew, moved, or with its best checkpoint damaged."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from helpers import model_class, random_ids, tiny_config
from processes import run_two
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_efficient_attn import last_complete_checkpoint
from hf_efficient_attn.recipes import train_and_save


def train(folder: Path, steps: int, figures: tuple[float, ...], collator: Any = default_data_collator) -> None:
    """A run with a checkpoint after each step and these accuracies, from the last one on where there is one."""
    set_seed(0)
    model = model_class("eff_electra", "AutoModelForMaskedLM")(tiny_config("eff_electra"))
    rows = [random_ids(1, 12, seed=row)[0].tolist() for row in range(4)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    said = iter((*figures, 0.5))  # the last one is that of the model in the end
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:1],
        data_collator=collator,
        compute_metrics=lambda prediction: {"accuracy": next(said)},
    )
    args = Namespace(output_dir=folder, overwrite=folder.name == "anew", push_to_hub=False, dataset=None)
    train_and_save(trainer, args, None if args.overwrite else last_complete_checkpoint(folder))
    assert next(said, None) is None


def is_model_of(folder: Path, step: int) -> bool:
    wanted, found = (load_file(path / "model.safetensors") for path in (folder / f"checkpoint-{step}", folder))
    return all(found[name].equal(tensor) for name, tensor in wanted.items())


def test_the_best_model_is_kept_where_its_folder_lies_now(tmp_path: Path) -> None:
    train(tmp_path / "run", 4, (0.9, 0.1, 0.2, 0.3))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    shutil.copy(moved / "checkpoint-4" / "model.safetensors", moved)
    train(moved, 4, ())  # all steps are done
    assert is_model_of(moved, 1) and not is_model_of(moved, 4)
    weights = moved / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.warns(
        UserWarning, match=r"checkpoint-1, the best .* model\.safetensors: .*checkpoint-4 takes its place"
    ):
        train(moved, 5, (0.05,))
    assert is_model_of(moved, 4) and not is_model_of(moved, 5)


def test_a_run_that_begins_anew_removes_the_earlier_one_when_it_has_shown_that_it_works(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "anew", tmp_path / "elsewhere"
    for path in (folder / "checkpoint-1", elsewhere):
        path.mkdir(parents=True)
        (path / "old.txt").write_text("old")
    (folder / "checkpoint-9").symlink_to(elsewhere)
    (folder / "checkpoint-1.txt").write_text("notes")
    before = sorted(folder.rglob("*"))

    def fail(features: list[Any]) -> Any:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        train(folder, 1, (0.1,), fail)
    assert sorted(folder.rglob("*")) == before
    train(folder, 1, (0.1,))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-1.txt"]
    assert (elsewhere / "old.txt").is_file() and not (folder / "checkpoint-1" / "old.txt").exists()


_TWO = """
import gc
from pathlib import Path
from torch.nn.parallel import DistributedDataParallel
from test_recipe_folders import train

made, left, destroy, build = [], [], dist.destroy_process_group, DistributedDataParallel.__init__

def count(self, *args, **kwargs):
    made.append(1)
    build(self, *args, **kwargs)

def watch(group=None):
    left.append(sum(isinstance(x, DistributedDataParallel) for x in gc.get_objects()))
    destroy(group)

DistributedDataParallel.__init__, dist.destroy_process_group = count, watch
train(Path(folder) / "run", 2, (0.1, 0.2))
assert made and left == [0], (made, left)
assert not dist.is_initialized()
sys.stdout.flush(), sys.stderr.flush()
os._exit(0)
"""


def test_the_wrapped_model_is_gone_before_the_processes_stop_to_talk(tmp_path: Path) -> None:
    """As the last to hold the process group it could wait for ever for a thread that waits for Python's lock."""
    run_two(_TWO, tmp_path)
