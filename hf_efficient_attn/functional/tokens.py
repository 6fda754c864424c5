"""Selected tokens (global tokens, ...) as fixed-size slots: found, gathered and written back without Python loops."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSlots(NamedTuple):
    """Some tokens of each example, as a mask and as slots.

    Args:
        mask: `[batch, length]` bool, True at the tokens.
        index: `[batch, slots]` int64, their positions in order, 0 in empty slots.
        valid: `[batch, slots]` bool, True where the slot is in use.
    """

    mask: Tensor
    index: Tensor
    valid: Tensor

    @property
    def slots(self) -> int:
        """Number of slots an example."""
        return self.index.shape[1]


def select_tokens(token_mask: Tensor, slots: int) -> TokenSlots:
    """The True entries of `token_mask` `[batch, length]` in `slots` slots an example.

    Tokens beyond `slots` get no slot: callers make sure there are none.
    """
    batch, length = token_mask.shape
    positions = torch.arange(length, device=token_mask.device).expand(batch, length)
    rank = token_mask.long().cumsum(dim=1) - 1
    # One slot more than asked takes everything that is not selected; it is cut off again.
    slot = torch.where(token_mask, rank, slots).clamp(max=slots)
    index = torch.zeros(batch, slots + 1, dtype=torch.long, device=token_mask.device)
    index = index.scatter(1, slot, positions)[:, :slots]
    valid = torch.arange(slots, device=token_mask.device)[None, :] < token_mask.sum(dim=1, keepdim=True)
    return TokenSlots(token_mask, torch.where(valid, index, 0), valid)


def gather_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[batch, slots]` of `tensor`, along its second-to-last dimension.

    `tensor` is `[batch, length, features]` or `[batch, heads, length, features]`.
    """
    middle = (1,) * (tensor.dim() - 3)
    index = index.view(index.shape[0], *middle, index.shape[1], 1)
    return tensor.gather(-2, index.expand(*tensor.shape[:-2], index.shape[-2], tensor.shape[-1]))


def replace_tokens(tensor: Tensor, rows: Tensor, tokens: TokenSlots, overwrite: bool = False) -> Tensor:
    """`tensor` `[..., length, features]` with the rows of `tokens` replaced by `rows` `[..., slots, features]`.

    With `overwrite`, for which there must be no graph, in the same memory. With no slots at all `rows` still takes part
    in the result, so that what it came from gets a gradient of exactly 0.
    """
    middle = (1,) * (tensor.dim() - 3)
    batch = tensor.shape[0]
    if tokens.slots > 0:
        fill = tensor.masked_fill_ if overwrite else tensor.masked_fill
        tensor = fill(tokens.mask.view(batch, *middle, -1, 1), 0.0)
    rows = torch.where(tokens.valid.view(batch, *middle, -1, 1), rows, 0.0).to(tensor.dtype)
    add = tensor.scatter_add_ if overwrite else tensor.scatter_add
    return add(-2, tokens.index.view(batch, *middle, -1, 1).expand_as(rows), rows)
