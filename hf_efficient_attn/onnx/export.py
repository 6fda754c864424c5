"""`export_onnx`: a model of the package as an ONNX program, compared with the model before it is there."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from ..auto import COMPOSITES, FAMILIES, register_models
from ..extras import require_extras
from ..loading import class_of, load_whole
from ..modes import eval_mode
from .inputs import ProgramInputs
from .program import Program
from .writing import write_program


OPSETS = range(18, 24)
"""The operator sets that programs can be written in; the first one unless another is asked for."""

# Tokens of what is traced, and rows of patches: no size of an option, and more than the blocks of small models. The
# other sizes are those that the program is compared at.
_TRACED, _COMPARED = (2, 37), ((1, 11), (3, 83))
_TRACED_IMAGE, _COMPARED_IMAGES = (2, 5), ((1, 3), (3, 8))


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote.

    Args:
        path: the program; weights of more than 1.5 GB lie beside it in a file of the same name and `.data`.
        opset: its operator set.
        inputs: names of its inputs, all of them to be given.
        outputs: names of its outputs.
        max_global_tokens: room for so many global tokens an example; None in models without such.
        sizes: batch and length (of images: rows of patches) that it was compared with the model at.
        error: largest difference there, relative to the largest number of the output where that is over 1.
    """

    path: Path
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    max_global_tokens: int | None
    sizes: tuple[tuple[int, int], ...]
    error: float

    def __str__(self) -> str:
        sizes = ", ".join(f"{batch} x {length}" for batch, length in self.sizes)
        room = "" if self.max_global_tokens is None else f"; room for {self.max_global_tokens} global tokens an example"
        return (
            f"{self.path}, operator set {self.opset}; inputs {', '.join(self.inputs)}; outputs "
            f"{', '.join(self.outputs)}{room}; differs from the model by {self.error:.1g} at most ({sizes})"
        )


def export_onnx(
    source: str | os.PathLike | PreTrainedModel,
    path: str | os.PathLike | None = None,
    *,
    more_inputs: str | Sequence[str] = (),
    opset: int = OPSETS[0],
    tolerance: float = 1e-4,
) -> OnnxExport:
    """Write a model as an ONNX program with dynamic batch and length, images with dynamic height and width.

    Inputs are `input_ids` and `attention_mask`, and `token_type_ids` where the model has several types, int64
    `[batch, length]` (`[batch, choices, length]` for multiple choice); of image models `pixel_values`
    `[batch, channels, height, width]`. Outputs are those of the model. Global tokens go by the config's rule, or by
    `global_attention_mask`, if asked for as an input; there is room for `config.max_global_tokens` an example.

    A program has no errors to raise: for an input that the model refuses (more tokens than it reads, or more global
    ones than there is room for) every output is NaN, unless the runtime itself refuses it. It has no cache: a causal
    one gives the scores of a whole text. Images are from two rows and columns of patches on.

    The program is run in onnxruntime beside the model, at two sizes it was not traced at, before it takes its place.

    Args:
        source: a model, a folder, or a name on the Hub; loaded in float32.
        path: of the program; by default `onnx/model.onnx` in the folder.
        more_inputs: one input or several besides those: `global_attention_mask`, `position_ids`, `token_type_ids`,
            `patch_mask` (images then come in whole patches).
        opset: the operator set, 18 to 23.
        tolerance: by how much outputs may differ from the model's, relative to the largest where that is over 1.

    Raises:
        ValueError: no model of the package, or one that a program cannot hold, by name; missing weights; outputs that
            differ; a package of the extra `onnx` that is not installed. What lay at `path` is still there.
    """
    require_extras("onnx", "onnxscript", "onnxruntime", extra="onnx")
    if opset not in OPSETS:
        raise ValueError(
            f"opset = {opset!r}: programs are in operator set {OPSETS[0]} to {OPSETS[-1]}; give {OPSETS[0]}."
        )
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise ValueError(f"tolerance = {tolerance!r}: give how far outputs may differ, 0 or more, such as 1e-4.")
    path = _path_of(source, path)
    model = _model_of(source)
    _refuse_what_no_program_holds(model)
    inputs = ProgramInputs(model, (more_inputs,) if isinstance(more_inputs, str) else more_inputs)
    with eval_mode(model), torch.autocast("cpu", enabled=False):
        return _export(Program(model, inputs).eval(), inputs, path, opset, tolerance)


