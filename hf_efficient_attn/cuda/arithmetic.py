"""What kernels share: products of numbers wider than a tensor core takes, softmax, and dropout without a mask.

A float32 number is very nearly the sum of two bfloat16 ones, of 8 bits each: `high`, and `low`, which is the rest. A
product of two such numbers is three products on tensor cores, or two where one factor is bfloat16 to begin with. That
is as fast as one product in TF32, and 60 times as exact; bfloat16 has the range of float32 besides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453
_LOG2_E = tl.constexpr(LOG2_E)  # for kernels

# Programs a launch should have where the tokens are long enough: a few for each multiprocessor of any GPU.
PROGRAMS = 2048


@triton.jit
def split(x, PARTS: tl.constexpr):
    """`(high, low)` in bfloat16, whose sum is `x`; with one part alone `low` is not to be used."""
    if PARTS == 1:
        high = x.to(tl.bfloat16)
        low = high
    else:
        wide = x.to(tl.float32)
        high = wide.to(tl.bfloat16)
        low = (wide - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def product(a, a_low, b, b_low, total, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """`total + a b` of split matrices; what two low parts make is below the rounding of the rest."""
    if A_PARTS == 2:
        total = tl.dot(a_low, b, total)
    if B_PARTS == 2:
        total = tl.dot(a, b_low, total)
    return tl.dot(a, b, total)


@triton.jit
def pairwise(a, a_low, b, b_low, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """`a b^T` of split matrices: the product of every row of `a` with every row of `b`."""
    zeros = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    return product(a, a_low, tl.trans(b), tl.trans(b_low), zeros, A_PARTS, B_PARTS)


@triton.jit
def rowwise(a, b):
    """The product of each row of `a` with the same row of `b`, in float32."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)


@triton.jit
def to_base_2(logarithm):
    """Of a natural logarithm."""
    return logarithm * _LOG2_E


@triton.jit
def softmax_step(scores, allowed, top, total):
    """Goes on with the softmax of rows, in exponents of 2, where `top` is their largest so far and `total` their sum.

    Returns what these scores weigh, what earlier ones weigh now as against before, and the new `top` and `total`.
    """
    scores = tl.where(allowed, scores, -1e30)
    higher = tl.maximum(top, tl.max(scores, 1))
    probs = tl.where(allowed, tl.exp2(scores - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    return probs, shrink, higher, total * shrink + tl.sum(probs, 1)


@triton.jit
def mixed(number):
    """A hash of 32-bit numbers that is one to one, the mixing of `functional.counter_random`."""
    number = (number ^ (number >> 16)) * 0x21F0AAAD
    number = (number ^ (number >> 15)) * 0x735A2D97
    return number ^ (number >> 15)


@triton.jit
def draw_key(seed, group):
    """A number of 32 bits for the draws of one head of one example."""
    return mixed(mixed(tl.load(seed).to(tl.uint32) + 0x1E3779B9) + group.to(tl.uint32) * 0x1E3779B9)


@triton.jit
def row_draws(key, row):
    """One hash for each row of a matrix of draws: `key` is from `draw_key`."""
    return mixed(key + row.to(tl.uint32) * 0x1E3779B9)


@triton.jit
def column_draws(key, column):
    """One hash for each column of a matrix of draws, other than those of rows."""
    return mixed((key ^ 0x2545F491) + column.to(tl.uint32) * 0x1E3779B9)


@triton.jit
def draws(lines):
    """Uniform whole numbers in `[0, 2^24)`, of the xor of a row's hash and a column's: upper bits of a last mixing."""
    number = (lines ^ (lines >> 16)) * 0x21F0AAAD
    number = (number ^ (number >> 15)) * 0x735A2D97
    return (number >> 8).to(tl.int32)


@triton.jit
def kept(lines, across, first):
    """Which entries of a matrix dropout leaves: of hashes down and across, and the first draw of `drop_limits`."""
    return draws(lines[:, None] ^ across[None, :]) >= first


@triton.jit
def whole_factors(lines, first, factor):
    """The factors of dropout that takes a row as a whole or leaves it."""
    return tl.where(draws(lines) >= first, factor, 0.0)


def drop_limits(dropout_p: float) -> tuple[int, float]:
    """The first draw that is kept, and the factor of what is kept."""
    return round(dropout_p * 2**24), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def parts_of(dtype: torch.dtype) -> int:
    """How many bfloat16 parts numbers of a dtype have."""
    return 1 if dtype == torch.bfloat16 else 2


def split_options(tensor: Tensor, weights: Tensor, precise: bool) -> dict[str, int]:
    """What kernels have to know of products of `tensor` and `weights` `[..., features, head_dim]` while they compile.

    That is the sizes, and the parts of the numbers: of each, and of what comes of them, 2 where that is `precise`.
    """
    inputs = parts_of(tensor.dtype)
    parts = {"INPUT_PARTS": inputs, "WEIGHT_PARTS": parts_of(weights.dtype), "PARTS": 2 if precise else inputs}
    return {"WIDTH": weights.shape[-1], "BLOCK": block_of(weights.shape[-2]), **parts}


def split_tensor(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """`split` outside of kernels, contiguous, for factors that many programs read."""
    high = tensor.to(torch.bfloat16).contiguous()
    if tensor.dtype == torch.bfloat16:
        return high, high
    # In float32, and rounded as it is written: for the small tensors that this is for, the number of launches counts.
    return high, torch.sub(tensor, high, out=torch.empty_like(high))


def ceil_div(number: int, size: int) -> int:
    """How many of that size hold so many. Triton's own takes microseconds on the host, and a step has dozens."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """The smallest one that is at least `number`."""
    return 1 << (number - 1).bit_length()


def block_of(features: int) -> int:
    """Features at a time: 64, or as few as hold them all and a tensor core takes."""
    return min(64, max(16, power_of_2(features)))


def share_out(length: int, tile: int, others: int) -> tuple[int, int]:
    """Into how many chunks to cut the tokens, and how many tokens each has, where `others` programs share each chunk.

    No more chunks than keep a GPU busy: each has sums of its own, which are added up afterwards. In a fixed order, so
    that results are the same each time.
    """
    tiles = ceil_div(length, tile)
    chunks = max(1, min(tiles, ceil_div(PROGRAMS, max(1, others))))
    size = ceil_div(tiles, chunks) * tile
    return ceil_div(length, size), size
