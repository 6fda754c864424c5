"""Training through Trainer on the same global batches, in one process or in several: for `test_distributed.py`."""

from pathlib import Path
from typing import NamedTuple

import test_families as text
import test_vision_families as vision
import torch
from helpers import random_ids, random_images
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from hf_efficient_attn.auto import VISION_FAMILIES


STEPS, GLOBAL_BATCH, LENGTH = 10, 4, 24


class Scenario(NamedTuple):
    """One way to train.

    Args:
        name: what a failure is reported as.
        auto: the head.
        accumulation: batches a step.
        checkpointing: compute layers again in the backward pass.
        uneven: the second rank's examples have fewer labels, where labels belong to tokens.
        skip_logits: as in the config.
    """

    name: str
    auto: str
    accumulation: int = 1
    checkpointing: bool = False
    uneven: bool = False
    skip_logits: bool = False


MASKED, CAUSAL, TOKENS = "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForTokenClassification"
TEXTS, IMAGES, PATCHES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
)
SCENARIOS = (
    Scenario("masked tokens", MASKED),
    Scenario("masked tokens, checkpointing", MASKED, checkpointing=True),
    Scenario("masked tokens, accumulation, uneven labels", MASKED, accumulation=2, uneven=True),
    Scenario("masked tokens without logits, accumulation, uneven labels", MASKED, 2, uneven=True, skip_logits=True),
    Scenario("texts", TEXTS),
    Scenario("classes of tokens, accumulation, checkpointing, uneven labels", TOKENS, 2, True, True),
    Scenario("next tokens, uneven labels", CAUSAL, uneven=True),
    Scenario("images, accumulation", IMAGES, accumulation=2),
    Scenario("images, checkpointing", IMAGES, checkpointing=True),
    Scenario("masked patches", PATCHES),
    Scenario("masked patches, accumulation, checkpointing", PATCHES, accumulation=2, checkpointing=True),
)


def heads_of(family: str) -> list[str]:
    """Every head of a family, by Auto class or `DETECTOR`."""
    return [auto for name, auto in (*text.HEADS, *vision.HEADS) if name == family]


def scenarios_of(family: str) -> list[Scenario]:
    """Those whose head the family has."""
    return [scenario for scenario in SCENARIOS if scenario.auto in heads_of(family)]


def make_model(family: str, auto: str) -> PreTrainedModel:
    """A tiny model with random weights and no dropout, in training mode."""
    return (vision if family in VISION_FAMILIES else text).build(family, auto).train()


def rank_of(row: int) -> int:
    """The rank of two that reads this row: Trainer gives each half of the global batch in turn."""
    return row % GLOBAL_BATCH // (GLOBAL_BATCH // 2)


def image_row(auto: str, row: int) -> dict[str, Tensor]:
    """An image, and its label or its masked patches, as many in each."""
    given = {"pixel_values": random_images(1, seed=row)[0]}
    if auto == IMAGES:
        return {**given, "labels": torch.tensor(row // 2 % 2)}
    return {**given, "bool_masked_pos": (torch.arange(12) + row) % 3 == 0}


def text_row(model: PreTrainedModel, scenario: Scenario, row: int) -> dict[str, Tensor]:
    """A text with padding, global tokens on the first rank only, and labels."""
    place = torch.arange(LENGTH)
    ids, keep = random_ids(1, LENGTH, seed=row)[0], place < LENGTH - 4 * (row % 3)
    given = {"input_ids": ids, "attention_mask": keep.long()}
    if text.has_global_tokens(model):
        given["global_attention_mask"] = ((place == 0) & (rank_of(row) == 0)).long()
    if scenario.auto == TEXTS:
        return {**given, "labels": torch.tensor(row // 2 % 2)}
    labels = ids % 2 if scenario.auto == TOKENS else ids
    few = scenario.uneven and rank_of(row) == 1
    return {**given, "labels": labels.masked_fill(~keep | (place % 8 != 3 if few else place < 5), -100)}


def rows_of(family: str, model: PreTrainedModel, scenario: Scenario) -> list[dict[str, Tensor]]:
    """The examples of all steps."""
    rows = range(STEPS * GLOBAL_BATCH * scenario.accumulation)
    if family in VISION_FAMILIES:
        return [image_row(scenario.auto, row) for row in rows]
    return [text_row(model, scenario, row) for row in rows]


class Trained(NamedTuple):
    """What a training leaves: the loss of each step, and the weights before and after."""

    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def train(family: str, scenario: Scenario, folder: Path) -> Trained:
    """Ten steps in this process and, where there are several, in all of them."""
    model = make_model(family, scenario.auto)
    if scenario.skip_logits:
        model.config.skip_logits = True
    before = {name: x.clone() for name, x in model.state_dict().items()}
    # transformers renamed the switch; the old name warns.
    renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // (dist.get_world_size() if dist.is_initialized() else 1),
        gradient_accumulation_steps=scenario.accumulation,
        learning_rate=1e-2,
        # Where a gradient is all rounding, such as that of a key's bias, a step must not be as long as elsewhere.
        adam_epsilon=1e-3,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **{"activation_checkpointing" if renamed else "gradient_checkpointing": scenario.checkpointing},
    )
    trainer = Trainer(model, arguments, train_dataset=rows_of(family, model, scenario))
    trainer.train()
    assert not dist.is_initialized() or isinstance(trainer.model_wrapped, DistributedDataParallel)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(losses, before, dict(model.state_dict()))


def without_gradient(family: str, auto: str, rank: int) -> list[str]:
    """Parameters that get no gradient in a step of two ranks; raises `RuntimeError` where DDP misses one."""
    model = make_model(family, auto)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    module = vision if family in VISION_FAMILIES else text
    inputs = vision.batch_of(auto, 2) if module is vision else text.batch_of(model, auto, 2, LENGTH, seed=rank)
    if rank == 1 and "global_attention_mask" in inputs:
        inputs["global_attention_mask"].zero_()
    # DDP looks for what is missing at the next call.
    for _ in range(2):
        module.loss_of(wrapped, inputs).backward()
    return [name for name, x in model.named_parameters() if x.grad is None or not x.grad.isfinite().all()]


def quiet() -> None:
    """Two processes, and no line of each for every step."""
    logging.set_verbosity_error()
