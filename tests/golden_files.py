"""The stored checkpoints of tests/golden: how a folder is laid out, and what is compared of a model's outputs.

A folder holds `config.json` and `model.safetensors` as `save_pretrained` wrote them, and `io.safetensors`: inputs
(`inputs.<name>`), outputs (`outputs.<name>`), `select`, a mask over the tokens whose outputs are there (padding has no
outputs that mean anything, and of a long text some tokens are enough), and as metadata the name of the Auto class.
`defaults.json` holds the default of every field that the package's config classes declare.
"""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_efficient_attn import auto


GOLDEN = Path(__file__).with_name("golden")
DEFAULTS = GOLDEN / "defaults.json"

# Of the outputs of models: whichever of them there are.
COMPARED = ("logits", "discriminator_logits", "loss", "corrupted_ids")


def folders() -> list[Path]:
    """Every stored checkpoint."""
    return sorted(path.parent for path in GOLDEN.glob("*/io.safetensors"))


def stored(folder: Path) -> tuple[str, dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """Name of the Auto class, inputs, outputs, and the tokens whose outputs they are."""
    with safetensors.safe_open(folder / "io.safetensors", "pt") as file:
        auto_name = file.metadata()["auto"]
    tensors = load_file(folder / "io.safetensors")
    of_kind = [
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in ("inputs.", "outputs.")
    ]
    return auto_name, *of_kind, tensors.get("select")


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor], select: Tensor | None) -> dict[str, Tensor]:
    """What is compared of a model in eval mode: of outputs a token those that `select` keeps."""
    answer = model(**{name: widened(value, model.dtype) for name, value in inputs.items()})
    found = {name: answer[name] for name in COMPARED if answer.get(name) is not None}
    return {
        name: value[select] if select is not None and value.shape[:2] == select.shape else value
        for name, value in found.items()
    }


def widened(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Ids are stored in few bits."""
    return value.to(dtype) if value.is_floating_point() else value if value.dtype == torch.bool else value.long()


def defaults() -> dict[str, dict[str, Any]]:
    """Config class -> field -> default, of the fields that the package declares (transformers' own may come and go)."""
    found = {}
    for row in (*auto.FAMILIES.values(), *auto.COMPOSITES.values()):
        cls = getattr(row.module("configuration"), row.config_name)
        own = {
            name
            for base in cls.__mro__
            if base.__module__.startswith("hf_efficient_attn.")
            for name in base.__dict__.get("__annotations__", {})
        }
        found[row.config_name] = {
            field.name: field.default if field.default_factory is MISSING else field.default_factory()
            for field in sorted(fields(cls), key=lambda field: field.name)
            if field.name in own and field.default is not MISSING or field.default_factory is not MISSING
        }
    return json.loads(json.dumps(found))
