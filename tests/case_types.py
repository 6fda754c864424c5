"""What a row of the table of mechanisms is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


HEADS, HEAD_DIM = 4, 8


def no_tokens(batch: int, length: int) -> None:
    """No global tokens."""


@dataclass(frozen=True)
class Variant:
    """One setting of a mechanism's options.

    Args:
        options: keyword arguments of the formula and of its oracle.
        config: the same as config fields of the module.
        is_global: `(batch, length)` -> bool `[batch, length]` or None.
        causal: it is the causal form.
        quadratic: its work grows with the square of the length by definition.
        grid: length -> `grid` and `num_global`, where tokens stand in rows and columns: to leave some out makes another
            grid, so laws that do so do not apply.
        dense: short inputs may be computed densely, where the mechanism does that.
        rounding: how many times larger rounding errors may be than elsewhere, on the laws' random numbers: a converged
            inverse of an ill-conditioned matrix multiplies them, which no way of computing it avoids.
    """

    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    is_global: Callable[[int, int], Tensor | None] = no_tokens
    causal: bool = False
    quadratic: bool = False
    grid: Callable[[int], dict[str, Any]] | None = None
    dense: bool = True
    rounding: float = 1.0


@dataclass(frozen=True)
class Case:
    """One mechanism.

    Args:
        name: its row in `ATTENTIONS`.
        formula: `(query, key, value, keep, is_global, dropout_p=0.0, **options)`.
        oracle: `(query, key, value, keep, is_global, **options)`.
        module_oracle: `(weights, states, keep, heads, is_global, **options)`; the weights are parameters and buffers.
        variants: name -> setting.
        softmax_options: options with which it is full softmax attention for inputs up to 100 tokens; None if none are.
        probabilities: the rows of its weights are positive and sum to 1.
    """

    name: str
    formula: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    module_oracle: Callable[..., Tensor]
    variants: dict[str, Variant]
    softmax_options: dict[str, Any] | None
    probabilities: bool = True
