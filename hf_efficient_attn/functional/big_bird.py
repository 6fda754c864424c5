"""BigBird: window, global and random blocks, with global blocks inside the text or global tokens before it."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_cpu import cpu_block_attention
from .block_layout import BlockLayout, block_layout
from .dense import biased_attention, dense_attention, padded_attention
from .dense_execution import dense_is_cheaper, dense_is_on
from .fused import fused
from .group_bias import GroupBias
from .group_cpu import cpu_group_attention
from .inputs import check_prepared, check_qkv, masked_bias, zero_padding
from .tokens import TokenSlots, gather_tokens, replace_tokens


class BigBirdPlan(NamedTuple):
    """What blocks attend, for one layer or several.

    Args:
        random_blocks: `[batch or 1, heads, rows, count]`.
        layout: where each token is.
        lists: `[batch or 1, heads, rows, entries]`, all blocks that a block attends; -1 for none.
    """

    random_blocks: Tensor
    layout: BlockLayout
    lists: Tensor

    def by_layer(self, layers: int) -> list["BigBirdPlan"]:
        """The plan of each of `layers` layers, whose heads stand behind one another."""
        tables = (x.chunk(layers, dim=1) for x in (self.random_blocks, self.lists))
        # Contiguous, because torch.export would ask of the length which of two strides is the smaller.
        return [BigBirdPlan(x.contiguous(), self.layout, y.contiguous()) for x, y in zip(*tables, strict=True)]


def plan_big_bird(
    key_padding_mask: Tensor | None,
    length: int,
    *,
    block_size: int,
    random_blocks: Tensor,
    num_global: int = 0,
    global_ends: bool = True,
) -> BigBirdPlan:
    """The plan of inputs of `length` tokens; arguments as in `big_bird_attention`, heads of several layers too."""
    rows, device = random_blocks.shape[2], random_blocks.device
    layout = block_layout(key_padding_mask, length, block_size, rows, num_global, device)
    return BigBirdPlan(random_blocks, layout, _key_blocks(layout, random_blocks, global_ends))


def big_bird_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    block_size: int,
    random_blocks: Tensor,
    num_global: int = 0,
    global_ends: bool = True,
    plan: BigBirdPlan | None = None,
) -> Tensor:
    """Softmax attention over blocks: a query's own block, its two neighbours, global and random ones, in one softmax.

    Blocks hold `block_size` tokens of an example in their order, padding left out; the last one may hold fewer. With
    `global_ends` (internal form, ITC) the first and the last block attend everything and everything attends them. The
    first `num_global` tokens of each example (extended form, ETC) do so too; they are in no block. A block that
    `random_blocks` names counts as often as it is named, and besides window and global blocks.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the probabilities.
        block_size: tokens of a block, 1 or more.
        random_blocks: int64 `[batch or 1, heads, rows, count]`, the blocks that each block attends besides; -1 for none
            (`pick_random_blocks`). Rows of blocks that attend everything, or do not exist, do not count.
        num_global: global tokens at the start of each example, 0 or more.
        global_ends: the first and the last block are global.
        plan: what `plan_big_bird` gives for all this, to prepare several layers at once.

    Returns:
        `[batch, heads, length, head_dim]`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, a block size below 1, fewer rows than the text has blocks, a plan whose
            shapes are those of other arguments.

    Zaheer et al. 2020, arXiv 2007.14062. Time O(length * (block_size * (5 + count) + num_global)), memory the same
    or, on a CPU, O(length); inputs that the blocks cover for the most part are computed as one matrix with a mask
    (`dense_execution`). The paper's released plan draws nearly all random blocks from the first 1,024 tokens and
    may name a block twice; `pick_random_blocks` draws from the whole text and never doubles.
    """
    check_qkv(query, key, value, key_padding_mask)
    _check_pattern(query, block_size, random_blocks, num_global)
    _check_plan(plan, query, key_padding_mask, block_size, random_blocks, num_global, global_ends)
    rows, count = random_blocks.shape[2:]
    if dense_is_on() and count == 0 and rows <= blocks_in_reach(global_ends):
        return padded_attention(query, key, value, key_padding_mask, scale=scale, dropout_p=dropout_p)
    if plan is None:
        shape = {"block_size": block_size, "num_global": num_global, "global_ends": global_ends}
        plan = plan_big_bird(key_padding_mask, query.shape[2], random_blocks=random_blocks, **shape)
    layout, lists = plan.layout, plan.lists
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    options = {"scale": query.shape[-1] ** -0.5 if scale is None else scale, "dropout_p": dropout_p}
    listed = _fused(query, key, value, layout, lists, **options)
    on_cpu = listed is None and query.device.type == "cpu" and dropout_p < 1.0 and not torch.compiler.is_compiling()
    if listed is None and dense_is_cheaper(query.shape[2], lists.shape[3] * block_size, dropout_p):
        dtype = torch.promote_types(query.dtype, torch.float32)
        bias = _group_bias(layout, lists, key_padding_mask, global_ends, dtype)
        if on_cpu:
            mixed = cpu_group_attention(query, key, value, bias, **options)
        else:
            mixed = biased_attention(query, key, value, bias.of_pairs().to(query.dtype), **options)
        return zero_padding(mixed, key_padding_mask)
    tokens = layout.global_rows(num_global, global_ends)
    if on_cpu:
        mixed = cpu_block_attention(query, key, value, layout, lists, tokens, **options)
        return zero_padding(mixed, key_padding_mask)
    mixed = _gathered(query, key, value, layout, lists, **options) if listed is None else listed
    tokens = TokenSlots(*(x.expand(query.shape[0], -1) for x in tokens))
    rows = _global_rows(query, key, value, key_padding_mask, tokens, **options)
    return zero_padding(replace_tokens(mixed, rows, tokens), key_padding_mask)


def big_bird_counts(
    query: Tensor,
    key_padding_mask: Tensor | None,
    *,
    block_size: int,
    random_blocks: Tensor,
    num_global: int = 0,
    global_ends: bool = True,
    plan: BigBirdPlan | None = None,
) -> Tensor:
    """How often `big_bird_attention` counts a key for a query: int64 `[batch or 1, heads, length, length]`.

    Of `query` `[batch, heads, length, head_dim]` only the shape and device count. Errors as there. Memory
    O(heads * length^2).
    """
    _check_pattern(query, block_size, random_blocks, num_global)
    _check_plan(plan, query, key_padding_mask, block_size, random_blocks, num_global, global_ends)
    if plan is None:
        shape = {"block_size": block_size, "num_global": num_global, "global_ends": global_ends}
        plan = plan_big_bird(key_padding_mask, query.shape[2], random_blocks=random_blocks, **shape)
    layout, lists = plan.layout, plan.lists
    blocks = layout.global_blocks + layout.rows
    counts = _block_counts(lists, blocks)
    block = layout.place // block_size
    batch = max(block.shape[0], counts.shape[0])
    block, counts = block.expand(batch, -1), counts.expand(batch, -1, -1, -1)
    row = (block - layout.global_blocks).clamp(min=0)[:, None, :, None]
    by_query = counts.gather(2, row.expand(-1, counts.shape[1], -1, blocks))
    pairs = by_query.gather(3, block[:, None, None, :].expand(-1, counts.shape[1], block.shape[1], -1))
    pairs = torch.where(layout.global_rows(num_global, global_ends).mask[:, None, :, None], 1, pairs)
    if key_padding_mask is not None:
        pairs = pairs * (key_padding_mask[:, None, None, :] & key_padding_mask[:, None, :, None])
    return pairs


def _block_counts(lists: Tensor, blocks: int) -> Tensor:
    """How often each text block names each of `blocks` blocks: int64 `[batch or 1, heads, rows, blocks]`."""
    # One block more than there is takes the empty entries; it is cut off again.
    counts = torch.zeros(*lists.shape[:3], blocks + 1, dtype=torch.long, device=lists.device)
    entries = torch.where(lists >= 0, lists, blocks)
    return counts.scatter_add(3, entries, torch.ones_like(entries))[..., :blocks]


def _group_bias(
    layout: BlockLayout, lists: Tensor, key_padding_mask: Tensor | None, global_ends: bool, dtype: torch.dtype
) -> GroupBias:
    """The pattern as a bias: the logarithm of how often a block counts for another one."""
    blocks, front = layout.global_blocks + layout.rows, layout.global_blocks
    counts = F.pad(_block_counts(lists, blocks), (0, 0, front, 0))
    # Global blocks attend everything.
    number = torch.arange(blocks, device=lists.device)[None]
    attends_all = number < front
    if global_ends:
        attends_all = attends_all | (number == front) | (number == front + layout.text_blocks[:, None] - 1)
    counts = torch.where(attends_all[:, None, :, None], 1, counts)
    table = masked_bias(counts > 0, dtype) + counts.clamp(min=1).to(dtype).log()
    group = layout.place // layout.size
    if key_padding_mask is not None:
        # Padding is a group of its own, which nothing attends.
        table = F.pad(F.pad(table, (0, 0, 0, 1)), (0, 1), value=torch.finfo(dtype).min)
        group = torch.where(key_padding_mask, group, blocks)
    return GroupBias(table, group)


def _check_pattern(query: Tensor, block_size: int, random_blocks: Tensor, num_global: int) -> None:
    batch, heads, length, _ = query.shape
    if block_size < 1:
        raise ValueError(f"block_size = {block_size}: a block has 1 token or more.")
    if num_global < 0:
        raise ValueError(f"num_global = {num_global}: the number of global tokens must be 0 or more.")
    if random_blocks.dim() != 4 or random_blocks.shape[1] != heads or random_blocks.shape[0] not in (1, batch):
        raise ValueError(
            f"random_blocks must be [batch or 1, heads, rows, count] with {heads} heads, got shape "
            f"{list(random_blocks.shape)}."
        )
    rows = random_blocks.shape[2]
    if not torch.compiler.is_compiling() and rows * block_size < length - num_global:
        raise ValueError(
            f"random_blocks has {rows} rows, but {length - num_global} tokens in blocks of {block_size} need "
            f"{-(-(length - num_global) // block_size)}; fill up with rows of -1."
        )


def _check_plan(
    plan: BigBirdPlan | None,
    query: Tensor,
    key_padding_mask: Tensor | None,
    block_size: int,
    random_blocks: Tensor,
    num_global: int,
    global_ends: bool,
) -> None:
    """Raises `ValueError` for a plan of other arguments, as far as shapes tell; in a graph they are not known."""
    if plan is None or torch.compiler.is_compiling():
        return
    layout, is_padded = plan.layout, key_padding_mask is not None
    others = layout.global_blocks + plan.random_blocks.shape[3]
    facts = (
        ("length", layout.place.shape[1], query.shape[2]),
        ("block_size", layout.size, block_size),
        ("blocks of global tokens", layout.global_blocks, -(-num_global // block_size)),
        ("padding", not layout.is_plain, is_padded or num_global > 0),
        ("examples with padding of their own", layout.place.shape[0], query.shape[0] if is_padded else 1),
        ("shape of random_blocks", list(plan.random_blocks.shape), list(random_blocks.shape)),
        # A block's own and its two neighbours, and with `global_ends` the first and the last one.
        ("global_ends", plan.lists.shape[3] - others > 3, global_ends),
    )
    check_prepared(
        "plan was",
        facts,
        "a plan is for inputs of one length, padding and pattern. Give what plan_big_bird makes of this call's "
        "arguments (for several layers at once: one of its by_layer), or no plan.",
    )


def blocks_in_reach(global_ends: bool) -> int:
    """In a text of so many blocks each attends all, or is attended by all, without random ones."""
    return 4 if global_ends else 2


def _key_blocks(layout: BlockLayout, random_blocks: Tensor, global_ends: bool) -> Tensor:
    """The blocks of places that each text block attends: `[batch or 1, heads, rows, entries]`, -1 for none."""
    device, total = random_blocks.device, layout.text_blocks[:, None]
    row = torch.arange(layout.rows, device=device)[None]
    last = total - 1
    entries = [row - 1, row, row + 1]
    if global_ends:
        entries = [torch.where((x > 0) & (x < last), x, -1) for x in entries]
        entries += [torch.zeros_like(row), torch.where(last > 0, last, -1)]
    else:
        entries = [torch.where(x <= last, x, -1) for x in entries]
    batch = max(total.shape[0], random_blocks.shape[0])
    near = torch.stack([x.expand(batch, layout.rows) for x in entries], dim=-1)[:, None]
    lists = torch.cat([near.expand(-1, random_blocks.shape[1], -1, -1), random_blocks.expand(batch, -1, -1, -1)], dim=3)
    lists = torch.where(lists >= 0, lists + layout.global_blocks, -1)
    if layout.global_blocks == 0:
        return lists
    front = torch.arange(layout.global_blocks, device=device).expand(*lists.shape[:3], -1)
    return torch.cat([front, lists], dim=3)


def _global_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    tokens: TokenSlots,
    *,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Rows of the tokens that attend everything: `[batch, heads, slots, head_dim]`."""
    bias = None if key_padding_mask is None else masked_bias(key_padding_mask[:, None, None, :], query.dtype)
    rows = gather_tokens(query, tokens.index)
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, lists: Tensor, **options: float
) -> Tensor | None:
    """The blocks of text in one kernel of a GPU; None where there is none."""
    kernel = fused("blocks", query)
    if kernel is None:
        return None
    tables = (None, None) if layout.is_plain else (layout.source[:, None], layout.used[:, None])
    found = kernel(query, key, value, lists, *tables, size=layout.size, front=layout.global_blocks, **options)
    return None if found is None else found[0]


