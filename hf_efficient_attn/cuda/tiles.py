"""What kernels share: which tensors they take, memory for results, and dropout that a backward pass replays."""

import torch
import triton
import triton.language as tl
from torch import Tensor


HEAD_DIMS = (16, 32, 64, 128)
"""Head sizes that the kernels are for."""


def rows(tensor: Tensor) -> Tensor:
    """`tensor` itself if the numbers of a row lie side by side, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_like_rows(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for `[batch, heads, length, head_dim]` in which the heads of a token lie side by side."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed from torch's generator, left on the device; None where nothing is dropped."""
    return torch.randint(2**31 - 1, (1,), device=device) if dropout_p > 0.0 else None


def dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """Below which 31-bit number an entry is dropped, and the factor of those that are kept."""
    return min(2**31 - 1, round(dropout_p * 2**31)), 0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p)


def precision(tensor: Tensor) -> str:
    """Of products: half precision has but one; of float32 all digits count."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


@triton.jit
def load_rows(base, row, mask, step, WIDTH: tl.constexpr):
    """Rows of a matrix, 0 where not `mask`."""
    return tl.load(base + row[:, None] * step + tl.arange(0, WIDTH)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def flags(mask, table, first, number, HAS: tl.constexpr):
    """`mask`, and besides what stands in a table of flags if there is one."""
    if HAS:
        mask = mask & (tl.load(table + first + number, mask=mask, other=0) != 0)
    return mask


@triton.jit
def hashed(number):
    """A hash of 32-bit numbers."""
    number = (number ^ (number >> 16)) * 0x21F0AAAD
    number = (number ^ (number >> 15)) * 0x735A2D97
    return number ^ (number >> 15)


@triton.jit
def row_keys(seed, pair, row):
    """A number for each row of one head's matrix, the first part of an entry's random number."""
    start = hashed(seed.to(tl.uint32) ^ hashed(pair.to(tl.uint32) + 0x1E3779B9))
    return hashed(row.to(tl.uint32) * 0x1E3779B1 + start)


@triton.jit
def kept(row_key, column, threshold):
    """Which entries are kept: `row_key` and `column` broadcast to them."""
    return (hashed(row_key ^ (column.to(tl.uint32) * 0x2C1B3C6D + 0x297A2D39)) >> 1).to(tl.int32) >= threshold
