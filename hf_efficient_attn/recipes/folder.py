"""What earlier runs have left in an output folder: checkpoints to remove, and the best one to keep."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efficient_attn import checkpoint_problems


_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` in `folder`, links to folders among them, as Trainer names them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir())


class RemoveEarlierRun(TrainerCallback):
    """Removes the checkpoints that lie in a folder when this is made, once a first step has shown that training works.

    Before anything is saved, so that none of a new checkpoint's files is an old one. Of a link only the link goes.
    """

    def __init__(self, folder: Path) -> None:
        self.old: list[Path] | None = checkpoint_folders(folder)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl | None:
        """The first process removes, and the others wait before they save."""
        if self.old is not None:
            for path in self.old if state.is_world_process_zero else ():
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
            PartialState().wait_for_everyone()
            self.old = None


class BestOfFolder(TrainerCallback):
    """Has a run that goes on know where its best checkpoint lies now, and whether it is whole.

    Trainer notes the whole path. After the folder was moved it keeps the last model in place of the best in silence;
    a damaged checkpoint stops it when the training is done.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Points at `checkpoint-N` in the output folder, or if that is not whole at the best of the others."""
        if state.best_global_step is None or not args.load_best_model_at_end:
            return
        best = self._at(args, state.best_global_step)
        problems = checkpoint_problems(best)
        if not problems:
            if state.best_model_checkpoint is None and state.is_world_process_zero:
                print(f"The best checkpoint so far lies in {best} now.")  # Trainer has said that it is lost
            state.best_model_checkpoint = str(best)
            return
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        figures = {row["step"]: row[name] for row in state.log_history if name in row}
        whole = [step for step in figures if not checkpoint_problems(self._at(args, step))]
        chosen = (max if args.greater_is_better else min)(whole, key=figures.__getitem__, default=None)
        state.best_global_step = chosen
        state.best_metric = None if chosen is None else figures[chosen]
        state.best_model_checkpoint = None if chosen is None else str(self._at(args, chosen))
        instead = "none is left" if chosen is None else f"{state.best_model_checkpoint} takes its place"
        warnings.warn(
            f"{best}, the best of the run so far, cannot be loaded in the end: {'; '.join(problems)}; {instead}.",
            stacklevel=2,
        )

    @staticmethod
    def _at(args: TrainingArguments, step: int) -> Path:
        return Path(args.output_dir) / f"checkpoint-{step}"
