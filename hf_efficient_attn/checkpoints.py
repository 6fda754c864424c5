"""Checkpoints of a Trainer run: the newest one that training can go on from, and what is wrong with the others."""

import os
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_callback import TrainerState

from .checkpoint_files import (
    read_arguments,
    read_json,
    read_json_value,
    read_pickle,
    read_safetensors,
    read_text,
    read_zip,
    said_by,
)


_FOLDER = re.compile(r"checkpoint-([0-9]+)")
_RANDOM = re.compile(r"rng_state_([0-9]+)\.pth")
_FSDP = "pytorch_model_fsdp"
_DEEPSPEED = re.compile(r"global_step[0-9]+")

# What only some runs write, and what is looked at because it lies there: pattern -> how it is read.
_BY_KIND = {"*.json": read_json_value, "*.safetensors": read_safetensors, "rng_state*.pth": read_pickle}


def last_complete_checkpoint(
    output_dir: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    world_size: int | None = None,
    files: Collection[str] = (),
) -> str | None:
    """The newest `checkpoint-N` folder of a Trainer run that training can go on from exactly.

    A run that is killed leaves half a checkpoint, at which Trainer itself stops with an error, or from which it goes on
    in silence with a new optimizer. Here such a one is passed over with a `UserWarning` that names the folder, its
    files and what is wrong with them; `checkpoint_problems` says what is looked at. Newest is the largest `N`. Other
    names in `output_dir`, and files, do not matter; links to folders count like folders.

    Args:
        output_dir: the run's `TrainingArguments.output_dir`; it may not exist yet.
        model: the model to go on with, if given: the checkpoint must have its tensors, by name and shape. Trainer
            does not look: it leaves weights new that have no counterpart, and an optimizer's state of other shapes can
            end the process. Nor does it find weights that transformers saves under other names than they have in memory
            (the experts of Mixtral and Qwen2-MoE): that is refused too, with what helps. A PEFT model is compared by
            its adapters; what FSDP or DeepSpeed have split is not compared.
        world_size: processes to go on with, if given: the random states of each of them must be there.
        files: names of files that must be there besides: what not Trainer but your script reads, such as
            `tokenizer.json`.

    Returns:
        The folder, for `Trainer.train(resume_from_checkpoint=...)`, or None where no checkpoint is complete, in which
        case that call starts at the beginning.

    Raises:
        ValueError: the checkpoint is of another `model`: the first tensor that differs; Trainer would not find all
            weights of `model` in it; a `world_size` below 1.

    Example:

    ```python
    >>> last = last_complete_checkpoint(arguments.output_dir, model=model)
    >>> Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=last)
    ```
    """
    _check_world_size(world_size)
    for folder in _newest_first(Path(output_dir)):
        checkpoint = _Checkpoint(folder, world_size)
        there = checkpoint.folder
        checkpoint.problems += [f"{name}: missing" for name in files if not (there / name).is_file()]
        if not checkpoint.problems:
            if model is not None:
                checkpoint.compare(model)
            return str(folder)
        warnings.warn(
            f"{folder} is passed over, training cannot go on from it: {'; '.join(checkpoint.problems)}.", stacklevel=2
        )
    return None


def checkpoint_problems(folder: str | os.PathLike, *, world_size: int | None = None) -> list[str]:
    """What is wrong with a checkpoint that Trainer wrote, one line a file; empty if training can go on from it exactly.

    What is looked at, by reading no more than is needed and running nothing that a file contains:

    - weights, in one file or several with an index, safetensors or `pytorch_model.bin`, or adapters of PEFT: each file
      there and as long as its header says, each tensor inside it, each name of the index in its file. safetensors has
      no checksums: bytes that changed inside a tensor are not seen.
    - optimizer, scheduler, the gradient scaler of fp16, random states: checksums, and what Trainer reads is readable.
      One random state for each process that wrote the checkpoint, or each of `world_size`.
    - `trainer_state.json`, which has to be of the folder's step; `config.json`, or `adapter_config.json` of PEFT.
    - `training_args.bin`: its checksums. It says, too, how many processes wrote the checkpoint and whether in fp16.
    - every other `*.json` and `*.safetensors` file, such as a tokenizer's: readable. Training goes on without
      them, so that one is missing is not seen.

    A checkpoint written with `save_only_model=True` is not complete: it has neither optimizer nor random states.

    FSDP: the folders `pytorch_model_fsdp_N` and `optimizer_N` have a table of contents and parts, none empty, and
    single files are read as above; what is in the parts is not looked at, and sharded runs need neither config nor
    arguments. DeepSpeed: `latest` names a folder in which every `.pt` file has the right checksums; the scheduler may
    be in there. Whether the parts of every rank are there is not looked at, in both. Checkpoints of TPUs and SageMaker
    are not known.

    Args:
        folder: a `checkpoint-N` folder; of one with another name the step is not compared.
        world_size: the number of processes whose random states are wanted; default: of those that wrote it.

    Raises:
        ValueError: a `world_size` below 1.

    Time: that of reading the files once, weights left out. Memory: small, whatever the size of the model.
    """
    _check_world_size(world_size)
    return _Checkpoint(Path(folder), world_size).problems


