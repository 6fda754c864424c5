"""Attention to neighbours on a grid on a CPU, with a backward pass that computes probabilities again.

The same function as the gathered form in `grid_window.py`, in eager mode. Tiles of queries attend the keys around them,
which are copied for a few tiles at a time into memory that is used again; no probabilities are kept. Queries of tiles
that reach beyond the grid are computed like others and dropped.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay, first_derivatives
from .inputs import masked_bias
from .neighborhood import Neighborhood


def cpu_grid_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    key_padding_mask: Tensor | None,
    shape: Neighborhood,
    *,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """See `grid_window_attention`; `rows` `[batch, heads, num_global, head_dim]` are those of the global tokens.

    Rows of padding are unspecified.
    """
    options = _Options(shape, scale, draw_replay(dropout_p))
    return _GridWindow.apply(query, key, value, rows, key_padding_mask, options)


class _Options(NamedTuple):
    """What a call has besides tensors."""

    shape: Neighborhood
    scale: float
    dropout: DropoutReplay


class _Tiles:
    """The tiles of one grid, turned so that it has no more columns than rows: work goes by rows of tiles.

    "Planes" below are the tokens of some heads on their grid, filled up to whole tiles, and with zeros around them
    where tiles look beyond the edge.
    """

    def __init__(self, shape: Neighborhood, dtype: torch.dtype) -> None:
        self.dtype, self.scratch = dtype, Scratch()
        self.slots, self.turned = shape.num_global, shape.grid[1] > shape.grid[0]
        self.given_grid = shape.grid
        if self.turned:
            shape = Neighborhood(shape.grid[::-1], shape.radius[::-1], shape.num_global)
        self.grid, self.tile, self.reach = shape.grid, shape.tile(), shape.reach()
        self.counts = [-(-size // step) for size, step in zip(self.grid, self.tile, strict=True)]
        self.span = [step + 2 * radius for step, radius in zip(self.tile, self.reach, strict=True)]
        self.outer = [
            count * step + 2 * radius for count, step, radius in zip(self.counts, self.tile, self.reach, strict=True)
        ]
        self.size, self.keys = self.tile[0] * self.tile[1], self.span[0] * self.span[1]
        # Both masks may meet in one place, and must not add up to -inf.
        self.band = masked_bias(shape.band(self.tile, self.reach, torch.device("cpu")), dtype) / 4

    def take(self, name: str, *shape: int) -> Tensor:
        """Scratch memory."""
        return self.scratch.take(name, shape, self.dtype)

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens `[heads, slots + patches, d]` without the global ones: a view `[heads, rows, columns, d]`."""
        patches = tokens[:, self.slots :].unflatten(1, self.given_grid)
        return patches.transpose(1, 2) if self.turned else patches

    def inner(self, plane: Tensor) -> Tensor:
        """The grid of a plane: a view `[heads, rows, columns, d]`."""
        (top, left), (rows, columns) = self.reach, self.grid
        return plane[:, top : top + rows, left : left + columns]

    def zeros(self, name: str, heads: int, width: int) -> Tensor:
        """A plane of zeros in scratch memory."""
        return self.take(name, heads, *self.outer, width).zero_()

    def plane(self, name: str, tokens: Tensor) -> Tensor:
        """The plane of `[heads, slots + patches, d]`, in scratch memory."""
        plane = self.zeros(name, tokens.shape[0], tokens.shape[2])
        self.inner(plane).copy_(self.on_grid(tokens))
        return plane

    def views(self, plane: Tensor, part: slice, near: bool) -> Tensor:
        """Some rows of tiles: views `[heads, tile rows, tile columns, m, n, d]`.

        Overlapping ones of all `near` a tile, or those of its own places.
        """
        heads, height, breadth, width = plane.shape
        down = breadth * width
        start = part.start * self.tile[0] * down
        if not near:
            start += self.reach[0] * down + self.reach[1] * width
        return plane.as_strided(
            (heads, part.stop - part.start, self.counts[1], *(self.span if near else self.tile), width),
            (height * down, self.tile[0] * down, self.tile[1] * width, down, width, 1),
            plane.storage_offset() + start,
        )

    def own(self, name: str, plane: Tensor, part: slice) -> Tensor:
        """The places of some rows of tiles, `[heads * tiles, size, d]`."""
        views = self.views(plane, part, near=False)
        return self.take(name, *views.shape).copy_(views).view(-1, self.size, plane.shape[-1])

    def write_own(self, plane: Tensor, part: slice, found: Tensor) -> None:
        """Put `[heads * tiles, size, d]` into the places of some rows of tiles."""
        views = self.views(plane, part, near=False)
        views.copy_(found.view(views.shape))

    def near(self, name: str, plane: Tensor, part: slice, global_rows: Tensor) -> Tensor:
        """What some rows of tiles attend: all near them, then the global rows; `[heads * tiles, keys + slots, d]`."""
        views = self.views(plane, part, near=True)
        *outer, _, _, width = views.shape
        keys = self.take(name, *outer, self.keys + self.slots, width)
        keys[:, :, :, : self.keys].unflatten(3, self.span).copy_(views)
        if self.slots > 0:
            keys[:, :, :, self.keys :] = global_rows[:, None, None]
        return keys.flatten(0, 2)

    def add_near_(self, plane: Tensor, global_rows: Tensor, part: slice, found: Tensor) -> None:
        """Add `[heads * tiles, keys + slots, d]` to the plane and the global rows that they are copies of."""
        views = self.views(plane, part, near=True)
        found = found.view(*views.shape[:3], -1, views.shape[-1])
        if self.slots > 0:
            global_rows += found[:, :, :, self.keys :].sum(dim=(1, 2))
        found = found[:, :, :, : self.keys].unflatten(3, self.span)
        # Pieces of at most one tile do not overlap each other.
        for top in range(0, self.span[0], self.tile[0]):
            for left in range(0, self.span[1], self.tile[1]):
                piece = (..., slice(top, top + self.tile[0]), slice(left, left + self.tile[1]), slice(None))
                views[piece].add_(found[piece])

    def masks(self, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Additive masks of one example, whose tokens `keep` `[slots + patches]` count, None for all.

        Of what is near each tile, `[tile rows, tile columns, 1, keys]`, and of the global keys, `[slots]` or None.
        """
        plane = torch.zeros(1, *self.outer, 1, dtype=torch.bool)
        self.inner(plane)[:] = True if keep is None else self.on_grid(keep[None, :, None])
        near = self.views(plane, slice(0, self.counts[0]), near=True)[0].flatten(2)[:, :, None]
        of_global = None if keep is None else masked_bias(keep[: self.slots], self.dtype)
        return masked_bias(near, self.dtype) / 4, of_global

    def probs(
        self, part: slice, query: Tensor, keys: Tensor, masks: tuple[Tensor, Tensor | None], scale: float
    ) -> Tensor:
        """Probabilities `[heads * tiles, size, keys + slots]` of some rows of tiles."""
        near, of_global = masks
        scores = self.take("scores", query.shape[0], self.size, self.keys + self.slots)
        by_tile = scores.view(-1, part.stop - part.start, self.counts[1], self.size, self.keys + self.slots)
        # The masks stand where the product is added.
        here = by_tile[..., : self.keys]
        torch.add(near[part].expand(here.shape[0], -1, -1, self.size, -1), self.band, out=here)
        if self.slots > 0:
            by_tile[..., self.keys :] = 0.0 if of_global is None else of_global
        scores.baddbmm_(query, keys.transpose(1, 2), alpha=scale)
        return torch.ops.aten._softmax.out(scores, -1, False, out=self.take("probs", *scores.shape))


class _Part(NamedTuple):
    """Some heads of one example.

    Args:
        where: example and heads, an index.
        masks: those of the example.
        rows: rows of tiles at a time.
    """

    where: tuple[int, slice]
    masks: tuple[Tensor, Tensor | None]
    rows: list[slice]


def _parts(tiles: _Tiles, batch: int, heads: int, keep: Tensor | None, chunk_bytes: int) -> Iterator[_Part]:
    """As many heads of an example as a chunk holds, at least one of them, and one row of tiles."""
    row_bytes = tiles.counts[1] * tiles.size * (tiles.keys + tiles.slots) * tiles.dtype.itemsize
    at_once = max(1, chunk_bytes // row_bytes)
    head_step = max(1, min(heads, at_once // tiles.counts[0]))
    starts = range(0, tiles.counts[0], at_once)
    rows = [slice(start, min(start + at_once, tiles.counts[0])) for start in starts]
    masks = None
    for example in range(batch):
        if masks is None or keep is not None:
            masks = tiles.masks(None if keep is None else keep[example])
        for head in range(0, heads, head_step):
            yield _Part((example, slice(head, min(head + head_step, heads))), masks, rows)


class _GridWindow(torch.autograd.Function):
    """Neighbours and global keys in one softmax, with dropout of the probabilities; the global rows as given."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, keep: Tensor | None, options: _Options
    ) -> Tensor:
        batch, heads, length, width = query.shape
        tiles = _Tiles(options.shape, torch.promote_types(query.dtype, torch.float32))
        chunk_bytes = CHUNK_BYTES * torch.get_num_threads()
        # In the order in which heads are merged.
        result = query.new_empty(batch, length, heads, width).transpose(1, 2)
        result[:, :, : tiles.slots] = rows
        generator = options.dropout.generator()
        with torch.autocast("cpu", enabled=False):
            for example_heads, masks, parts in _parts(tiles, batch, heads, keep, chunk_bytes):
                planes = [
                    tiles.plane(name, x[example_heads]) for name, x in zip("qkv", (query, key, value), strict=True)
                ]
                of_global = [x[example_heads][:, : tiles.slots] for x in (key, value)]
                for part in parts:
                    keys = tiles.near("keys", planes[1], part, of_global[0])
                    probs = tiles.probs(part, tiles.own("own", planes[0], part), keys, masks, options.scale)
                    if options.dropout.p > 0.0:
                        probs.mul_(options.dropout.kept(probs, tiles.scratch, generator))
                    values = tiles.near("keys", planes[2], part, of_global[1])
                    mixed = torch.bmm(probs, values, out=tiles.take("own", *probs.shape[:2], width))
                    # The queries there have done their part.
                    tiles.write_own(planes[0], part, mixed.div_(options.dropout.keep_share))
                tiles.on_grid(result[example_heads]).copy_(tiles.inner(planes[0]))
        ctx.save_for_backward(query, key, value, keep)
        ctx.options = (options, chunk_bytes)
        return result

    @staticmethod
    @first_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep = ctx.saved_tensors
        options, chunk_bytes = ctx.options
        batch, heads = query.shape[:2]
        tiles = _Tiles(options.shape, torch.promote_types(query.dtype, torch.float32))
        grads = [torch.empty_like(x) for x in (query, key, value)]
        # What the global rows have to do with queries is not done here.
        grads[0][:, :, : tiles.slots] = 0.0
        generator = options.dropout.generator()
        with torch.autocast("cpu", enabled=False):
            for part in _parts(tiles, batch, heads, keep, chunk_bytes):
                given = [x[part.where] for x in (query, key, value, grad)]
                found = [x[part.where] for x in grads]
                _write_gradients(tiles, part, given, found, options, generator)
        return (*grads, grad[:, :, : tiles.slots], None, None)


