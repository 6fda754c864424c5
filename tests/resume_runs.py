"""Tiny trainings that are killed and begun again. test_resume.py starts this script once; it forks once a run.

    python tests/resume_runs.py FOLDER

For each row of `FAMILIES` and `COMPOSITES`: a run that nobody disturbs, and one that is killed between two saves, begun
again, killed while it writes a checkpoint, and begun again. Everything they leave is in FOLDER/<row>.
"""

import json
import multiprocessing
import os
import signal
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from electra_cases import joint_config
from helpers import model_class, random_ids, random_images, tiny_config, tiny_wordpieces
from transformers import (
    DataCollatorForTokenClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_efficient_attn import (
    FAMILIES,
    DataCollatorForReplacedTokenDetection,
    DataCollatorWithPatchMask,
    EffElectraForJointPreTraining,
    ElectraTrainer,
    RedrawProjections,
    RedrawRotations,
    last_complete_checkpoint,
)
from hf_efficient_attn.attention.lsh import lsh_layers
from hf_efficient_attn.attention.performer import performer_layers
from hf_efficient_attn.auto import COMPOSITES, VISION_FAMILIES


ROWS = [*FAMILIES, *COMPOSITES]
# 14 examples in batches of 2 are 7 batches: an epoch has 4 steps of 2 batches, the last one of 1. So saves are in the
# middle of epochs, and what comes after them lies in the next one too.
EXAMPLES, STEPS, SAVED_EVERY = 14, 10, 3
# In the second of the two batches of step 5, after checkpoint-3; the next run is killed in writing checkpoint-9.
KILLED_AFTER, KILLED_IN_WRITING = 4, "checkpoint-9"
# What is half written then: one row after the other takes the next of these.
HALF_WRITTEN = ["model.safetensors", "training_args.bin", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
WHOLE, FIRST, SECOND, THIRD = "whole", "first", "second", "third"


def half_written(row: str) -> str:
    """The file of checkpoint-9 in which the second run of `row` is killed."""
    return HALF_WRITTEN[ROWS.index(row) % len(HALF_WRITTEN)]


class Die(TrainerCallback):
    """Kills the process between two batches of one step."""

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After the first batch of a step."""
        if state.global_step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


class Draws(TrainerCallback):
    """Whether steps draw random numbers."""

    drew = True

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Before the first batch of a step."""
        self.before = torch.get_rng_state()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """After the last one."""
        self.drew &= not torch.equal(self.before, torch.get_rng_state())


def die_in_writing(file: Path) -> None:
    """From now on the process is killed when half of `file` is written."""

    def and_die(write: Any) -> Any:
        def write_and_die(*args: Any, **kwargs: Any) -> None:
            write(*args, **kwargs)
            if file.exists():
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write_and_die

    torch.save = and_die(torch.save)
    PreTrainedModel.save_pretrained = and_die(PreTrainedModel.save_pretrained)
    TrainerState.save_to_json = and_die(TrainerState.save_to_json)


def with_dropout(config: Any) -> Any:
    """`config` with every share that is dropped at a tenth."""
    shares = [field.name for field in fields(config) if "dropout" in field.name]
    for name in shares:
        if isinstance(getattr(config, name), float):
            setattr(config, name, 0.1)
    return config


def texts() -> list[dict[str, Any]]:
    """Texts of different length, every third token to be guessed."""
    ids = [random_ids(1, 20 + row % 5, seed=row)[0].tolist() for row in range(EXAMPLES)]
    guesses = [[token if at % 3 == 0 else -100 for at, token in enumerate(row)] for row in ids]
    return [{"input_ids": row, "labels": guess} for row, guess in zip(ids, guesses, strict=True)]


def images() -> list[dict[str, Any]]:
    """Images of different size."""
    return [
        {"pixel_values": random_images(1, 16 + 4 * (row % 2), 12, seed=row)[0], "labels": row % 3}
        for row in range(EXAMPLES)
    ]


def make_trainer(row: str, folder: Path) -> Trainer:
    """A new model and its Trainer; dropout, accumulation and, where a family has them, redraws are on."""
    set_seed(0)
    kind, data = Trainer, texts()
    if row in COMPOSITES:
        config = joint_config()
        with_dropout(config.generator), with_dropout(config.discriminator)
        model, kind = EffElectraForJointPreTraining(config), ElectraTrainer
        collator = DataCollatorForReplacedTokenDetection(tiny_wordpieces())
        data = [{"input_ids": example["input_ids"]} for example in data]
    elif row in VISION_FAMILIES:
        model = model_class(row, "AutoModelForImageClassification")(with_dropout(tiny_config(row, num_labels=3)))
        collator, data = DataCollatorWithPatchMask(patch_size=4), images()
    else:
        model = model_class(row, "AutoModelForMaskedLM")(with_dropout(tiny_config(row)))
        collator = DataCollatorForTokenClassification(tiny_wordpieces())
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=SAVED_EVERY,
        learning_rate=1e-2,
        weight_decay=0.01,
        warmup_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = kind(model, arguments, train_dataset=data, data_collator=collator)
    if performer_layers(model):
        trainer.add_callback(RedrawProjections(every=2))
    if lsh_layers(model):
        trainer.add_callback(RedrawRotations(every=1))
    return trainer


def run(row: str, name: str, folder: Path) -> None:
    """Train as a script with --resume does, and die where the run `name` has to."""
    out = folder / (WHOLE if name == WHOLE else "killed")
    trainer = make_trainer(row, out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = last_complete_checkpoint(out, model=trainer.model)
    said = [str(warning.message) for warning in caught]
    (folder / f"{name}.json").write_text(json.dumps({"found": last, "said": said}))
    if name == FIRST:
        trainer.add_callback(Die())
    if name == SECOND:
        die_in_writing(out / KILLED_IN_WRITING / half_written(row))
    draws = Draws()
    trainer.add_callback(draws)
    trainer.train(resume_from_checkpoint=last)
    torch.save({"drew": draws.drew, "weights": trainer.model.state_dict()}, folder / f"{name}.pt")


def main(folder: Path) -> None:
    """Every run of every row, each in a process of its own that has everything imported already."""
    context = multiprocessing.get_context("fork")
    for row in ROWS:
        (folder / row).mkdir()
        ends = {}
        for name in (WHOLE, FIRST, SECOND, THIRD):
            process = context.Process(target=run, args=(row, name, folder / row))
            process.start()
            process.join()
            ends[name] = process.exitcode
        (folder / row / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
