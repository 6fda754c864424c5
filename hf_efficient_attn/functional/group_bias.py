"""An additive mask that goes by groups of tokens: small, where that of all pairs of tokens is not."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu import Scratch


class GroupBias(NamedTuple):
    """What is added to the score of token i for token j: `table[group of i, group of j]`.

    Args:
        table: `[batch or 1, heads, groups, groups]`.
        group: `[batch or 1, length]` int64, the group of each token.
    """

    table: Tensor
    group: Tensor

    def of_pairs(self) -> Tensor:
        """That of all pairs of tokens, `[batch or 1, heads, length, length]`."""
        batch = max(self.table.shape[0], self.group.shape[0])
        table, group = self.table.expand(batch, -1, -1, -1), self.group.expand(batch, -1)
        heads, groups, length = table.shape[1], table.shape[2], group.shape[1]
        rows = table.gather(2, group[:, None, :, None].expand(-1, heads, -1, groups))
        return rows.gather(3, group[:, None, None, :].expand(-1, heads, length, -1))

    def part(self, where: tuple[slice, slice], count: int, scratch: Scratch) -> Tensor | None:
        """That of `count` examples and some heads, on a CPU: `[examples, heads, length, length]` in `scratch`.

        None where nothing is added to any score.
        """
        table = (self.table if self.table.shape[0] == 1 else self.table[where[0]])[:, where[1]]
        if not bool(table.any()):
            return None
        group = (self.group if self.group.shape[0] == 1 else self.group[where[0]]).expand(count, -1)
        length = group.shape[1]
        pairs = scratch.take("pairs", (count, table.shape[1], length, length), table.dtype)
        for example, target in enumerate(pairs):
            own = table[min(example, table.shape[0] - 1)].index_select(2, group[example])
            torch.index_select(own, 1, group[example], out=target)
        return pairs
