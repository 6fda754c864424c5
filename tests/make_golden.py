"""Writes those checkpoints of tests/golden that are not there yet: `python tests/make_golden.py`.

No test runs it: what is stored is a promise to everybody who has saved a model. A checkpoint that no longer gives its
outputs means that theirs do not either. To break that on purpose, delete its folder, run this, and say so in
CHANGELOG.md. `defaults.json` is written anew in every run; look at its difference before it is committed.

Each model is also computed in float64. What rounding does to the float32 outputs is printed, and has to stay far below
the tolerance of test_golden.py: other processors and other versions of PyTorch round otherwise.
"""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from golden_files import DEFAULTS, GOLDEN, defaults, outputs_of
from helpers import config_class, mask_of, model_class, randomise_
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from hf_efficient_attn import EffElectraConfig, EffElectraForJointPreTraining, EffElectraJointConfig


ROUNDING = 2e-6
MASKED_LM, CAUSAL_LM = "AutoModelForMaskedLM", "AutoModelForCausalLM"
SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "vocab_size": 16,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "sep_token_id": 2,
}
LONG = {"hidden_size": 4, "num_hidden_layers": 1}  # with tables of many positions


@dataclass(frozen=True)
class Golden:
    """One checkpoint. With `bare` its config.json has the sizes alone, so that the other defaults are tried too."""

    family: str
    auto: str
    options: dict[str, Any] = field(default_factory=dict)
    length: int = 26
    bare: bool = False


