"""What kernels share: which tensors they take, who does what, how they read rows, and memory for results."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import to_base_2
from .room import LARGE_TILES, WIDE, has_room


HEAD_DIMS = (16, 32, 64, 128)
"""Head sizes that the kernels are for; the last one where there is room."""


def rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if the numbers of a row lie side by side, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each of them contiguous, or None where it is."""
    return [None if x is None else x.contiguous() for x in tensors]


def empty_like_rows(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for `[batch, heads, length, head_dim]` in which the heads of a token lie side by side."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator, left on the device; None where nothing is dropped."""
    return torch.randint(2**31 - 1, (1,), device=device) if dropout_p > 0.0 else None


def takes(first: Tensor, *others: Tensor) -> bool:
    """Whether the kernels are for heads of this size, all of one dtype."""
    width = first.shape[-1]
    fits = width in HEAD_DIMS and (width <= 64 or has_room(WIDE))
    return fits and all(x.dtype == first.dtype for x in others)


def tile_of_gradients(length: int) -> int:
    """Tokens of a program for gradients that go over all features."""
    return 128 if length > 64 and has_room(LARGE_TILES) else 64


def precision(tensor: Tensor) -> str:
    """Of products: half precision has but one; of float32 all digits count."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


@triton.jit
def places(parts, heads):
    """Which part this program does, of so many in each head, and of which head: counted through, its example, in there.

    All but the part have 64 bits: what they are multiplied with can come to over 2^31.
    """
    program = tl.program_id(0)
    pair = program // parts
    return program % parts, pair.to(tl.int64), (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def offsets(row, step, WIDTH: tl.constexpr):
    """Where the numbers of rows stand, rows being `step` numbers apart; a long text of a wide model has over 2^31."""
    return row.to(tl.int64)[:, None] * step + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_rows(base, row, mask, step, WIDTH: tl.constexpr):
    """Rows of a matrix, 0 where not `mask`."""
    return tl.load(base + offsets(row, step, WIDTH), mask=mask[:, None], other=0.0)


@triton.jit
def load_split(high, low, row, mask, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Rows of what `split_tensor` gave, 0 where not `mask`; with one part alone the second is not to be used."""
    found = load_rows(high, row, mask, WIDTH, WIDTH)
    found_low = found
    if PARTS == 2:
        found_low = load_rows(low, row, mask, WIDTH, WIDTH)
    return found, found_low


@triton.jit
def load_biases(bias, row, mask, HAS_BIAS: tl.constexpr):
    """What adds to logarithms of base 2: natural ones from a table, or 0 if there is none; -inf where not `mask`."""
    if HAS_BIAS:
        found = to_base_2(tl.load(bias + row, mask=mask, other=float("-inf")))
    else:
        found = tl.where(mask, 0.0, float("-inf"))
    return found


@triton.jit
def flags(mask, table, first, number, HAS: tl.constexpr):
    """`mask`, and besides what stands in a table of flags if there is one."""
    if HAS:
        mask = mask & (tl.load(table + first + number, mask=mask, other=0) != 0)
    return mask
