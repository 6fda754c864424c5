"""Random blocks as a pure function of seed, layer, head, row and the number of blocks. No generator is touched."""

import torch
from torch import Tensor

from .counter_random import counter_draws


_BITS = 32
_NOWHERE = 2**31  # a block number behind all others


def random_draws(
    seed: int, layer: int, heads: int, rows: int, count: int, device: torch.device, layers: int = 1
) -> Tensor:
    """Uniform numbers in `[0, 2^32)`, int64 `[layers * heads, rows, count]`, as `counter_draws` gives them.

    They are those of `layers` layers from `layer` on, whose heads stand behind one another.
    """
    head, row, number = (torch.arange(size, device=device) for size in (layers * heads, rows, count))
    places = (layer + head // heads, head % heads)
    return counter_draws(seed, *(x[:, None, None] for x in places), row[:, None], number, device=device)


def pick_random_blocks(draws: Tensor, blocks: Tensor, *, ends_are_global: bool) -> Tensor:
    """For each row of blocks some blocks that it does not attend anyway, without replacement.

    A row attends its own block, the one before and the one after it, and with `ends_are_global` the first and the last;
    the rest is equally likely. Where there are fewer than wanted, it is all of them.

    Args:
        draws: int64 `[heads, rows, count]` in `[0, 2^32)`, such as `random_draws` gives.
        blocks: int64 `[batch]`, how many blocks each example has.
        ends_are_global: the first and last block are attended by all, and attend everything.

    Returns:
        int64 `[batch, heads, rows, count]`: block numbers; -1 for none, also in rows that attend everything or do not
        exist.

    Zaheer et al. 2020, arXiv 2007.14062. Time O(batch * heads * rows * count^2), memory O(batch * heads * rows *
    count).
    """
    rows = draws.shape[1]
    total = blocks[:, None]
    row = torch.arange(rows, device=draws.device)[None]
    last = total - 1
    before, after = row - 1, row + 1
    inside = (row > 0) & (row < last) if ends_are_global else row <= last
    # Taken blocks in ascending order, each once; what is not there or doubled is moved behind all others.
    lowest, highest = (0, last) if ends_are_global else (-1, total)
    taken = [
        torch.zeros_like(total) if ends_are_global else torch.full_like(total, _NOWHERE),
        torch.where(before > lowest, before, _NOWHERE),
        row,
        torch.where(after < highest, after, _NOWHERE),
        last if ends_are_global else torch.full_like(total, _NOWHERE),
    ]
    free = total - sum((x < _NOWHERE).long() for x in taken)
    picks: list[Tensor] = []
    found: list[Tensor] = []
    for number in range(draws.shape[2]):
        left = (free - number)[:, None]
        pick = (draws[None, :, :, number] * left.clamp(min=0)) >> _BITS
        # `picks` are ascending: a pick at or behind one of them stands one further.
        for earlier in picks:
            pick = pick + (pick >= earlier)
        block = pick
        for other in taken:
            block = block + (block >= other[:, None])
        found.append(torch.where((left > 0) & inside[:, None], block, -1))
        picks = list(torch.stack([*picks, pick]).sort(dim=0).values.unbind(0))
    shape = (blocks.shape[0], draws.shape[0], rows)
    return torch.stack(found, dim=-1) if found else draws.new_zeros(*shape, 0)
