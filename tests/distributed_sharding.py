"""Models that transformers shards over two processes while it loads them: for `test_distributed.py`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from distributed_training import (
    GLOBAL_BATCH,
    IMAGES,
    MASKED,
    PATCHES,
    TEXTS,
    Scenario,
    heads_of,
    rows_of,
)
from helpers import model_class
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


STEPS = 3
KINDS: dict[str, dict[str, Any] | None] = {"fsdp": {"fsdp_size": 2}, "tp": {"tp_size": 2}, "accelerate": None}
"""Ways to shard, as `DistributedConfig` takes them, and accelerate's FSDP2."""


class Sharded(NamedTuple):
    """What a sharded training leaves: the mean loss of each step, logits afterwards, and which modules were units."""

    losses: list[float]
    logits: Tensor
    units: set[str]
    sharded: set[str]


def sharded_heads(family: str) -> list[str]:
    """One head whose weights are tied where the family ties them, and one that classifies."""
    return [auto for auto in (MASKED, TEXTS, PATCHES, IMAGES) if auto in heads_of(family)]


def whole_batch(family: str, model: PreTrainedModel, auto: str) -> dict[str, Tensor]:
    """One global batch, with as many labels in each half."""
    rows = rows_of(family, model, Scenario(auto, auto))[:GLOBAL_BATCH]
    rows = [{name: x for name, x in row.items() if name != "attention_mask"} for row in rows]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if auto == MASKED:
        batch["labels"] = torch.where(torch.arange(batch["labels"].shape[1]) % 3 == 0, batch["input_ids"], -100)
    return batch


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or predicted pixels, of the whole batch in eval mode."""
    with torch.no_grad():
        outputs = model.eval()(**{name: x for name, x in batch.items() if name != "labels"})
    return outputs["logits" if "logits" in outputs else "reconstruction"]


def steps(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[float]:
    """Some steps of plain gradient descent; the losses."""
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.05), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def shard_by_accelerate(model: PreTrainedModel) -> PreTrainedModel:
    """What `Accelerator.prepare` does with FSDP2 where there is a GPU; on a CPU it would take DDP instead."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=dist.get_rank() == 0
    )
    return fsdp2_prepare_model(accelerator, model)


def load_in_pieces(kind: str, family: str, auto: str, folder: Path) -> PreTrainedModel:
    """The model in `folder`, sharded."""
    cls = model_class(family, auto)
    if KINDS[kind] is None:
        return shard_by_accelerate(cls.from_pretrained(folder / auto))
    return cls.from_pretrained(folder / auto, distributed_config=DistributedConfig(**KINDS[kind]))


def train_sharded(kind: str, family: str, auto: str, folder: Path) -> Sharded:
    """Load the model in `folder` in pieces, train it, and save it whole beside; to be called by both ranks."""
    model = load_in_pieces(kind, family, auto, folder)
    sharded = {name for name, x in model.named_parameters() if isinstance(x, DTensor)}
    for ours, theirs in (model.all_tied_weights_keys or {}).items():
        assert model.get_parameter(ours) is model.get_parameter(theirs), f"{ours} is no longer {theirs}"
    batch, half = whole_batch(family, model, auto), GLOBAL_BATCH // 2
    own = slice(None) if kind == "tp" else slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    losses = torch.tensor(steps(model, {name: x[own] for name, x in batch.items()}))
    dist.all_reduce(losses)
    logits = logits_of(model, batch)
    if KINDS[kind] is None:
        weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
        if dist.get_rank() == 0:
            model.save_pretrained(folder / f"{auto}-{kind}", state_dict=weights)
    else:
        model.save_pretrained(folder / f"{auto}-{kind}")
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    return Sharded((losses / 2).tolist(), logits, units, sharded)


def shard_and_train(family: str, folder: Path) -> dict[tuple[str, str], Sharded]:
    """Every way to shard, for every head in `sharded_heads`.

    accelerate cannot shard a weight that two modules have unless they are the word embeddings and the vocabulary
    projection; published masked-LM heads, transformers' BERT's too, share their bias as well.
    """
    found = {}
    for kind in KINDS:
        for auto in sharded_heads(family):
            if KINDS[kind] is not None or auto != MASKED:
                found[kind, auto] = train_sharded(kind, family, auto, folder)
    return found