CASES = {
    "eff_big_bird": Golden(
        "eff_big_bird",
        MASKED_LM,
        {
            "block_size": 2,
            "num_random_blocks": 2,
            "random_seed": 3,
            "use_bias": False,
            "rescale_embeddings": True,
            "hidden_act": "gelu",
            "type_vocab_size": 3,
        },
    ),
    "eff_big_bird-etc": Golden(
        "eff_big_bird",
        MASKED_LM,
        {"block_size": 3, "num_random_blocks": 1, "num_global_tokens": 3, "global_ends": False, "embedding_size": 6},
    ),
    "eff_big_bird-bare": Golden("eff_big_bird", MASKED_LM, {**LONG, "max_position_embeddings": 780}, 770, bare=True),
    "eff_electra": Golden(
        "eff_electra",
        MASKED_LM,
        {"attention": "nystromformer", "attention_options": {"num_landmarks": 5}, "embedding_size": 6},
    ),
    "eff_electra-bare": Golden("eff_electra", MASKED_LM, {"embedding_size": 6}, bare=True),
    "eff_longformer": Golden(
        "eff_longformer",
        MASKED_LM,
        {
            "attention_window": [4, 6],
            "attention_dilation": [[1, 2], 1],
            "global_attention": "question",
            "norm_position": "pre",
            "layer_norm_eps": 1e-3,
        },
    ),
    "eff_longformer-bare": Golden(
        "eff_longformer", MASKED_LM, {**LONG, "max_position_embeddings": 290}, 280, bare=True
    ),
    "eff_longformer-causal": Golden(
        "eff_longformer",
        CAUSAL_LM,
        {"attention_window": [4, 10], "causal_global": "prefix", "global_attention": "cls", "position_offset": 0},
    ),
    "eff_nystromformer": Golden(
        "eff_nystromformer",
        MASKED_LM,
        {"num_landmarks": 4, "conv_kernel_size": 3, "pinv_iterations": 5, "inv_coeff_init_option": False},
    ),
    "eff_nystromformer-bare": Golden(
        "eff_nystromformer", MASKED_LM, {**LONG, "max_position_embeddings": 140}, 130, bare=True
    ),
    "eff_performer": Golden(
        "eff_performer",
        MASKED_LM,
        {"num_features": 14, "kernel": "relu", "orthogonal": False, "projection_seed": 5, "position_offset": None},
    ),
    "eff_performer-bare": Golden("eff_performer", MASKED_LM, {"num_hidden_layers": 1}, bare=True),
    "eff_performer-causal": Golden("eff_performer", CAUSAL_LM, {"num_features": 20, "projection_seed": 6}),
    "eff_reformer": Golden(
        "eff_reformer",
        MASKED_LM,
        {
            "attn_layers": ["lsh", "local"],
            "num_hashes": 2,
            "num_buckets": 4,
            "hash_seed": 7,
            "chunk_rule": "paper",
            "lsh_attn_chunk_length": 4,
            "lsh_num_chunks_after": 1,
            "local_attn_chunk_length": 3,
            "local_num_chunks_before": 2,
            "attention_head_size": 5,
            "axial_pos_shape": [5, 8],
            "axial_pos_embds_dim": [3, 5],
        },
    ),
    "eff_reformer-bare": Golden("eff_reformer", MASKED_LM, {"max_position_embeddings": 200}, 190, bare=True),
    "eff_reformer-causal": Golden(
        "eff_reformer",
        CAUSAL_LM,
        {"lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "axial_pos_embds": False, "hash_seed": 9},
    ),
    "eff_vit": Golden(
        "eff_vit",
        "AutoModelForImageClassification",
        {
            "attention": "neighborhood",
            "attention_options": {"radius": [1, 2]},
            "num_register_tokens": 2,
            "pooling": "mean",
            "qkv_bias": False,
            "image_size": [16, 12],
            "patch_size": 4,
            "num_labels": 5,
        },
    ),
    "eff_vit-bare": Golden(
        "eff_vit", "AutoModelForImageClassification", {"image_size": [12, 8], "patch_size": 4}, bare=True
    ),
    "eff_electra_joint": Golden(
        "eff_electra_joint", "AutoModelForPreTraining", {"sampling_seed": 2, "temperature": 1.5, "sharing": "all"}
    ),
}


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        if not (GOLDEN / name).exists():
            rounding = write(GOLDEN / name, case)
            size = sum(path.stat().st_size for path in (GOLDEN / name).iterdir())
            print(f"{name}: {size:,} bytes, float32 is {rounding:.1e} from float64")
    DEFAULTS.write_text(json.dumps(defaults(), indent=1) + "\n", encoding="utf-8")


def write(folder: Path, case: Golden) -> float:
    """Write one checkpoint, its inputs and outputs; how far the outputs are from those in float64."""
    config = config_of(case)
    model = build(case, config)
    inputs, select = (images if case.family == "eff_vit" else texts)(case)
    outputs = outputs_of(model, inputs, select)
    exact = outputs_of(deepcopy(model).double(), inputs, select)
    rounding = max((outputs[name] - exact[name]).abs().max().item() for name in outputs)
    if rounding > ROUNDING:
        sys.exit(
            f"{folder.name}: float32 is {rounding:.1e} from float64, which leaves the test no room; change the case"
        )
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    if case.bare:
        (folder / "config.json").write_text(json.dumps(bare(case), indent=2) + "\n", encoding="utf-8")
    tensors = {f"inputs.{key}": narrowed(value) for key, value in inputs.items()}
    tensors |= {f"outputs.{key}": narrowed(value.contiguous()) for key, value in outputs.items()}
    tensors |= {} if select is None else {"select": select}
    save_file(tensors, folder / "io.safetensors", metadata={"auto": case.auto})
    return rounding


def config_of(case: Golden) -> PreTrainedConfig:
    if case.family == "eff_electra_joint":
        small = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
        encoder = EffElectraConfig(**small, num_hidden_layers=1, embedding_size=8)
        return EffElectraJointConfig.from_discriminator(encoder, 1.0, **case.options)
    cls = config_class(case.family)
    known = {entry.name for entry in fields(cls)}
    return cls(**{**{name: size for name, size in SIZES.items() if name in known}, **case.options})


def build(case: Golden, config: PreTrainedConfig) -> PreTrainedModel:
    joint = case.family == "eff_electra_joint"
    cls: Callable[..., PreTrainedModel] = (
        EffElectraForJointPreTraining if joint else model_class(case.family, case.auto)
    )
    return randomise_(cls(config), seed=11)


def bare(case: Golden) -> dict[str, Any]:
    """A config.json with what differs from the defaults alone."""
    config, cls = config_of(case), config_class(case.family)
    given = {**SIZES, **case.options}
    known = {entry.name for entry in fields(cls)}
    written = {name: getattr(config, name) for name in given if name in known}
    assert AutoConfig.for_model(case.family, **written).to_dict() == config.to_dict()
    return {"model_type": case.family, "architectures": [model_class(case.family, case.auto).__name__], **written}


def texts(case: Golden) -> tuple[dict[str, Tensor], Tensor]:
    """A whole text, one padded on the right and one on the left, with other ids than the pad id in the padding."""
    generator = torch.Generator().manual_seed(5)
    length = case.length
    shorter = mask_of([length, length - 5], length)
    keep = torch.cat([shorter, mask_of([length - 9], length, "left")]).bool()
    ids = torch.randint(3, SIZES["vocab_size"], keep.shape, generator=generator)
    ids[:, 7] = torch.where(keep[:, 7], SIZES["sep_token_id"], ids[:, 7])
    inputs = {"input_ids": ids, "attention_mask": keep}
    if case.family == "eff_electra_joint":
        masked = keep & (torch.rand(keep.shape, generator=generator) < 0.3)
        inputs |= {"input_ids": ids.masked_fill(masked, 4), "labels": ids.masked_fill(~masked, -100)}
    elif case.family != "eff_reformer":
        inputs["token_type_ids"] = (torch.arange(length) > length // 2).long().expand_as(keep)
    select = keep & (torch.arange(length) % max(2, length // 13) == 0)
    return inputs, select


def images(case: Golden) -> tuple[dict[str, Tensor], None]:
    """Two images, of which the second is smaller than its pixels say, and neither has the size of the table."""
    pixels = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 3, 5, dtype=torch.bool)
    mask[1, 2:], mask[1, :, 3:] = False, False
    return {"pixel_values": pixels, "patch_mask": mask}, None


def narrowed(value: Tensor) -> Tensor:
    """Ids in eight bits, which the signed -100 fits into too."""
    return value.to(torch.int8).contiguous() if value.dtype == torch.int64 else value.contiguous()


if __name__ == "__main__":
    main()
