"""Train or fine-tune an image classifier with any attention of the package, and draw what it looks at.

    python examples/train_vit.py                                        # scikit-learn's digits, from scratch
    python examples/train_vit.py --dataset photos --image-size 128 --patch-size 8 --attention neighborhood
    python examples/train_vit.py --dataset beans --model google/vit-base-patch16-224 --epochs 3

--dataset is a folder with one subfolder of images for each label (or with train/ and test/ above them), or a name on
the Hub. Without it the images are 1,797 real digits of 8 x 8 pixels. A fifth is held out where there is no test split.
--model is any folder or Hub name of a ViT, or of another image classifier that AutoModelForImageClassification can
load; without it a small EffViT is trained from scratch. Saves model and image processor, loads both again through the
Auto class and the pipeline, and writes attention.png of a ViT: for attention whose weights are probabilities the
rollout over all layers (Abnar & Zuidema 2020), else the class token's last weights.

On several GPUs: accelerate launch examples/train_vit.py ... On CPU cores shared with other programs set
OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait slow each other.
"""

import argparse
import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    ViTImageProcessorPil,
    default_data_collator,
    pipeline,
    set_seed,
)

from hf_efficient_attn import (
    ATTENTIONS,
    FAMILIES,
    EffViTConfig,
    EffViTForImageClassification,
    EpochOfMasks,
    recipes,
)
from hf_efficient_attn.demo import accuracy


def options(text: str) -> dict[str, Any]:
    """A JSON object, for argparse."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return found


def read_arguments() -> argparse.Namespace:
    parser = recipes.RecipeParser(
        __doc__, output_dir="vit-classifier", epochs=50, batch_size=64, learning_rate=1.5e-3, tuned_learning_rate=1e-4
    )
    parser.data.add_argument("--image-column", default="image")
    parser.data.add_argument("--label-column", default="label")
    parser.data.add_argument("--labels", nargs="+", help="all labels, where a stream has names and does not list them")
    parser.data.add_argument("--shift", type=int, default=1, help="training images move by up to so many pixels")
    parser.model.add_argument("--attention", choices=list(ATTENTIONS), help="default: softmax, or that of --model")
    parser.model.add_argument("--attention-options", type=options, help="as JSON, such as '{\"radius\": 3}'")
    parser.model.add_argument("--image-size", type=recipes.count, help="default: 16, or that of --model")
    parser.model.add_argument("--patch-size", type=recipes.count, help="of a new model (default: 4)")
    parser.model.add_argument("--hidden-size", type=recipes.count, help="of a new model (default: 96)")
    parser.model.add_argument("--layers", type=recipes.count, help="of a new model (default: 4)")
    args = parser.parse_args()
    for name, default in {"patch_size": 4, "hidden_size": 96, "layers": 4}.items():
        if args.model is not None and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of a new model, and --model has its own: give one of them")
        setattr(args, name, getattr(args, name) or default)
    if args.hidden_size % 4:
        parser.error(f"--hidden-size {args.hidden_size}: give a multiple of 4, the number of heads")
    if args.shift < 0:
        parser.error(f"--shift {args.shift}: give 0 or more")
    return args


def read_data(args: argparse.Namespace) -> tuple[Dataset | IterableDataset, Dataset, list[str]]:
    """Training and held-out side with columns `image` and `label`, and the labels' names."""
    if args.dataset is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = [Image.fromarray((image * 255 / 16).astype("uint8")).convert("RGB") for image in digits.images]
        whole = Dataset.from_dict({"image": images, "label": [str(label) for label in digits.target]})
        whole = whole.class_encode_column("label")
        sides = whole.train_test_split(0.2, seed=args.seed, stratify_by_column="label").values()
    else:
        sides = recipes.read_sides(args)
        recipes.check_columns(sides, {"--image-column": args.image_column, "--label-column": args.label_column}, None)
        names = {args.image_column: "image", args.label_column: "label"}
        sides = [side.select_columns(list(names)) for side in sides]
        sides = [side.rename_columns({a: b for a, b in names.items() if a != b}) for side in sides]
    train, held_out = recipes.limit_sides(args, *sides)
    feature = (train.features or {}).get("label")
    if not isinstance(feature, ClassLabel):
        if args.labels is None and isinstance(train, IterableDataset):
            raise ValueError("a stream does not list its labels: name them all with --labels.")
        feature = ClassLabel(names=args.labels or sorted({str(label) for label in train["label"]}))
        train, held_out = (side.cast_column("label", feature) for side in (train, held_out))
    return train, held_out, feature.names


