"""A depthwise convolution of the values over tokens as matrix products, for devices that are good at those.

A head's kernel, laid out as a band, times windows of the tokens, all windows side by side: one product a head, for the
gradients of values and kernel as well. A GPU's own convolution of one channel a group takes many times as long.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu import without_autocast
from .fused import fused
from .inputs import count_blocks, zero_padding


# Tokens a window gives results for: fewer are more copies of what lies around them, more are more zeros in the band.
_BLOCK = 64


def add_nearby(mixed: Tensor, value: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """`mixed[t] + sum_j weight[j] value[t + j - taps // 2]`, the sum 0 at padding, and padding 0 in it.

    Args:
        mixed, value: `[batch, heads, length, head_dim]`, of one dtype, which `weight` has too.
        weight: `[heads, taps]`, an odd number of taps.
        keep: `[batch, length]` bool, or None.

    Returns:
        As `mixed`.

    Xiong et al. 2021, arXiv 2102.03902. Time O(length * (taps + block)), memory O(length * (1 + taps / block)), none
    of it kept for the backward pass.
    """
    kernel = fused("add_nearby", value)
    if kernel is not None:
        added = kernel(mixed, value, weight, keep)
        if added is not None:
            return added
    return mixed + zero_padding(_Convolution.apply(zero_padding(value, keep), weight), keep)


def _windows(tensor: Tensor, taps: int) -> Tensor:
    """`[batch, heads, length, width]` -> `[heads, block + taps - 1, batch * blocks * width]`, 0 beyond both ends."""
    heads, length = tensor.shape[1:3]
    reach, side = _BLOCK + taps - 1, taps // 2
    blocks = count_blocks(length, _BLOCK)
    padded = F.pad(tensor, (0, 0, side, blocks * _BLOCK - length + side))
    return padded.unfold(2, reach, _BLOCK).permute(1, 4, 0, 2, 3).reshape(heads, reach, -1)


def _band(weight: Tensor) -> Tensor:
    """`[heads, taps]` -> `[heads, block, block + taps - 1]`: row t has the kernel from column t on, and zeros else."""
    taps, device = weight.shape[1], weight.device
    tap = torch.arange(_BLOCK + taps - 1, device=device) - torch.arange(_BLOCK, device=device)[:, None]
    band = weight[:, tap.clamp(0, taps - 1)]
    return torch.where((tap >= 0) & (tap < taps), band, 0.0)


def _convolve(value: Tensor, weight: Tensor) -> Tensor:
    """The convolution, its heads for each token side by side."""
    batch, heads, length, width = value.shape
    blocks = count_blocks(length, _BLOCK)
    sums = torch.bmm(_band(weight), _windows(value, weight.shape[1]))
    sums = sums.view(heads, _BLOCK, batch, blocks, width).permute(2, 3, 1, 0, 4)
    return sums.reshape(batch, blocks * _BLOCK, heads, width)[:, :length].transpose(1, 2)


def _kernel_grad(grad: Tensor, value: Tensor, taps: int) -> Tensor:
    """What `grad` of the convolution makes of its kernel: `[heads, taps]`."""
    above = _windows(grad, 1)
    band = torch.bmm(above, _windows(value, taps).transpose(1, 2))
    # What lies beside the diagonals is dropped.
    device = grad.device
    column = torch.arange(_BLOCK, device=device)[:, None] + torch.arange(taps, device=device)
    wide = torch.promote_types(band.dtype, torch.float32)
    return band.gather(2, column.expand(band.shape[0], -1, -1)).sum(dim=1, dtype=wide).to(grad.dtype)


class _Convolution(torch.autograd.Function):
    """Linear in values and kernel, so that its backward passes are its own: no window is ever added up.

    In the form that `torch.func` takes as well.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, weight: Tensor) -> Tensor:
        with without_autocast(value.device):
            return _convolve(value, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        value, weight = ctx.saved_tensors
        value_grad = _Convolution.apply(grad, weight.flip(-1)) if ctx.needs_input_grad[0] else None
        weight_grad = _KernelGrad.apply(grad, value, weight.shape[1]) if ctx.needs_input_grad[1] else None
        return value_grad, weight_grad


class _KernelGrad(torch.autograd.Function):
    """`[heads, taps]`: what gradients of the convolution make of its kernel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, value: Tensor, taps: int) -> Tensor:
        with without_autocast(value.device):
            return _kernel_grad(grad, value, taps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad, value = ctx.saved_tensors
        grad_grad = _Convolution.apply(value, above) if ctx.needs_input_grad[0] else None
        value_grad = _Convolution.apply(grad, above.flip(-1)) if ctx.needs_input_grad[1] else None
        return grad_grad, value_grad, None
