"""Which blocks of keys a block of queries needs for windows and global tokens: flex_attention's tables."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from .inputs import check_key_padding_mask, count_blocks
from .kept import Kept
from .tokens import TokenSlots
from .window import Window, head_dilations, keys_in_windows, make_window


_BLOCK = 128  # of queries and of keys; flex_attention's own default
_ENTRIES = 16  # blocks of global tokens that lists have room for, or so many times more


def window_block_mask(
    key: Tensor,
    key_padding_mask: Tensor | None = None,
    global_tokens: TokenSlots | None = None,
    *,
    radius: int,
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
) -> BlockMask:
    """Which blocks of keys a block of queries needs, and the rule within them.

    Of `key` `[batch, heads, length, head_dim]` only the shape and device count. Lists are made from the numbers of
    blocks and are no longer than a window and the global tokens need: memory and time O(length), and in eager mode no
    more than once for each length where there is neither padding nor a global token. Where gradients are enabled there
    are lists for a backward pass besides, O(length) too, but with global tokens, which all blocks of queries need,
    O((length / 128)^2) numbers an example. On a CPU, where the kernel takes no shorter ones, all lists have room for
    all blocks, and none is kept. What torch draws or unfolds of a mask (`print`, `to_dense`) needs such lists too.

    Raises:
        ValueError: a mask of another shape or dtype, a negative radius, dilations that do not fit the heads.
    """
    batch, heads, length = key.shape[:3]
    check_key_padding_mask(key_padding_mask, batch, length)
    window, dilations = make_window(radius, causal), head_dilations(dilation, heads)
    shape = _Shape(window, dilations, batch, length, key.device, torch.is_grad_enabled())
    if global_tokens is not None and global_tokens.slots == 0:
        global_tokens = None
    if key_padding_mask is None and global_tokens is None and key.device.type != "cpu":
        return _MASKS(key, shape._replace(batch=1))
    return _make(shape, keys_in_windows(key_padding_mask, global_tokens), global_tokens)


class _Shape(NamedTuple):
    """What a mask has besides tensors."""

    window: Window
    dilations: tuple[int, ...]
    batch: int
    length: int
    device: torch.device
    with_gradients: bool

    @property
    def reach(self) -> int:
        """The longest distance of neighbouring keys in a window."""
        return max(self.dilations)


def _make(shape: _Shape, counted: Tensor | None = None, global_tokens: TokenSlots | None = None) -> BlockMask:
    blocks = count_blocks(shape.length, _BLOCK)
    if not torch.compiler.is_compiling():
        blocks = max(1, blocks)
    number = torch.arange(blocks, device=shape.device)
    window, reach = shape.window, shape.reach
    # From a block of queries to one of keys, counted in blocks: the first and last that any window reaches into.
    first, last = -((window.back * reach + _BLOCK - 1) // _BLOCK), (window.ahead * reach + _BLOCK - 1) // _BLOCK
    if not torch.compiler.is_compiling():
        first, last = max(first, 1 - blocks), min(last, blocks - 1)
    step = torch.arange(first, last + 1, device=shape.device)
    nearest, farthest = step * _BLOCK - (_BLOCK - 1), step * _BLOCK + (_BLOCK - 1)  # of any pair of their tokens
    inside = (nearest >= -window.back) & (farthest <= window.ahead) & (reach == 1)
    every = torch.ones(shape.batch, shape.length, dtype=torch.bool, device=shape.device) if counted is None else counted
    full = _by_block(every, blocks).all(dim=2)
    # On a CPU the kernel takes lists only with room for all blocks.
    room = blocks if shape.device.type == "cpu" else None
    ends = (first, None if window.causal else last)

    def near(turn: int) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks as far from each block as `turn` times the steps: `[blocks, steps]`, which exist, which are whole."""
        other = number[:, None] + turn * step
        exists = (other >= 0) & (other < blocks)
        other = other.clamp(0, blocks - 1)
        keys = other if turn == 1 else number[:, None].expand_as(other)
        return other.expand(full.shape[0], -1, -1), exists, exists & inside & full[:, keys]

    keys, exists, whole = near(1)
    partial = [(keys, exists & ~whole)]
    if global_tokens is not None:
        has_global = _by_block(global_tokens.mask, blocks).any(dim=2)
        partial.append(_global_blocks(has_global, global_tokens.slots, number, ends))
    tables = {"kv": _lists(partial, room), "full_kv": _lists([(keys, whole)], room), "q": None, "full_q": None}
    if shape.with_gradients:
        queries, exists, whole = near(-1)
        partial = [(queries, exists & ~whole)]
        if global_tokens is not None:
            partial.append(_blocks_for_globals(has_global, number, ends))
        tables |= {"q": _lists(partial, room), "full_q": _lists([(queries, whole)], room)}
    arguments = {}
    for name, table in tables.items():
        arguments[f"{name}_num_blocks"], arguments[f"{name}_indices"] = table or (None, None)
    rule = _rule(shape, counted, global_tokens)
    lengths = (shape.length, shape.length)
    return BlockMask(seq_lengths=lengths, **arguments, BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=rule)