def _path_of(source: object, path: str | os.PathLike | None) -> Path:
    if path is None:
        if not isinstance(source, str | os.PathLike):
            raise ValueError("path: only a folder has a place for its program; say where that of a model goes.")
        if not (Path(source) / "config.json").is_file():
            raise ValueError(
                f"there is no config.json in {os.fspath(source)!r}; give a folder that save_pretrained wrote, or for a "
                "name on the Hub a path as well."
            )
        return Path(source) / "onnx" / "model.onnx"
    path = Path(path)
    if path.suffix != ".onnx" or path.is_dir():
        raise ValueError(f"path = {os.fspath(path)!r}: give the name of a file that ends in .onnx.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"path = {os.fspath(path)!r}: {os.fspath(parent)!r} is a file; choose another folder.")
    return path


def _model_of(source: object) -> PreTrainedModel:
    if isinstance(source, torch.nn.Module):
        kind = getattr(getattr(source, "config", None), "model_type", None)
        if not isinstance(source, PreTrainedModel):
            raise ValueError(
                f"source is a {type(source).__name__}, no model of transformers; one with adapters is merged first "
                "(merge_and_unload())."
            )
        _refuse_other_families(kind)
        return source
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"source is a {type(source).__name__}; give a model, a folder, or a name on the Hub.")
    register_models()
    place = os.fspath(source)
    config = AutoConfig.from_pretrained(place)
    _refuse_other_families(config.model_type)
    return load_whole(class_of(config), place, dtype=torch.float32)[0]


def _refuse_other_families(kind: str | None) -> None:
    if kind in COMPOSITES:
        raise ValueError(
            f"model type {kind!r}: it draws its replaced tokens at random, which an operator set does not hold the way "
            "torch does; export one of its models: model.save_discriminator(folder)."
        )
    if kind not in FAMILIES:
        raise ValueError(
            f"model type {kind!r} is no family of the package, which has {', '.join(FAMILIES)}; convert() makes one of "
            "many checkpoints, and optimum exports transformers' own models."
        )


def _refuse_what_no_program_holds(model: PreTrainedModel) -> None:
    dtypes = sorted({str(x.dtype) for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()})
    if dtypes != ["torch.float32"]:
        raise ValueError(f"the model is in {', '.join(dtypes)}; programs are made of float32: model.float().")
    devices = sorted({x.device.type for x in model.parameters()})
    if devices != ["cpu"]:
        raise ValueError(f"the model is on {', '.join(devices)}; move it first: model.cpu().")
    if (backend := model.config._attn_implementation) not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation = {backend!r}: no operator set holds it; model.set_attn_implementation('sdpa') "
            "computes the same."
        )


@torch.no_grad()
def _export(program: Program, inputs: ProgramInputs, path: Path, opset: int, tolerance: float) -> OnnxExport:
    if inputs.reads_images:
        traced, compared = _TRACED_IMAGE, _COMPARED_IMAGES
    else:
        longest = inputs.longest_that_fits
        traced, compared = _TRACED, tuple((batch, min(length, longest)) for batch, length in _COMPARED)
    example = inputs.example(*traced, padded=True)
    names = tuple(program.outputs(example))
    written = write_program(program, example, inputs, names, opset)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        written.save(os.fspath(new))
        error = _largest_difference(new, program, inputs, compared, names)
        if not error <= tolerance:
            raise ValueError(
                f"the program's outputs differ from the model's by {error:.2g}, more than tolerance = {tolerance:g}; "
                "nothing was written. Where the model itself jumps at roundings (hashing does), allow more."
            )
        # Weights first: at no time does a program name a file that is not there.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    room = getattr(inputs.config, "max_global_tokens", None)
    return OnnxExport(path, opset, inputs.names, names, room, compared, error)


def _largest_difference(
    path: Path, program: Program, inputs: ProgramInputs, sizes: Sequence[tuple[int, int]], names: Sequence[str]
) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Threads that spin while they wait keep those they wait for from running where cores are shared.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for seed, (batch, length) in enumerate(sizes):
        given = inputs.example(batch, length, padded=batch > 1, seed=seed)
        found = session.run(list(names), {name: x.numpy() for name, x in given.items()})
        for ours, theirs in zip(program.outputs(given).values(), found, strict=True):
            difference = (torch.from_numpy(theirs) - ours).abs().max() / ours.abs().max().clamp(min=1.0)
            worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst
