"""Pipelines and Trainer with every vision family: the tasks run as documented, without a warning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from helpers import model_class, no_warnings, randomise_, tiny_config
from PIL import Image
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, ViTImageProcessorPil, pipeline

from hf_efficient_attn import DataCollatorWithPatchMask
from hf_efficient_attn.auto import VISION_FAMILIES


LABELS = ["cat", "dog", "fox"]
EVERY_FAMILY = pytest.mark.parametrize("family", VISION_FAMILIES)
# Of different sizes: the processor makes them equal.
IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(30, 40), (16, 12), (50, 20)])
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`(family, Auto class, image size)` -> a folder with a random model and its image processor, made once."""
    made: dict[tuple[str, str, tuple[int, int]], str] = {}

    def folder(family: str, auto: str, size: tuple[int, int] = (16, 12)) -> str:
        if (family, auto, size) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{auto}")
            labels = {"id2label": dict(enumerate(LABELS)), "label2id": {x: i for i, x in enumerate(LABELS)}}
            randomise_(model_class(family, auto)(tiny_config(family, **labels))).save_pretrained(path)
            ViTImageProcessorPil(size={"height": size[0], "width": size[1]}).save_pretrained(path)
            made[family, auto, size] = str(path)
        return made[family, auto, size]

    return folder


def make_pipeline(task: str, folder: str) -> Any:
    """The stock pipeline with the stock processor in its PIL form, given where a version cannot find it itself."""
    return pipeline(task, model=folder, image_processor=ViTImageProcessorPil.from_pretrained(folder), device="cpu")


# What the processor makes is of the table's size, or of another: nobody passes an argument.
SIZES = pytest.mark.parametrize("size", [(16, 12), (28, 20), (18, 30)])


@EVERY_FAMILY
@SIZES
def test_image_classification(family: str, size: tuple[int, int], folders: Callable[..., str]) -> None:
    folder = folders(family, "AutoModelForImageClassification", size)
    with no_warnings():
        pipe = make_pipeline("image-classification", folder)
        single, batched = [pipe(image) for image in IMAGES], pipe(IMAGES, batch_size=2)
    for one, other in zip(single, batched, strict=True):
        assert {guess["label"] for guess in one} == set(LABELS)
        assert sum(guess["score"] for guess in one) == pytest.approx(1.0, abs=1e-5)
        assert other == [{**guess, "score": pytest.approx(guess["score"], abs=1e-5)} for guess in one]


@EVERY_FAMILY
@SIZES
def test_image_feature_extraction(family: str, size: tuple[int, int], folders: Callable[..., str]) -> None:
    folder = folders(family, "AutoModel", size)
    patches = -(-size[0] // 4) * -(-size[1] // 4)
    with no_warnings():
        pipe = make_pipeline("image-feature-extraction", folder)
        states, pooled = [pipe(image) for image in IMAGES], [pipe(image, pool=True) for image in IMAGES]
        batched = pipe(IMAGES, batch_size=2)
    for one, of_pool, other in zip(states, pooled, batched, strict=True):
        assert np.array(one).shape == (1, 1 + patches, 32) and np.array(of_pool).shape == (1, 32)
        np.testing.assert_allclose(np.array(other), np.array(one), atol=1e-5)


@EVERY_FAMILY
def test_the_pipeline_finds_the_processor(family: str, folders: Callable[..., str]) -> None:
    try:
        transformers.AutoImageProcessor.register  # noqa: B018
    except ImportError:
        pytest.skip("this version of transformers has no AutoImageProcessor without torchvision")
    folder = folders(family, "AutoModelForImageClassification")
    found = pipeline("image-classification", model=folder)(IMAGES[0])
    assert found == make_pipeline("image-classification", folder)(IMAGES[0])


def training_data(task: str) -> Dataset:
    """Twelve images, every third of another size, and labels or masked patches."""
    rows = []
    for row in range(12):
        size = (16, 12) if row % 3 or task == "masked" else (20, 8)
        pixels = np.random.default_rng(row).normal(size=(3, *size)).astype("float32") + row % 3
        more = {"bool_masked_pos": [n % 2 for n in range(12)]} if task == "masked" else {"labels": row % 3}
        rows.append({"pixel_values": pixels, **more})
    return Dataset.from_list(rows).with_format("torch")


def make_trainer(family: str, task: str, output: Path) -> Trainer:
    auto = "AutoModelForMaskedImageModeling" if task == "masked" else "AutoModelForImageClassification"
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        label_names=["bool_masked_pos" if task == "masked" else "labels"],
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return Trainer(
        model=randomise_(model_class(family, auto)(tiny_config(family, num_labels=3))),
        args=arguments,
        train_dataset=training_data(task),
        eval_dataset=training_data(task),
        data_collator=DataCollatorWithPatchMask(patch_size=4),
    )


@EVERY_FAMILY
@pytest.mark.parametrize("task", ["classification", "masked"])
def test_training(family: str, task: str, tmp_path: Path) -> None:
    trainer = make_trainer(family, task, tmp_path / "whole")
    with no_warnings():
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == 4 and all(np.isfinite(losses))
    assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == 2
    predictions = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape == ((12, 3) if task == "classification" else (12, 3, 16, 12))

    # Saved under the published names, and resumed to the same place.
    weights = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert set(weights) == set(trainer.model.state_dict())
    with no_warnings():
        reloaded = type(trainer.model).from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert all(torch.equal(reloaded.state_dict()[name], tensor) for name, tensor in weights.items())
    resumed = make_trainer(family, task, tmp_path / "resumed")
    with no_warnings():
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in load_file(tmp_path / "resumed" / "checkpoint-4" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
