"""Texts in blocks: where each token of an example stands once padding is left out, and global tokens stand in front."""

from typing import NamedTuple

import torch
from torch import Tensor

from .tokens import TokenSlots


class BlockLayout(NamedTuple):
    """Tokens of each example in blocks of `size` places: first the global tokens' blocks, then those of the text.

    A place is a number from 0 on; the global tokens fill `global_blocks * size` places, empty ones behind them, and the
    text's tokens follow in order, whatever padding stands between or before them.

    Args:
        size: places of a block.
        global_blocks: blocks of global tokens.
        source: `[batch or 1, places]` int64, the token at each place; 0 where there is none.
        used: `[batch or 1, places]` bool, whether there is one.
        place: `[batch or 1, length]` int64, the place of each token; 0 for padding.
        text_blocks: `[batch or 1]` int64, blocks of the text that hold a token.
        is_plain: token and place are the same number, up to the end of the text.
    """

    size: int
    global_blocks: int
    source: Tensor
    used: Tensor
    place: Tensor
    text_blocks: Tensor
    is_plain: bool

    @property
    def rows(self) -> int:
        """Blocks of text, as many as the longest example may have."""
        return self.source.shape[1] // self.size - self.global_blocks

    def global_rows(self, num_global: int, ends: bool) -> TokenSlots:
        """The tokens that attend everything: global ones, and with `ends` those of the first and last text block."""
        device, length = self.source.device, self.place.shape[1]
        places = torch.arange(num_global, device=device)[None].expand(self.source.shape[0], -1)
        is_row = self.place < num_global
        if ends:
            text = self.global_blocks * self.size
            offset = torch.arange(self.size, device=device)[None]
            last = text + (self.text_blocks[:, None] - 1).clamp(min=0) * self.size
            # Where the first block is also the last one, its tokens stand here once.
            once = torch.where(self.text_blocks[:, None] > 1, last + offset, self.source.shape[1])
            places = torch.cat([places, (text + offset).expand(places.shape[0], -1), once], dim=1)
            is_row = is_row | ((self.place >= text) & (self.place < text + self.size)) | (self.place >= last)
        exists = places < self.source.shape[1]
        places = torch.where(exists, places, 0)
        used = exists & self.used.gather(1, places)
        # Padding has place 0 as well.
        own = self.source.gather(1, self.place) == torch.arange(length, device=device)[None]
        is_row = is_row & own & self.used.gather(1, self.place)
        return TokenSlots(is_row, torch.where(used, self.source.gather(1, places), 0), used)


def count_text_blocks(
    key_padding_mask: Tensor | None, length: int, size: int, num_global: int, device: torch.device
) -> Tensor:
    """Blocks of text of each example, those of the first `num_global` tokens apart: int64 `[batch]`, or `[1]` for all.

    Arguments as in `block_layout`.
    """
    if key_padding_mask is None:
        tokens = torch.full((1,), length, device=device)
    else:
        tokens = key_padding_mask.sum(dim=1)
    return ((tokens - num_global).clamp(min=0) + size - 1) // size


def block_layout(
    key_padding_mask: Tensor | None, length: int, size: int, rows: int, num_global: int, device: torch.device
) -> BlockLayout:
    """The layout of inputs of `length` tokens, of which the first `num_global` of each example are global.

    `key_padding_mask` is `[batch, length]` bool or None, `rows` the blocks of text to make room for.
    """
    global_blocks = (num_global + size - 1) // size
    places = (global_blocks + rows) * size
    gap = global_blocks * size - num_global
    token = torch.arange(length, device=device)[None]
    if key_padding_mask is None:
        rank, valid = token, torch.ones_like(token, dtype=torch.bool)
    else:
        valid = key_padding_mask
        rank = valid.long().cumsum(dim=1) - 1
    place = torch.where(rank < num_global, rank, rank + gap)
    batch = place.shape[0]
    # One place more than there is takes the padding; it is cut off again.
    target = torch.where(valid, place, places)
    source = torch.zeros(batch, places + 1, dtype=torch.long, device=device)
    source = source.scatter(1, target, token.expand(batch, -1))[:, :places]
    used = torch.zeros(batch, places + 1, dtype=torch.bool, device=device)
    used = used.scatter(1, target, valid)[:, :places]
    text_blocks = count_text_blocks(key_padding_mask, length, size, num_global, device)
    is_plain = key_padding_mask is None and num_global == 0
    return BlockLayout(size, global_blocks, source, used, torch.where(valid, place, 0), text_blocks, is_plain)