def _rule(shape: _Shape, counted: Tensor | None, global_tokens: TokenSlots | None) -> Callable[..., Tensor]:
    """Which pairs of tokens count; only what there is is asked for each pair.

    But on a CPU, where each length is compiled anew and torch compiles eight graphs at most, there is one rule for all.
    """
    window, causal, on_cpu = shape.window, shape.window.causal, shape.device.type == "cpu"
    # Tensors, because the kernel would be compiled again for each new number.
    steps = torch.tensor(shape.dilations, device="cpu").to(shape.device, non_blocking=True)
    before, after = -window.back * steps, window.ahead * steps
    back, ahead = before[0], after[0]
    is_global = None if global_tokens is None else global_tokens.mask
    if on_cpu:
        every = torch.ones(shape.batch, shape.length, dtype=torch.bool, device=shape.device)
        counted = every if counted is None else counted
        is_global = ~every if is_global is None else is_global

    def in_window(h: Tensor, distance: Tensor) -> Tensor:
        return (distance >= back) & (distance <= ahead)

    def in_dilated_window(h: Tensor, distance: Tensor) -> Tensor:
        return (distance >= before[h]) & (distance <= after[h]) & (distance % steps[h] == 0)

    near = in_window if shape.reach == 1 and not on_cpu else in_dilated_window

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        pair = near(h, k - q)
        if counted is not None:
            pair = pair & counted[b, k]
        if is_global is not None:
            pair = pair | is_global[b, k]
            pair = pair & (k <= q) if causal else pair
        return pair

    return allowed


def _global_blocks(
    has_global: Tensor, slots: int, number: Tensor, reach: tuple[int, int | None]
) -> tuple[Tensor, Tensor]:
    """Blocks of global tokens beyond the windows' reach, for each block of queries: `[batch, blocks, entries]`.

    `has_global` `[batch, blocks]` are those with a global token, of which there are at most `slots`; `reach` as in
    `_is_beyond`.
    """
    # In steps, so that a kernel sees few lengths of lists.
    entries = -(-slots // _ENTRIES) * _ENTRIES
    # Those with a global token first; there are no more of them than slots.
    found = has_global.int().argsort(dim=1, descending=True, stable=True)[:, :entries]
    there = has_global.gather(1, found)[:, None]
    beyond = _is_beyond(found[:, None] - number[:, None], reach)
    return found[:, None].expand(-1, number.shape[0], -1), there & beyond


def _blocks_for_globals(has_global: Tensor, number: Tensor, reach: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
    """The same turned round: all blocks of queries, and which of them each block of keys needs besides its own."""
    beyond = _is_beyond(number[:, None] - number, reach)
    return number.expand(has_global.shape[0], number.shape[0], -1), has_global[:, :, None] & beyond


def _is_beyond(distance: Tensor, reach: tuple[int, int | None]) -> Tensor:
    """Which blocks of keys are farther away than the windows reach, before and, where that is not None, after."""
    before = distance < reach[0]
    return before if reach[1] is None else before | (distance > reach[1])


def _by_block(mask: Tensor, blocks: int) -> Tensor:
    """`[batch, length]` -> `[batch, blocks, _BLOCK]`, False after the end."""
    return F.pad(mask, (0, blocks * _BLOCK - mask.shape[1])).unflatten(1, (blocks, _BLOCK))


def _lists(found: list[tuple[Tensor, Tensor]], room: int | None) -> tuple[Tensor, Tensor]:
    """How many blocks of each list count, and the blocks, those first: flex_attention's form.

    Lists are `[batch, blocks, entries]`, each with which entries count; no block does so twice in one list. With `room`
    lists have so many entries, which must be enough for the ones that count.
    """
    batch = max(x.shape[0] for pair in found for x in pair if x.dim() == 3)
    entry = torch.cat([x.expand(batch, -1, -1) for x, _ in found], dim=2)
    counts = torch.cat([x.expand(batch, -1, -1) for _, x in found], dim=2)
    order = counts.int().argsort(dim=2, descending=True, stable=True)
    listed = entry.gather(2, order).to(torch.int32)
    if room is not None:
        listed = F.pad(listed, (0, max(0, room - listed.shape[2])))[..., :room].contiguous()
    return counts.sum(dim=2, dtype=torch.int32)[:, None], listed[:, None]


_MASKS = Kept(_make)