def _write_gradients(
    tiles: _Tiles,
    heads: _Part,
    given: list[Tensor],
    found: list[Tensor],
    options: _Options,
    generator: torch.Generator,
) -> None:
    """Write into `found` the gradients of query, key and value of some heads; `given` are these and the result's."""
    query, key, value, above = (tiles.plane(name, x) for name, x in zip("qkva", given, strict=True))
    count, width = given[0].shape[0], given[0].shape[2]
    key_grad, value_grad = (tiles.zeros(name, count, width) for name in ("key_grad", "value_grad"))
    global_key, global_value = (x[:, : tiles.slots] for x in given[1:3])
    global_grads = [torch.zeros(count, tiles.slots, width, dtype=tiles.dtype) for _ in range(2)]
    for part in heads.rows:
        queries, result_grad = tiles.own("own", query, part), tiles.own("above", above, part)
        result_grad.div_(options.dropout.keep_share)
        keys = tiles.near("keys", key, part, global_key)
        probs = tiles.probs(part, queries, keys, heads.masks, options.scale)
        values = tiles.near("values", value, part, global_value)
        probs_grad = torch.bmm(result_grad, values.transpose(1, 2), out=tiles.take("probs_grad", *probs.shape))
        used = probs
        if options.dropout.p > 0.0:
            kept = options.dropout.kept(probs, tiles.scratch, generator)
            probs_grad.mul_(kept)
            used = kept.mul_(probs)
        torch.bmm(used.transpose(1, 2), result_grad, out=values)
        tiles.add_near_(value_grad, global_grads[1], part, values)
        scores_grad = tiles.take("scores", *probs.shape)
        torch.ops.aten._softmax_backward_data.out(probs_grad, probs, -1, tiles.dtype, grad_input=scores_grad)
        query_grad = torch.bmm(scores_grad, keys, out=result_grad).mul_(options.scale)
        tiles.write_own(query, part, query_grad)
        torch.bmm(scores_grad.transpose(1, 2), queries.mul_(options.scale), out=values)
        tiles.add_near_(key_grad, global_grads[0], part, values)
    for target, plane in zip(found, (query, key_grad, value_grad), strict=True):
        tiles.on_grid(target).copy_(tiles.inner(plane))
    for target, rows in zip(found[1:], global_grads, strict=True):
        target[:, : tiles.slots] = rows
