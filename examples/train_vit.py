"""Train or fine-tune an image classifier with any attention of the package, and draw what it looks at.

    python examples/train_vit.py                                        # scikit-learn's digits, from scratch
    python examples/train_vit.py --dataset photos --image-size 128 --patch-size 8 --attention neighborhood
    python examples/train_vit.py --dataset beans --checkpoint google/vit-base-patch16-224 --epochs 3

--dataset is a folder with one subfolder of images for each label (or with train/ and test/ above them), or a name on
the Hub. Without it the images are 1,797 real digits of 8 x 8 pixels. A fifth is held out where there is no test split.
--checkpoint is any folder or Hub name of a ViT; without it a small one is trained from scratch. Saves model and image
processor, loads both again through the Auto class and the pipeline, and writes attention.png: for attention whose
weights are probabilities the rollout over all layers (Abnar & Zuidema 2020), else the class token's last weights.

On CPU cores shared with other programs set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from hf_efficient_attn import ATTENTIONS, EffViTConfig, EffViTForImageClassification


def options(text: str) -> dict[str, Any]:
    """A JSON object, for argparse."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return found


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="folder of images, or a name on the Hub; default: handwritten digits")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--checkpoint", help="folder or Hub name of a ViT; default: a new small one")
    parser.add_argument("--attention", default="softmax", choices=list(ATTENTIONS))
    parser.add_argument("--attention-options", type=options, default={}, help="as JSON, such as '{\"radius\": 3}'")
    parser.add_argument("--image-size", type=int, help="default: 16, or that of --checkpoint")
    parser.add_argument("--patch-size", type=int, help="of a new model (default: 4)")
    parser.add_argument("--hidden-size", type=int, help="of a new model (default: 96)")
    parser.add_argument("--layers", type=int, help="of a new model (default: 4)")
    parser.add_argument("--epochs", type=float, default=50.0, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="(default: %(default)s)")
    parser.add_argument("--shift", type=int, default=1, help="training images move by up to so many pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("vit-classifier"))
    arguments = parser.parse_args()
    for name, default in {"patch_size": 4, "hidden_size": 96, "layers": 4}.items():
        if arguments.checkpoint is not None and getattr(arguments, name) is not None:
            parser.error(
                f"--{name.replace('_', '-')} is of a new model, and --checkpoint has its own: give one of them"
            )
        setattr(arguments, name, default if getattr(arguments, name) is None else getattr(arguments, name))
    if arguments.image_size is not None and arguments.image_size < 1:
        parser.error(f"--image-size {arguments.image_size}: give 1 or more")
    if min(arguments.patch_size, arguments.hidden_size, arguments.layers, arguments.batch_size) < 1:
        parser.error("--patch-size, --hidden-size, --layers and --batch-size must be 1 or more")
    if arguments.hidden_size % 4:
        parser.error(f"--hidden-size {arguments.hidden_size}: give a multiple of 4, the number of heads")
    if not (arguments.epochs > 0 and arguments.learning_rate > 0) or arguments.shift < 0:
        parser.error("--epochs and --learning-rate must be above 0, --shift 0 or more")
    if arguments.output_dir.is_file():
        parser.error(f"--output-dir: {arguments.output_dir} is a file")
    return arguments


def read_data(arguments: argparse.Namespace) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out side with columns `image` and `label`, and the labels' names."""
    if arguments.dataset is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = [Image.fromarray((image * 255 / 16).astype("uint8")).convert("RGB") for image in digits.images]
        whole = Dataset.from_dict({"image": images, "label": [str(label) for label in digits.target]})
        splits = whole.class_encode_column("label").train_test_split(
            0.2, seed=arguments.seed, stratify_by_column="label"
        )
    else:
        folder = Path(arguments.dataset)
        splits = load_dataset("imagefolder", data_dir=str(folder)) if folder.is_dir() else load_dataset(str(folder))
        columns = splits["train"].column_names
        for option, name in (("--image-column", arguments.image_column), ("--label-column", arguments.label_column)):
            if name not in columns:
                raise SystemExit(f"{option} {name}: the data has {', '.join(columns)}.")
        names = {arguments.image_column: "image", arguments.label_column: "label"}
        splits = splits.select_columns(list(names)).rename_columns({a: b for a, b in names.items() if a != b})
        if not hasattr(splits["train"].features["label"], "names"):
            splits = splits.class_encode_column("label")
        if "test" not in splits and "validation" not in splits:
            splits = splits["train"].train_test_split(0.2, seed=arguments.seed)
    held_out = splits["test"] if "test" in splits else splits["validation"]
    return splits["train"], held_out, splits["train"].features["label"].names


class Images(torch.utils.data.Dataset):
    """Images as the processor gives them; moved by a few pixels in training."""

    def __init__(self, data: Dataset, processor: ViTImageProcessorPil, shift: int = 0) -> None:
        images = [image.convert("RGB") for image in data["image"]]
        self.pixels = processor(images, return_tensors="pt").pixel_values
        self.labels, self.shift = torch.tensor(data["label"]), shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.pixels[index]
        if self.shift > 0:
            down, right = (int(torch.randint(-self.shift, self.shift + 1, ())) for _ in range(2))
            pixels = pixels.roll((down, right), dims=(1, 2))
        return {"pixel_values": pixels, "labels": self.labels[index]}


def make_model(arguments: argparse.Namespace, labels: list[str]) -> PreTrainedModel:
    """The checkpoint with a new head where it has other labels, or a new small model."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    attention = {"attention": arguments.attention, "attention_options": arguments.attention_options}
    if arguments.checkpoint is not None:
        size = {} if arguments.image_size is None else {"image_size": arguments.image_size}
        config = EffViTConfig.from_pretrained(arguments.checkpoint, **names, **attention, **size)
        return EffViTForImageClassification.from_pretrained(
            arguments.checkpoint, config=config, ignore_mismatched_sizes=True
        )
    config = EffViTConfig(
        image_size=arguments.image_size or 16,
        patch_size=arguments.patch_size,
        encoder_stride=arguments.patch_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        intermediate_size=2 * arguments.hidden_size,
        hidden_dropout_prob=0.1,
        **attention,
        **names,
    )
    return EffViTForImageClassification(config)


def make_processor(checkpoint: str | None, height: int, width: int) -> ViTImageProcessorPil:
    """The checkpoint's way of scaling and norming pixels, where it comes with one, at this size."""
    size = {"size": {"height": height, "width": width}}
    if checkpoint is not None:
        with contextlib.suppress(OSError):
            return ViTImageProcessorPil.from_pretrained(checkpoint, **size)
    return ViTImageProcessorPil(**size)


@torch.inference_mode()
def attention_maps(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, str]:
    """How much of each patch goes into what stands for an image, `[images, rows, columns]`, and what that is."""
    model.set_attn_implementation("eager")
    attentions = [weights.float() for weights in model(pixels, output_attentions=True).attentions]
    model.set_attn_implementation("sdpa")
    ones = torch.ones(())
    probabilities = all((x >= 0).all() and torch.allclose(x.sum(dim=-1), ones, atol=1e-3) for x in attentions)
    rows, columns = (size // step for size, step in zip(pixels.shape[2:], model.config.patch_shape, strict=True))
    first = model.config.num_prefix_tokens
    # The class token, or with mean pooling all patches.
    pooled = slice(0, 1) if model.config.pooling == "cls" else slice(first, None)
    if not probabilities:
        # Products of weights of either sign mean nothing.
        last = attentions[-1].mean(dim=1)[:, pooled, first:].mean(dim=1)
        return last.abs().unflatten(1, (rows, columns)), "last weights"
    through = torch.eye(attentions[0].shape[-1])
    for weights in attentions:
        # Half of what a layer passes on goes past its attention.
        through = (0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1])) @ through
    return through[:, pooled, first:].mean(dim=1).unflatten(1, (rows, columns)), "rollout"


