"""The convolution of the values on a CPU, some tokens at a time, added to a result in the same pass.

The same function as a depthwise convolution and a sum, for eager mode. A head's kernel, laid out as a band, turns the
convolution of a block of tokens into one matrix product, for the gradients as well.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import Scratch, without_autocast


# Tokens a product: fewer are more calls, more are more zeros in the band.
_BLOCK = 64


def cpu_add_nearby(mixed: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """`mixed[t] + sum_j weight[j] value[t + j - taps // 2]`, the sum 0 at padding, and padding 0 in it.

    Args:
        mixed, value: `[batch, heads, length, head_dim]`, of one dtype, which `weight` has too. Where no gradient is
            wanted the result is written into `mixed`.
        weight: `[heads, taps]`, an odd number of taps.
        keep: `[batch, length]` bool, or None.

    Returns:
        As `mixed`.

    Xiong et al. 2021, arXiv 2102.03902. Time O(length * (taps + block)), no memory but the result.
    """
    if not torch.is_grad_enabled():
        with without_autocast(mixed.device):
            return _convolve(value, weight, keep, mixed, mixed)
    return _Nearby.apply(mixed, value, weight, keep)


class _Block(NamedTuple):
    """A block of tokens of one example, and what its tokens can see.

    Args:
        here: `(example, all heads, tokens)`, an index.
        near: the same of the tokens within reach.
        band: the part of the band `[heads, block, block + taps - 1]` that lies within the text.
    """

    here: tuple[int, slice, slice]
    near: tuple[int, slice, slice]
    band: tuple[slice, slice, slice]


def _blocks(batch: int, length: int, taps: int) -> Iterator[_Block]:
    every, side = slice(None), taps // 2
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        first, last = max(0, start - side), min(length, end + side)
        offset = first - (start - side)
        band = (every, slice(0, end - start), slice(offset, offset + last - first))
        for example in range(batch):
            yield _Block((example, every, slice(start, end)), (example, every, slice(first, last)), band)


def _diagonals(band: Tensor, taps: int) -> Tensor:
    """The places of a kernel in `band` `[heads, block, block + taps - 1]`, contiguous: `[heads, block, taps]`."""
    heads, rows, columns = band.shape
    return band.as_strided((heads, rows, taps), (rows * columns, columns + 1, 1))


def _kept(tensor: Tensor, keep: Tensor | None, where: tuple[int, slice, slice], scratch: Scratch, name: str) -> Tensor:
    """`tensor[where]`, 0 at padding, where not even inf or NaN may count."""
    part = tensor[where]
    if keep is None:
        return part
    copied = scratch.take(name, tuple(part.shape), part.dtype).copy_(part)
    return copied.masked_fill_(~keep[where[0], where[2], None], 0.0)


def _convolve(value: Tensor, weight: Tensor, keep: Tensor | None, added: Tensor | None, result: Tensor) -> Tensor:
    """The convolution into `result`, on top of `added` if that is given."""
    batch, heads, length, width = value.shape
    taps, scratch = weight.shape[1], Scratch()
    band = weight.new_zeros(heads, _BLOCK, _BLOCK + taps - 1)
    _diagonals(band, taps).copy_(weight[:, None, :])
    for block in _blocks(batch, length, taps):
        near = _kept(value, keep, block.near, scratch, "near")
        tokens = block.here[2]
        sums = scratch.take("sums", (heads, tokens.stop - tokens.start, width), value.dtype)
        torch.bmm(band[block.band], near, out=sums)
        if keep is not None:
            sums.masked_fill_(~keep[block.here[0], tokens, None], 0.0)
        if added is None:
            result[block.here] = sums
        else:
            torch.add(added[block.here], sums, out=result[block.here])
    return result


def _kernel_grad(grad: Tensor, value: Tensor, taps: int, keep: Tensor | None) -> Tensor:
    """What `grad` of the convolution makes of its kernel: `[heads, taps]`."""
    batch, heads, length, _ = value.shape
    scratch = Scratch()
    # Each block adds to the whole band, zeros and all: what lies beside the diagonals is dropped at the end.
    band = value.new_zeros(heads, _BLOCK, _BLOCK + taps - 1)
    for block in _blocks(batch, length, taps):
        above = _kept(grad, keep, block.here, scratch, "above")
        near = _kept(value, keep, block.near, scratch, "near")
        band[block.band].baddbmm_(above, near.transpose(-1, -2))
    return _diagonals(band, taps).sum(dim=1)


class _Nearby(torch.autograd.Function):
    """In the form that `torch.func` takes as well; linear in values and kernel, so its backward passes are its own."""

    @staticmethod
    def forward(added: Tensor | None, value: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
        # As `added` lies, which is in the order in which heads are merged.
        result = torch.empty_like(value if added is None else added)
        with without_autocast(value.device):
            return _convolve(value, weight, keep, added, result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, weight, keep = ctx.saved_tensors
        needed = ctx.needs_input_grad
        value_grad = _Nearby.apply(None, grad, weight.flip(-1), keep) if needed[1] else None
        weight_grad = _KernelGrad.apply(grad, value, weight.shape[1], keep) if needed[2] else None
        return grad if needed[0] else None, value_grad, weight_grad, None


class _KernelGrad(torch.autograd.Function):
    """`[heads, taps]`: what gradients of the convolution make of its kernel."""

    @staticmethod
    def forward(grad: Tensor, value: Tensor, taps: int, keep: Tensor | None) -> Tensor:
        with without_autocast(value.device):
            return _kernel_grad(grad, value, taps, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3])

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        grad, value, keep = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_grad = _Nearby.apply(None, value, above, keep) if needed[0] else None
        value_grad = _Nearby.apply(None, grad, above.flip(-1), keep) if needed[1] else None
        return grad_grad, value_grad, None, None
