"""Global tokens at the beginning of a text, for the causal form."""

from typing import NamedTuple

from torch import Tensor


class Prefix(NamedTuple):
    """Global tokens at the beginning of each example, in slots; all `[batch, heads, slots, head_dim]` but `valid`.

    Args:
        key, value: with the projections every token has.
        global_key, global_value: with the projections of global tokens.
        valid: `[batch, 1, slots, 1]` bool, True where a slot is in use.
    """

    key: Tensor
    value: Tensor
    global_key: Tensor
    global_value: Tensor
    valid: Tensor