def _gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    lists: Tensor,
    *,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """All blocks at once, each against a copy of its keys. Gathered by position: no shape depends on divisibility."""
    batch, heads, _, width = query.shape
    size, device = layout.size, query.device
    # Every head of every example is one here, found by number: to fold expanded tensors would fix the order of strides.
    number = torch.arange(batch * heads, device=device)
    lists = lists.expand(batch, -1, -1, -1)[number // heads, number % heads]
    example = (number // heads)[:, None, None]
    source, used = (x.expand(batch, -1) for x in (layout.source, layout.used))
    offset = torch.arange(size, device=device)
    query_place = (torch.arange(layout.rows, device=device) + layout.global_blocks)[:, None] * size + offset
    query_row = source[example, query_place[None]]
    key_place = (lists.clamp(min=0)[..., None] * size + offset).flatten(2)
    key_row = source[example, key_place]
    listed = (lists >= 0)[..., None].expand(*lists.shape, size).flatten(2)
    bias = masked_bias(used[example, key_place] & listed, query.dtype)[:, :, None]

    def gather(tensor: Tensor, rows: Tensor) -> Tensor:
        # Not flattened first: torch.export would ask of the length which of two strides is the smaller.
        return tensor[example, (number % heads)[:, None, None], rows]

    mixed = F.scaled_dot_product_attention(
        gather(query, query_row),
        gather(key, key_row),
        gather(value, key_row),
        attn_mask=bias,
        dropout_p=dropout_p,
        scale=scale,
    )
    table = mixed.reshape(batch, heads, layout.rows * size, width)
    row = (layout.place - layout.global_blocks * size).clamp(min=0).expand(batch, -1)
    return gather_tokens(table, row)


def dense_big_bird_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    **pattern: object,
) -> tuple[Tensor, Tensor]:
    """`big_bird_attention` with the whole matrix in memory; also returns the probabilities before dropout.

    `pattern` is what `big_bird_counts` takes. Time and memory O(length^2).
    """
    counts = big_bird_counts(query, key_padding_mask, **pattern)
    weight = counts.clamp(min=1).to(torch.promote_types(query.dtype, torch.float32)).log()
    query, key, value = (zero_padding(x, key_padding_mask) for x in (query, key, value))
    mixed, weights = dense_attention(query, key, value, counts > 0, bias=weight, scale=scale, dropout_p=dropout_p)
    return zero_padding(mixed, key_padding_mask), weights
