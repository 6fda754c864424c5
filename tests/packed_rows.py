"""Packed rows for the tests: documents of odd lengths with padding before, between and behind them."""

from typing import NamedTuple

import torch
from helpers import random_ids
from torch import Tensor


SEPARATOR = 2  # of the tiny configs


class Rows(NamedTuple):
    """A batch of packed rows.

    Args:
        inputs: `input_ids`, poisoned in padding, and `document_ids`.
        documents: where each document stands, row by row: `(row, slice)`.
    """

    inputs: dict[str, Tensor]
    documents: list[tuple[int, slice]]

    def alone(self, tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """What `tensors` `[batch, length, ...]` have for one document, as a batch of one."""
        row, tokens = self.documents[number]
        return {name: x[row : row + 1, tokens] for name, x in tensors.items()}


# Rows of documents (positive) and padding (negative), by their number of tokens.
LAYOUT = [[-3, 23, 1, -5, 40, 7, -2], [64, 17], [1, -30, 50]]


def pack_rows(layout: list[list[int]] = LAYOUT, seed: int = 0) -> Rows:
    """Random documents in `layout`, some with a separator; they have numbers in no order.

    Padding holds separators and pad ids.
    """
    length = max(sum(map(abs, row)) for row in layout)
    ids = torch.arange(len(layout) * length).view(len(layout), length) % 3
    document_ids = torch.zeros_like(ids)
    documents = []
    for row, parts in enumerate(layout):
        start = 0
        for place, size in enumerate(parts):
            if size > 0:
                tokens = slice(start, start + size)
                ids[row, tokens] = random_ids(1, size, seed=seed + 100 * row + place)[0]
                if size > 5 and place % 3 != 1:
                    ids[row, start + size // 3] = SEPARATOR
                document_ids[row, tokens] = (7 * place + 3) % 31 + 1
                documents.append((row, tokens))
            start += abs(size)
    return Rows({"input_ids": ids, "document_ids": document_ids}, documents)