class Shifts:
    """Moves an image by up to so many pixels up or down and to the left or right.

    How far is a function of seed, epoch and place in the data, so that an interrupted run goes on as it would have.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seed, self.epoch = most, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, pixels: torch.Tensor, index: int) -> torch.Tensor:
        random = np.random.default_rng((self.seed, self.epoch, index))
        return pixels.roll(random.integers(-self.most, self.most + 1, 2).tolist(), dims=(1, 2))


class Images(torch.utils.data.Dataset):
    """Images as the processor gives them; moved by a few pixels in training."""

    def __init__(self, data: Dataset, processor: ViTImageProcessorPil, shifts: Shifts | None = None) -> None:
        images = [image.convert("RGB") for image in data["image"]]
        self.pixels = processor(images, return_tensors="pt").pixel_values
        self.labels, self.shifts = torch.tensor(data["label"]), shifts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.pixels[index]
        return {"pixel_values": self.shifts(pixels, index) if self.shifts else pixels, "labels": self.labels[index]}


def as_pixels(data: Dataset | IterableDataset, processor: ViTImageProcessorPil, shifts: Shifts) -> Any:
    """The training side: in memory, or of a stream as it comes."""
    if isinstance(data, Dataset):
        return Images(data, processor, shifts)

    def encode(row: dict[str, Any], index: int) -> dict[str, Any]:
        pixels = processor(row["image"].convert("RGB"), return_tensors="pt").pixel_values[0]
        return {"pixel_values": shifts(pixels, index), "labels": row["label"]}

    return data.map(encode, with_indices=True, remove_columns=["image", "label"])


def make_model(args: argparse.Namespace, labels: list[str]) -> PreTrainedModel:
    """The model of `--model`, with a new head where it has other labels, or a new small EffViT."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    chosen = {"attention": args.attention, "attention_options": args.attention_options, "image_size": args.image_size}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if args.model is not None:
        kind = AutoConfig.from_pretrained(args.model).model_type
        if kind not in (*FAMILIES, *EffViTConfig.original_model_types):
            if own := [name for name in chosen if name != "image_size"]:
                raise ValueError(f"{', '.join(own)}: {args.model} is a {kind}, and only a ViT has such a choice.")
            return AutoModelForImageClassification.from_pretrained(args.model, **names, ignore_mismatched_sizes=True)
        config = EffViTConfig.from_pretrained(args.model, **names, **chosen)
        return EffViTForImageClassification.from_pretrained(args.model, config=config, ignore_mismatched_sizes=True)
    config = EffViTConfig(
        **{"image_size": 16, **chosen},
        patch_size=args.patch_size,
        encoder_stride=args.patch_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        intermediate_size=2 * args.hidden_size,
        hidden_dropout_prob=0.1,
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


@recipes.errors_in_one_line()
def prepare(args: argparse.Namespace) -> tuple[Trainer, str | None, Dataset]:
    """The Trainer, the checkpoint to go on from, and the held-out images."""
    recipes.checkpoint_to_resume(args)
    arguments = recipes.training_arguments(
        args,
        best="accuracy",
        greater_is_better=True,
        train_sampling_strategy="random",
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.05,
        adam_beta2=0.999,
        remove_unused_columns=False,
    )
    with arguments.main_process_first():
        train, held_out, labels = read_data(args)
    set_seed(args.seed)
    model = make_model(args, labels)
    if model.config.model_type in FAMILIES:
        arguments.ddp_find_unused_parameters = False
    if getattr(model.config, "num_channels", 3) != 3:
        raise ValueError(f"num_channels = {model.config.num_channels}: images are read as RGB, of 3.")
    height, width = np.broadcast_to(args.image_size or getattr(model.config, "image_size", 224), 2).tolist()
    processor = make_processor(args.model, height, width)
    if arguments.process_index == 0:
        print(
            f"{recipes.rows_of(train)} images to learn and {recipes.rows_of(held_out)} held out, {len(labels)} labels; "
            f"{model.num_parameters():,} parameters, {getattr(model.config, 'attention', 'its own')} attention, "
            f"{height} x {width} pixels"
        )
    shifts = Shifts(args.shift, args.seed)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=as_pixels(train, processor, shifts),
        eval_dataset=Images(held_out, processor),
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        callbacks=[EpochOfMasks(shifts)],
    )
    return trainer, recipes.checkpoint_to_resume(args, model), held_out


def main() -> None:
    args = read_arguments()
    trainer, checkpoint, held_out = prepare(args)
    metrics = recipes.train_and_save(trainer, args, checkpoint, curves=("loss", "accuracy"))
    if not trainer.is_world_process_zero():
        return
    print(f"\nheld-out accuracy {metrics['eval_accuracy']:.2%}")
    processor = trainer.processing_class
    loaded = AutoModelForImageClassification.from_pretrained(args.output_dir)
    shown = [image.convert("RGB") for image in held_out["image"][:6]]
    guess = pipeline("image-classification", model=loaded, image_processor=processor, device="cpu")
    guesses = [found[0]["label"] for found in guess(shown)]
    names = held_out.features["label"].names
    print(f"the pipeline says {', '.join(guesses)} for {', '.join(names[x] for x in held_out['label'][:6])}")
    picture = ""
    if loaded.config.model_type in FAMILIES and importlib.util.find_spec("matplotlib") is not None:
        maps, title = attention_maps(loaded.cpu().eval(), processor(shown, return_tensors="pt").pixel_values)
        draw(shown, maps, guesses, title, args.output_dir / "attention.png")
        picture = f", attention.png ({title})"
    print(f"Model, image processor, figures, training.png{picture}: {args.output_dir}")


if __name__ == "__main__":
    main()