def _check_world_size(world_size: int | None) -> None:
    if world_size is not None and world_size < 1:
        raise ValueError(f"world_size = {world_size}: give the number of processes, 1 or more, or leave it out.")


def _newest_first(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`."""
    if not output_dir.is_dir():
        return []
    steps = ((_FOLDER.fullmatch(path.name), path) for path in output_dir.iterdir())
    folders = [(int(step[1]), path) for step, path in steps if step and path.is_dir()]
    return [path for _, path in sorted(folders, reverse=True)]


class _Checkpoint:
    """One folder, looked at: `problems`, and the shapes of its weights and adapters by name."""

    def __init__(self, folder: Path, world_size: int | None) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.weights: dict[str, list[int]] = {}
        self.adapters: dict[str, dict[str, list[int]]] = {}
        self.run: dict[str, Any] = {}
        self._read: set[Path] = set()
        if not folder.is_dir():
            self.problems.append(f"{folder}: there is no such folder")
            return
        names = sorted(path.name for path in folder.iterdir())
        self.fsdp = any(_FSDP in name for name in names)
        self.deepspeed = "latest" in names or any(_DEEPSPEED.fullmatch(name) for name in names)
        # FSDP in shards writes no more than the shards.
        self.bare = self.fsdp and not self._has("training_args.bin")
        if not self.bare:
            self.run = self._file("training_args.bin", read_arguments) or {}
        self._look_at_weights(names)
        self._look_at_optimizer(names)
        self._look_at_random_states(names, world_size)
        self._look_at_state()
        for pattern, read in _BY_KIND.items():
            for path in sorted(folder.glob(pattern)):
                if path not in self._read:
                    self._file(path.name, read)

    def _has(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)

    def _file(self, name: str, read: Any) -> Any:
        """What `read` makes of a file that has to be there; None, and a problem, where it cannot."""
        path = self.folder / name
        self._read.add(path)
        try:
            if not path.is_file():
                raise ValueError("no file" if os.path.lexists(path) else "missing")
            if path.stat().st_size == 0:
                raise ValueError("empty")
            return read(path)
        except Exception as error:  # damaged bytes can raise anything
            left_out = self.run.get("save_only_model") is True and path.suffix in (".pt", ".pth")
            self.problems.append(f"{name}: {said_by(error)}{' (save_only_model)' if left_out else ''}")
            return None

    def _look_at_weights(self, names: list[str]) -> None:
        adapters = [
            folder
            for folder in ("", *(name for name in names if (self.folder / name).is_dir()))
            for kind in ("safetensors", "bin")
            if self._has(os.path.join(folder, f"adapter_model.{kind}"))
        ]
        # As Trainer chooses, should there be several.
        if self._has("model.safetensors"):
            self.weights = self._file("model.safetensors", read_safetensors) or {}
        elif self._has("pytorch_model.bin"):
            self.weights = self._file("pytorch_model.bin", _shapes_in_pickle) or {}
        elif adapters:
            for folder in adapters:
                self._look_at_adapter(folder)
        elif self._has("model.safetensors.index.json"):
            self._look_at_shards("model.safetensors.index.json", read_safetensors)
        elif self._has("pytorch_model.bin.index.json"):
            self._look_at_shards("pytorch_model.bin.index.json", _shapes_in_pickle)
        elif not self.fsdp and not self.deepspeed:
            shards = [name for name in names if re.fullmatch(r"(model|pytorch_model)-.*\.(safetensors|bin)", name)]
            self.problems.append(
                f"model.safetensors.index.json: missing, with {', '.join(shards)} there"
                if shards
                else "model.safetensors: missing, and there are no weights in another form"
            )
        for name in names:
            if name.startswith(_FSDP):
                self._look_at_fsdp(name)
        if self.deepspeed:
            self._look_at_deepspeed()
        if not adapters and not self.bare:
            self._file("config.json", PreTrainedConfig.from_json_file)

    def _look_at_adapter(self, folder: str) -> None:
        file = os.path.join(folder, "adapter_model.safetensors")
        if self._has(file):
            shapes = self._file(file, read_safetensors)
        else:
            shapes = self._file(os.path.join(folder, "adapter_model.bin"), _shapes_in_pickle)
        self.adapters[folder] = shapes or {}
        self._file(os.path.join(folder, "adapter_config.json"), read_json)

    def _look_at_shards(self, index_name: str, read: Any) -> None:
        """Each file of the index, and that it has the tensors that it should have."""
        where = self._file(index_name, _names_in_index)
        for shard in sorted(set((where or {}).values())):
            found = self._file(shard, read)
            if found is None:
                continue
            wanted = {name for name, file in where.items() if file == shard}
            for name in sorted(wanted ^ found.keys())[:1]:
                lacking = "lacks" if name in wanted else "has, unlike the index,"
                self.problems.append(f"{shard}: it {lacking} {name!r}")
            self.weights |= found

    def _look_at_fsdp(self, name: str) -> None:
        """A file, or a folder of parts that has a table of contents."""
        folder = self.folder / name
        if not folder.is_dir():
            self._file(name, read_pickle)
            return
        self._file(os.path.join(name, ".metadata"), Path.stat)
        parts = sorted(folder.glob("*.distcp"))
        for part in parts:
            self._file(os.path.join(name, part.name), Path.stat)
        if not parts:
            self.problems.append(f"{name}: it has no parts (*.distcp)")

    def _look_at_deepspeed(self) -> None:
        latest = self._file("latest", read_text)
        if latest is None:
            return
        parts = sorted((self.folder / latest).glob("*.pt"))
        for part in parts:
            self._file(os.path.join(latest, part.name), read_zip)
        if not parts:
            self.problems.append(f"{latest}: it has no states (*.pt), and 'latest' names it")

    def _look_at_optimizer(self, names: list[str]) -> None:
        written = [name for name in names if re.fullmatch(r"optimizer(_[0-9]+(_rank[0-9]+\.bin)?|\.bin)", name)]
        if self.fsdp and written:
            for name in written:
                self._look_at_fsdp(name)
        elif not self.deepspeed:
            state = self._file("optimizer.pt", read_pickle)
            if state is not None and not (isinstance(state, dict) and {"state", "param_groups"} <= state.keys()):
                self.problems.append("optimizer.pt: it holds no state of an optimizer")
        if not self.deepspeed or self._has("scheduler.pt"):
            state = self._file("scheduler.pt", read_pickle)
            if state is not None and not isinstance(state, dict):
                self.problems.append("scheduler.pt: it holds no state of a scheduler")
        if self._has("scaler.pt") or (self.run.get("fp16") is True and not self.deepspeed):
            state = self._file("scaler.pt", read_pickle)
            if state is not None and not isinstance(state, dict):
                self.problems.append("scaler.pt: it holds no state of a gradient scaler")

    def _look_at_random_states(self, names: list[str], world_size: int | None) -> None:
        ranks = [int(match[1]) for name in names if (match := _RANDOM.fullmatch(name))]
        # Where each node has a disk of its own, a node sees its own ranks' states only.
        if world_size is None and not (self.run.get("save_on_each_node") is True and ranks):
            world_size = self.run.get("num_processes")
        if world_size == 1 or not (world_size or ranks):
            wanted = ["rng_state.pth"]
        elif world_size:
            wanted = [f"rng_state_{rank}.pth" for rank in range(world_size)]
        else:
            wanted = [f"rng_state_{rank}.pth" for rank in sorted(ranks)]
        for name in wanted:
            state = self._file(name, read_pickle)
            if state is not None and not (isinstance(state, dict) and {"python", "numpy", "cpu"} <= state.keys()):
                self.problems.append(f"{name}: it holds no random states")

    def _look_at_state(self) -> None:
        state = self._file("trainer_state.json", TrainerState.load_from_json)
        step = _FOLDER.fullmatch(self.folder.name)
        if state is not None and step and state.global_step != int(step[1]):
            self.problems.append(f"trainer_state.json: it is of step {state.global_step}")

    def compare(self, model: nn.Module) -> None:
        """Raises `ValueError` where the tensors here are not those of `model`, by name and shape."""
        model = getattr(model, "_orig_mod", model)  # compiled
        known = model.state_dict(keep_vars=True)
        adapters = getattr(model, "peft_config", None)
        if self.adapters:
            if adapters is None:
                raise self._other_model(f"it holds an adapter of PEFT, and the {type(model).__name__} has none")
            from peft import get_peft_model_state_dict

            for folder, saved in self.adapters.items():
                name = folder or ("default" if "default" in adapters else next(iter(adapters)))
                if name not in adapters:
                    raise self._other_model(f"it holds an adapter {name!r}, and the model has {', '.join(adapters)}")
                expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                # Embeddings of another vocabulary are saved too.
                expected |= {name: known[name] for name in saved if name in known}
                self._compare(saved, expected, set(), model)
        elif self.weights:
            if adapters is not None:
                raise self._other_model("it holds whole weights, and the model has adapters of PEFT")
            # One tensor under several names is saved under one of them.
            shared = {id(known[name]) for name in self.weights if name in known}
            left_out = {name for name, tensor in known.items() if id(tensor) in shared}
            left_out |= set(getattr(model, "_keys_to_ignore_on_save", None) or ())
            self._refuse_other_names(known, left_out, model)
            self._compare(self.weights, known, left_out, model)

    def _refuse_other_names(self, known: dict[str, Any], left_out: set[str], model: nn.Module) -> None:
        """Raises `ValueError` where this is the model, saved by transformers under names that Trainer does not load."""
        if not isinstance(model, PreTrainedModel) or not known.keys() - self.weights.keys() - left_out:
            return
        try:
            from transformers.core_model_loading import revert_weight_conversion

            written = revert_weight_conversion(model, {name: x.detach().to("meta") for name, x in known.items()})
        except Exception:  # nothing is known of how it is saved
            return
        lost = sorted(known.keys() - written.keys())
        is_whole = self.weights.keys() <= written.keys() <= self.weights.keys() | left_out
        if lost and is_whole and all(list(written[name].shape) == list(self.weights[name]) for name in self.weights):
            raise ValueError(
                f"{self.folder} has other names for {len(lost)} tensors than the {type(model).__name__}, such as "
                f"{lost[0]!r}: transformers renames them when it saves, and Trainer, which does not when it goes on, "
                f"would leave them as they are. Make the model with from_pretrained({str(self.folder)!r}), and find "
                "the checkpoint without model=."
            )

    def _compare(self, saved: dict[str, Any], expected: dict[str, Any], left_out: set[str], model: nn.Module) -> None:
        owner = type(model).__name__
        for name, tensor in expected.items():
            if name in saved:
                if list(saved[name]) != list(tensor.shape):
                    raise self._other_model(
                        f"{name!r} has the shape {list(saved[name])} there and {list(tensor.shape)} in the {owner}"
                    )
            elif name not in left_out:
                raise self._other_model(f"{name!r} of the {owner} is not in it")
        for name in saved:
            if name not in expected:
                raise self._other_model(f"its {name!r} has no place in the {owner}")

    def _other_model(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.folder} is of another model: {reason}; give the options that the run was begun with, or another "
            "output folder."
        )


def _shapes_in_pickle(path: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors that `torch.save` wrote."""
    return {name: list(tensor.shape) for name, tensor in read_pickle(path).items()}


def _names_in_index(path: Path) -> dict[str, str]:
    """Tensor -> file beside the index."""
    where = read_json(path)["weight_map"]
    for file in set(where.values()):
        if Path(file).name != file:
            raise ValueError(f"it names {file!r}, which is no file beside it")
    if not where:
        raise ValueError("it names no tensors")
    return where
