"""Several documents in one row: attention within each, everything else on whole rows.

What works on each token alone (embeddings, feed-forward, norms, heads) runs on the rows as they are, which is where
packing saves. A mechanism gets each document as a row of its own, so none has to know of packing, and a document's
states are those that it has alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import as_bool_mask


class Group(NamedTuple):
    """Documents of similar length, as a batch for a mechanism.

    Args:
        index: `[documents, longest]`, places of their tokens in the rows put end to end; behind a document's end the
            place of its first token.
        mask: bool `[documents, longest]`, True at their tokens; None if all are of one length.
        rank: `[documents]`, how many documents stand before each one in its row.
        context: what the family's `attention_context` prepared for this batch.
    """

    index: Tensor
    mask: Tensor | None
    rank: Tensor
    context: dict[str, Any]

    def take(self, rows: Tensor) -> Tensor:
        """`[batch, length, ...]` -> `[documents, longest, ...]`; behind a document's end its first token again."""
        return rows.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


class Documents(NamedTuple):
    """The documents of a batch of packed rows.

    Args:
        groups: all documents, in batches of similar length.
        place: `[batch, length]`, where each token stands in the groups put end to end; padding stands behind them.
        first: `[documents]`, places of first tokens in the rows put end to end, in that order.
        position: `[batch, length]`, how many tokens of its document stand before each one; 0 at padding.
        most: documents of the row that has most.
    """

    groups: tuple[Group, ...]
    place: Tensor
    first: Tensor
    position: Tensor
    most: int

    def attend(
        self, attention: Callable[..., Any], states: Tensor, replay: dict[Any, Any] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`attention` within each document of `states` `[batch, length, hidden]`.

        `attention` is a mechanism, called once for each group; with `replay`, it gets a part of it for each.

        Returns:
            `[batch, length, width]`, 0 at padding, and the weights `[batch, heads, length, length]`, 0 between
            documents, where `attention` has some.
        """
        parts, weights = [], []
        for number, group in enumerate(self.groups):
            own = {} if replay is None else {"replay": replay.setdefault(number, {})}
            mixed, found = attention(group.take(states), group.mask, **group.context, **own)
            parts.append(mixed.flatten(0, 1))
            weights.append(found)
        parts.append(parts[0].new_zeros(1, parts[0].shape[1]))
        whole = torch.cat(parts).index_select(0, self.place.flatten()).unflatten(0, self.place.shape)
        return whole, None if weights[0] is None else self._join_weights(weights)

    def _join_weights(self, weights: list[Tensor]) -> Tensor:
        batch, length = self.place.shape
        size = batch * length * length
        # One entry more takes what padding of the groups has.
        whole = weights[0].new_zeros(size + 1, weights[0].shape[1])
        for group, found in zip(self.groups, weights, strict=True):
            pair = group.index[:, :, None] * length + (group.index % length)[:, None, :]
            if group.mask is not None:
                pair = torch.where(group.mask[:, :, None] & group.mask[:, None, :], pair, size)
            whole = whole.index_copy(0, pair.flatten(), found.permute(0, 2, 3, 1).flatten(0, 2))
        return whole[:size].unflatten(0, (batch, length, length)).permute(0, 3, 1, 2)

    def first_states(self, states: Tensor) -> Tensor:
        """States of first tokens: `[batch, length, hidden]` -> `[documents, hidden]`, row by row."""
        return states.flatten(0, 1).index_select(0, self.first)

    def with_prefix(self, count: int) -> "Documents":
        """The same with `count` tokens before each document, for `count * most` more at the start of each row.

        There, those of a row's first document come first; what is left over is padding. `first` and `position` are of
        the tokens that were there.
        """
        batch, length = self.place.shape
        front = count * self.most
        width = front + length
        groups = []
        for group in self.groups:
            row = group.index // length
            steps = torch.arange(count, device=row.device)
            own = row[:, :1] * width + group.rank[:, None] * count + steps
            index = torch.cat([own, group.index + (row + 1) * front], dim=1)
            mask = None if group.mask is None else torch.nn.functional.pad(group.mask, (count, 0), value=True)
            groups.append(group._replace(index=index, mask=mask))
        return self._replace(groups=tuple(groups), place=_places(groups, (batch, width)))


def _places(groups: list[Group], shape: tuple[int, int]) -> Tensor:
    """`place` of `Documents`, for rows of `shape`."""
    total = sum(group.index.numel() for group in groups)
    device = groups[0].index.device
    # One entry more takes what padding of the groups has.
    place = torch.full((shape[0] * shape[1] + 1,), total, device=device)
    start = 0
    for group in groups:
        index = group.index if group.mask is None else torch.where(group.mask, group.index, len(place) - 1)
        place[index.flatten()] = torch.arange(start, start + index.numel(), device=device)
        start += index.numel()
    return place[:-1].view(shape)


def attend(
    attention: Callable[..., Any],
    states: Tensor,
    key_padding_mask: Tensor | None,
    documents: Documents | None,
    context: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """`attention`, a mechanism, over rows of one text, or within the `documents` of packed ones.

    Documents have a mask and a context of their own; of `context` only `replay` is for them. `states` are
    `[batch, length, hidden]`, the result as in `Documents.attend`.
    """
    if documents is None:
        return attention(states, key_padding_mask, **context)
    return documents.attend(attention, states, context.get("replay"))


def first_tokens(document_ids: Tensor) -> Tensor:
    """Where documents begin: bool, of the shape `[batch, length]` of `document_ids`."""
    before = torch.nn.functional.pad(document_ids, (1, 0))[:, :-1]
    return (document_ids > 0) & (document_ids != before)


def find_documents(
    document_ids: Tensor, attention_mask: Tensor | None, shape: tuple[int, int], limit: int
) -> Documents:
    """The documents of rows of `shape` `(batch, length)`, each of at most `limit` tokens.

    Args:
        document_ids: `[batch, length]` integers, 0 at padding and equal positive numbers at tokens of one document.
        attention_mask: `[batch, length]`, must be 1 at documents and 0 elsewhere; None for just that.

    Raises:
        ValueError: ids that are none, or of another shape; a document in several places, or too long; a mask that says
            otherwise; while compiling or exporting.
    """
    if torch.compiler.is_compiling() or document_ids.device.type == "meta":
        raise ValueError(
            "document_ids while compiling or exporting, or without values: documents of a row have to be looked at, "
            "and shapes depend on what is found. Give each document a row of its own there, or do not compile."
        )
    check_document_ids(document_ids, shape)
    # Everything here is about some numbers: once to the CPU is less than many small steps elsewhere.
    ids = document_ids.detach().cpu().long()
    if int(ids.min()) < 0:
        raise ValueError(f"document_ids contains {int(ids.min())}; give 0 at padding and positive numbers at tokens.")
    mask = as_bool_mask("attention_mask", None if attention_mask is None else attention_mask.detach().cpu(), *shape)
    if mask is not None and not torch.equal(mask, ids > 0):
        row, column = (mask != (ids > 0)).nonzero()[0].tolist()
        raise ValueError(
            f"attention_mask is {int(mask[row, column])} and document_ids {int(ids[row, column])} at token {column} "
            f"of row {row}: documents are where the mask is 1, and 0 is padding. Leave attention_mask out, or let both "
            "agree."
        )
    begins = first_tokens(ids)
    rows, columns = begins.nonzero(as_tuple=True)
    _check_contiguous(rows, ids[begins])
    column = torch.arange(shape[1])
    position = (column - torch.where(begins, column, 0).cummax(dim=1).values).masked_fill(ids == 0, 0)
    ends = (ids > 0) & (torch.nn.functional.pad(ids, (0, 1))[:, 1:] != ids)
    lengths = position[ends] + 1
    if int(lengths.max()) > limit:
        worst = int(lengths.argmax())
        raise ValueError(
            f"document {int(ids[begins][worst])} of row {int(rows[worst])} has {int(lengths[worst])} tokens, more than "
            f"the {limit} of this model; a row may be longer, a document not: truncate with tokenizer(..., "
            f"truncation=True, max_length={limit})."
        )
    first = rows * shape[1] + columns
    rank = begins.long().cumsum(dim=1)[begins] - 1
    device = document_ids.device
    groups = []
    for chosen in _similar(lengths.tolist(), device):
        picked = torch.tensor(chosen)
        own = lengths[picked]
        steps = torch.arange(int(own.max()))
        inside = steps < own[:, None]
        index = first[picked, None] + torch.where(inside, steps, 0)
        is_full = bool(inside.all())
        groups.append(
            Group(index.to(device), None if is_full else inside.to(device), rank[picked].to(device), context={})
        )
    return Documents(tuple(groups), _places(groups, shape), first.to(device), position.to(device), int(rank.max()) + 1)


def check_document_ids(document_ids: Tensor, shape: tuple[int, int]) -> None:
    """Raises `ValueError` unless they are integers of `shape` `(batch, length)`."""
    if tuple(document_ids.shape) != tuple(shape):
        raise ValueError(
            f"document_ids must be [batch, length] = {list(shape)}, got shape {list(document_ids.shape)}; give 0 at "
            "padding and one positive number to all tokens of a document."
        )
    if document_ids.dtype == torch.bool or document_ids.dtype.is_floating_point:
        raise ValueError(f"document_ids are {document_ids.dtype}; these are numbers of documents, give integers.")


def _check_contiguous(rows: Tensor, numbers: Tensor) -> None:
    """Raises `ValueError` for documents, `numbers` of `rows` where they begin, that begin twice or are none."""
    if len(numbers) == 0:
        raise ValueError("document_ids has no document, only padding; give positive numbers to tokens.")
    pairs, counts = torch.stack([rows, numbers]).unique(dim=1, return_counts=True)
    if int(counts.max()) > 1:
        row, number = pairs[:, int(counts.argmax())].tolist()
        raise ValueError(
            f"document {number} of row {row} stands in {int(counts.max())} places: tokens of a document follow each "
            "other. Give each part a number of its own, or move them together."
        )


# Padding that documents of one call may have, in tokens, before another call is worth it.
_PADDING_ON_CPU = 512
_PADDING = 4096


def _similar(lengths: list[int], device: torch.device) -> list[list[int]]:
    """Documents by number in groups of similar length, the longest first."""
    allowed = _PADDING_ON_CPU if device.type == "cpu" else _PADDING
    groups: list[list[int]] = []
    padding, longest = 0, 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        padding += longest - lengths[number]
        if not groups or padding > allowed:
            groups.append([])
            padding, longest = 0, lengths[number]
        groups[-1].append(number)
    return groups


def refuse_documents(kwargs: dict[str, Any], model: str, reason: str) -> None:
    """Raises `ValueError` for `document_ids` among the arguments of a `model` that has one result a row."""
    if kwargs.get("document_ids") is not None:
        raise ValueError(f"{model} got document_ids, but {reason}; give each document a row of its own.")