def draw(images: list[Image.Image], maps: torch.Tensor, guesses: list[str], title: str, path: Path) -> None:
    """The images, and below them what the model looks at."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(images), figsize=(1.6 * len(images), 3.6), squeeze=False)
    for column, (image, found, guess) in enumerate(zip(images, maps, guesses, strict=True)):
        axes[0, column].imshow(np.asarray(image))
        axes[0, column].set_title(guess)
        axes[1, column].imshow(found.numpy(), cmap="magma")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(f"Attention ({title})")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    arguments = read_arguments()
    try:
        train, held_out, labels = read_data(arguments)
        torch.manual_seed(arguments.seed)
        model = make_model(arguments, labels)
    except (OSError, ValueError) as error:
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from None
    if model.config.num_channels != 3:
        raise SystemExit(f"Error: num_channels = {model.config.num_channels}: images are read as RGB, of 3.")
    height, width = model.config.image_shape
    processor = make_processor(arguments.checkpoint, height, width)
    print(
        f"{len(train):,} images to learn and {len(held_out):,} held out, {len(labels)} labels; "
        f"{model.num_parameters():,} parameters, {arguments.attention} attention, {height} x {width} pixels"
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.output_dir),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            weight_decay=0.05,
            logging_steps=200,
            save_strategy="no",
            seed=arguments.seed,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Images(train, processor, arguments.shift),
        eval_dataset=Images(held_out, processor),
        compute_metrics=lambda result: {"accuracy": float((result[0].argmax(axis=1) == result[1]).mean())},
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model()
    processor.save_pretrained(arguments.output_dir)

    loaded = AutoModelForImageClassification.from_pretrained(arguments.output_dir)
    accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"held-out accuracy {accuracy:.2%}, trained in {seconds:.0f} s")
    shown = [image.convert("RGB") for image in held_out["image"][:6]]
    guess = pipeline("image-classification", model=loaded, image_processor=processor, device="cpu")
    guesses = [found[0]["label"] for found in guess(shown)]
    maps, title = attention_maps(loaded.cpu().eval(), processor(shown, return_tensors="pt").pixel_values)
    draw(shown, maps, guesses, title, arguments.output_dir / "attention.png")
    print(f"the pipeline says {', '.join(guesses)} for {', '.join(labels[x] for x in held_out['label'][:6])}")
    print(f"model, processor and attention.png ({title}): {arguments.output_dir}")


if __name__ == "__main__":
    main()
