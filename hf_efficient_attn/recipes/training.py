"""From the options of a script to a trained, evaluated and saved model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments

from hf_efficient_attn import ModelCardCallback, last_complete_checkpoint

from .curves import save_curves
from .folder import BestOfFolder, RemoveEarlierRun
from .order import OrderByEpoch


# Files of tokenizers and image processors in a checkpoint, which Trainer does not read but the scripts do.
_READER = re.compile(r"(tokenizer|vocab|merges|spiece|sentencepiece|special_tokens|added_tokens|preprocessor)")
EVALUATIONS = 6  # of a run whose length is given in steps


def checkpoint_to_resume(args: argparse.Namespace, model: PreTrainedModel | None = None) -> str | None:
    """With `--resume` the last complete checkpoint in `--output-dir`, else None.

    Called before the data is read, for the tokenizer in it, and again with the model, which has to be the checkpoint's.
    The run ends with the same weights as without the break; on a stream that was read to its end and begun again,
    Trainer goes on with other rows.

    Raises:
        ValueError: there is none, or it is of another model or of other labels.
    """
    if not args.resume:
        return None
    last = last_complete_checkpoint(args.output_dir, model=model, files=_reader_files(Path(args.output_dir)))
    if last is None:
        raise ValueError(
            f"{args.output_dir} holds no checkpoint to go on from that is complete: leave --resume out (with "
            "--overwrite, if the folder holds anything of a run), or name the folder of another run with --output-dir."
        )
    if model is not None:
        _check_labels(Path(last), model)
    return last


def _reader_files(folder: Path) -> list[str]:
    """Names of the files of a tokenizer or image processor that any checkpoint of a run has, so that all have to."""
    names = {path.name for path in folder.glob("checkpoint-*/*") if _READER.match(path.name)}
    return sorted(names)


def _check_labels(checkpoint: Path, model: PreTrainedModel) -> None:
    """Raises `ValueError` where the checkpoint's model has other labels."""
    labels = getattr(model.config, "id2label", None)
    config = AutoConfig.from_pretrained(checkpoint)
    known = getattr(config, "id2label", labels)
    if labels and known != labels:
        raise ValueError(
            f"{checkpoint} is of a model with the labels {', '.join(map(str, known.values()))}, and the data have "
            f"{', '.join(map(str, labels.values()))}: go on with the same data, or begin anew with --overwrite."
        )


def training_arguments(
    args: argparse.Namespace, *, best: str = "loss", greater_is_better: bool = False, **options: Any
) -> TrainingArguments:
    """The `TrainingArguments` of a script's options: evaluated, saved and logged alike in all of them.

    Evaluation and checkpoint come after each epoch, or with `--max-steps` six times. The best model is loaded in the
    end. Batches have examples of like length. Made before the data is read: it begins the processes' talk with each
    other.

    Args:
        args: from a `RecipeParser`.
        best: the figure of the evaluation by which the best model is chosen.
        greater_is_better: whether it is better when it is larger.
        options: any arguments of `TrainingArguments`, in place of the ones chosen here.

    Raises:
        ValueError: what `TrainingArguments` refuses, such as bf16 on a device without it.
    """
    by_steps = args.max_steps is not None
    interval = max(1, args.max_steps // EVALUATIONS) if by_steps else 1
    chosen = {
        "output_dir": str(args.output_dir),
        "num_train_epochs": args.epochs or 3.0,
        "max_steps": args.max_steps or -1,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.accumulate,
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.1,  # a share of all steps
        "adam_beta2": 0.98,
        "bf16": args.bf16,
        "use_cpu": args.cpu,
        "dataloader_pin_memory": torch.cuda.is_available() and not args.cpu,
        "train_sampling_strategy": "random" if args.streaming else "group_by_length",
        # Each process reads a stream for itself: sent around, batches would have to be of one length.
        "accelerator_config": {"dispatch_batches": False} if args.streaming else None,
        "eval_strategy": "steps" if by_steps else "epoch",
        "save_strategy": "steps" if by_steps else "epoch",
        "eval_steps": interval if by_steps else None,
        "save_steps": interval if by_steps else 500,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": best,
        "greater_is_better": greater_is_better,
        "logging_steps": max(1, args.max_steps // 30) if by_steps else 10,
        "report_to": "none",
        "seed": args.seed,
        "push_to_hub": args.push_to_hub,
        "hub_model_id": args.hub_model_id,
    }
    if args.gradient_checkpointing:
        # The name until transformers 5.17, and the one since.
        known = {field.name for field in fields(TrainingArguments)}
        new = "activation_checkpointing"
        chosen[new if new in known else "gradient_checkpointing"] = True
    return TrainingArguments(**{**chosen, **options})


def train_and_save(
    trainer: Trainer, args: argparse.Namespace, checkpoint: str | None, curves: Sequence[str] = ("loss",)
) -> dict[str, float]:
    """Train, evaluate the best model, and save it with the figures and curves of the run.

    Writes to `--output-dir`: the model and what was given as `processing_class`, `train_results.json`,
    `eval_results.json`, `trainer_state.json`, `training.csv` and `training.png`.

    Args:
        trainer: ready to train.
        args: from a `RecipeParser`.
        checkpoint: where to go on from, see `checkpoint_to_resume`.
        curves: the figures to draw, a panel each.

    Returns:
        The evaluation's figures, such as `eval_loss`, the same on every process. The processes do not talk to each
        other any more then: what follows is for the first one.
    """
    folder = Path(args.output_dir)
    if args.overwrite:
        trainer.add_callback(RemoveEarlierRun(folder))
    trainer.add_callback(BestOfFolder())
    if hasattr(trainer.model, "write_card"):  # a model of this package
        known = {"datasets": args.dataset or "the text or images that the example makes or finds by itself"}
        trainer.model.card_data = known | (getattr(trainer.model, "card_data", None) or {})
        trainer.add_callback(ModelCardCallback())
        trainer.create_model_card = _keep_card
    trainer.add_callback(OrderByEpoch())
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_curves(trainer.state.log_history, folder, curves)
    if args.push_to_hub:
        trainer.push_to_hub()
    _end_talk(trainer)
    return metrics


def _keep_card(*args: Any, **kwargs: Any) -> None:
    """In place of Trainer's own card, which does not say how to load the model: saving has written ours."""


def _end_talk(trainer: Trainer) -> None:
    """Close the process group: each process is on its own then. Left open, it can abort when the first one exits."""
    trainer.accelerator.wait_for_everyone()
    # DistributedDataParallel goes first. Were it the last to hold the group, torch would destroy that under Python's
    # lock and wait for a thread that may want the lock itself, to let go of the tensor of the wait above: for ever
    # (seen with gloo and torch 2.13, once in some dozens of runs).
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def rows_of(side: Any) -> str:
    """How many rows a side has, in words."""
    return "a stream of" if isinstance(side, IterableDataset) else f"{len(side):,}"
