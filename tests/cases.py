"""The table of mechanisms: one row each, and every law runs over every row and every variant of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracles
import torch
from case_types import HEAD_DIM, HEADS, Case, Variant, no_tokens
from grid_cases import GRID_CASES
from reformer_cases import REFORMER_CASES
from torch import Tensor

from hf_efficient_attn.functional import (
    TokenSlots,
    big_bird_attention,
    count_blocks,
    count_text_blocks,
    nystrom_attention,
    performer_attention,
    pick_random_blocks,
    random_draws,
    select_tokens,
    sliding_window_attention,
    softmax_attention,
)


LENGTHS = (1, 7, 63, 64, 100)


def some_tokens(batch: int, length: int) -> Tensor:
    """A different number of global tokens in each example, counted from the end so that left padding spares them."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in range(batch):
        for step in range(row + 1):
            mask[row, length - 1 - (step * 5 + row) % max(1, length // 2)] = True
    return mask


def all_tokens(batch: int, length: int) -> Tensor:
    """Every token is global."""
    return torch.ones(batch, length, dtype=torch.bool)


def slots(is_global: Tensor | TokenSlots | None, keep: Tensor | None) -> TokenSlots | None:
    """Global tokens the way the model prepares them."""
    if is_global is None or isinstance(is_global, TokenSlots):
        return is_global
    mask = is_global if keep is None else is_global & keep
    return select_tokens(mask, int(mask.sum(dim=1).max()))


def _softmax(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: None, **kwargs: Any) -> Tensor:
    return softmax_attention(query, key, value, keep, **kwargs)


def _sliding_window(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: Tensor | None, **kwargs: Any
) -> Tensor:
    return sliding_window_attention(query, key, value, keep, global_tokens=slots(is_global, keep), **kwargs)


def _longformer(
    radius: int,
    dilation: int | list[int],
    is_global: Callable = no_tokens,
    causal: bool = False,
    quadratic: bool = False,
) -> Variant:
    config = {"attention_window": 2 * radius, "attention_dilation": [dilation]}
    options = {"radius": radius, "dilation": dilation, "causal": causal}
    return Variant(options, config, is_global, causal, quadratic)


def _big_bird(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    is_global: None,
    *,
    block_size: int,
    draws: Tensor,
    num_global: int,
    ends: bool,
    **kwargs: Any,
) -> Tensor:
    length = max(1, key.shape[2] - num_global)
    text_blocks = count_text_blocks(keep, key.shape[2], block_size, num_global, key.device)
    draws = draws[:, : count_blocks(length, block_size)]
    pattern = {
        "block_size": block_size,
        "random_blocks": pick_random_blocks(draws, text_blocks, ends_are_global=ends),
        "num_global": num_global,
        "global_ends": ends,
    }
    return big_bird_attention(query, key, value, keep, **pattern, **kwargs)


def _blocks(size: int, count: int = 2, num_global: int = 0, ends: bool = True) -> Variant:
    draws = random_draws(0, 0, HEADS, 2100 // size, count, device=torch.device("cpu"))
    config = {
        "block_size": size,
        "num_random_blocks": count,
        "num_global_tokens": num_global,
        "global_ends": ends,
    }
    return Variant({"block_size": size, "draws": draws, "num_global": num_global, "ends": ends}, config)


def _nystrom(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: None, **kwargs: Any) -> Tensor:
    return nystrom_attention(query, key, value, keep, **kwargs)


def _nystromformer(
    landmarks: int,
    iterations: int | None = 6,
    per_matrix: bool = True,
    kernel: int | None = 5,
    rounding: float = 1.0,
) -> Variant:
    options = {"num_landmarks": landmarks, "pinv_iterations": iterations, "scale_per_matrix": per_matrix}
    config = {
        "num_landmarks": landmarks,
        "pinv_iterations": iterations,
        "inv_coeff_init_option": per_matrix,
        "conv_kernel_size": kernel,
    }
    return Variant(options, config, rounding=rounding)


def _performer(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, is_global: None, **kwargs: Any
) -> Tensor:
    return performer_attention(query, key, value, keep, **kwargs)


def _performer_module(
    weights: dict[str, Tensor], x: Tensor, keep: Tensor | None, heads: int, is_global: None, **options: Any
) -> Tensor:
    # The module has drawn a projection of its own.
    options = {name: value for name, value in options.items() if name != "projection"}
    return oracles.performer_module(weights, x, keep, heads=heads, **options)


def _features(count: int, kernel: str = "softmax", causal: bool = False, exact_below: int = 0) -> Variant:
    """Independent features, whose number need not be a multiple of `HEAD_DIM`."""
    draws = torch.randn(count, HEAD_DIM, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    options = {"projection": draws, "kernel": kernel, "causal": causal, "exact_below": exact_below}
    config = {"num_features": count, "kernel": kernel, "exact_below": exact_below}
    return Variant(options, config, causal=causal)


CASES = [
    Case(
        name="softmax",
        formula=_softmax,
        oracle=lambda q, k, v, keep, is_global: oracles.softmax(q, k, v, keep),
        module_oracle=lambda weights, x, keep, heads, is_global: oracles.softmax_module(weights, x, keep, heads=heads),
        variants={"plain": Variant(quadratic=True)},
        softmax_options={},
    ),
    Case(
        name="longformer",
        formula=_sliding_window,
        oracle=lambda q, k, v, keep, is_global, **options: oracles.sliding_window(
            q, k, v, keep, is_global=is_global, **options
        ),
        module_oracle=lambda weights, x, keep, heads, is_global, **options: oracles.longformer_module(
            weights, x, keep, heads=heads, is_global=is_global, **options
        ),
        variants={
            "window": _longformer(3, 1),
            "wide": _longformer(40, 1),
            "global": _longformer(5, 1, some_tokens),
            "dilated": _longformer(4, 2, some_tokens),
            "dilated by head": _longformer(3, [1, 2, 3, 2], some_tokens),
            "all global": _longformer(2, 1, all_tokens, quadratic=True),
            "causal": _longformer(3, 1, causal=True),
            "causal wide": _longformer(40, 1, causal=True),
            "causal global": _longformer(5, 1, some_tokens, causal=True),
            "causal dilated by head": _longformer(3, [1, 2, 3, 2], some_tokens, causal=True),
        },
        softmax_options={"radius": 100, "dilation": 1},
    ),
    Case(
        name="big_bird",
        formula=_big_bird,
        oracle=lambda q, k, v, keep, is_global, **options: oracles.big_bird(q, k, v, keep, **options),
        module_oracle=lambda weights, x, keep, heads, is_global, **options: oracles.big_bird_module(
            weights, x, keep, heads=heads, **options
        ),
        variants={
            "internal": _blocks(8),
            "one token a block": _blocks(1, count=3),
            "no random blocks": _blocks(7, count=0),
            "extended": _blocks(8, num_global=5, ends=False),
            "both": _blocks(5, num_global=3),
            "window alone": _blocks(8, count=0, ends=False),
        },
        softmax_options=_blocks(40).options,
    ),
    Case(
        name="nystromformer",
        formula=_nystrom,
        oracle=lambda q, k, v, keep, is_global, **options: oracles.nystrom(q, k, v, keep, **options),
        module_oracle=lambda weights, x, keep, heads, is_global, **options: oracles.nystromformer_module(
            weights, x, keep, heads=heads, **options
        ),
        variants={
            "four landmarks": _nystromformer(4),
            "eight": _nystromformer(8),
            "one": _nystromformer(1, kernel=None),
            "more than tokens": _nystromformer(101, kernel=65),
            "few iterations": _nystromformer(4, 2, kernel=1),
            "many iterations": _nystromformer(4, 20, kernel=None, rounding=1e3),
            "inverted exactly": _nystromformer(4, None, rounding=1e4),
            "scaled by example": _nystromformer(8, per_matrix=False),
        },
        softmax_options={"num_landmarks": 100, "pinv_iterations": 6, "scale_per_matrix": True},
        # Approximated: weights may be negative, and rows sum to 1 only as nearly as the inverse has converged.
        probabilities=False,
    ),
    Case(
        name="performer",
        formula=_performer,
        oracle=lambda q, k, v, keep, is_global, **options: oracles.performer(q, k, v, keep, **options),
        module_oracle=_performer_module,
        variants={
            "softmax": _features(20),
            "relu": _features(20, "relu"),
            "few features": _features(3),
            "exact below 64": _features(20, exact_below=64),
            "causal": _features(20, causal=True),
            "causal relu": _features(20, "relu", causal=True),
        },
        softmax_options=None,  # an estimate of it, with any number of features
    ),
    *GRID_CASES,
    *REFORMER_CASES,
]

# Inputs as short as those of the laws would all go one way.
_IN_BLOCKS = {"longformer": None, "big_bird": None, "nystromformer": ("eight", "more than tokens")}


def _with_blocks(case: Case) -> Case:
    """Each variant that is computed densely where it is short, and the same without that."""
    names = _IN_BLOCKS[case.name] or case.variants
    own = {f"{name}, in blocks": replace(case.variants[name], dense=False) for name in names}
    return replace(case, variants={**case.variants, **own})


CASES = [_with_blocks(case) if case.name in _IN_BLOCKS else case for case in CASES]
ROWS = [(case, name) for case in CASES for name in case.variants]
# A graph is never dense.
GRAPH_ROWS = [(case, name) for case, name in ROWS if case.variants[name].dense]
GRAPH_ROW_IDS = [f"{case.name}: {name}" for case, name in GRAPH_ROWS]
ROW_IDS = [f"{case.name}: {name}" for case, name in ROWS]


def qkv(batch: int, length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, length, HEAD_DIM)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)
    )


def paddings(batch: int, length: int) -> dict[str, Tensor | None]:
    """No mask, and masks that pad the last examples on either side."""
    right = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        right[row, max(1, length - row * length // 3) :] = False
    return {"none": None, "right": right, "left": right.flip(1)}
