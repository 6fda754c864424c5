"""Dropout, alone or with the residual after it in one step, which keeps a seed for backward and nothing else."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .modules import in_reach
from .scratch import CHUNK_BYTES, DropoutReplay, Scratch, draw_replay


def dropout_add(states: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    """`residual + dropout(states)`, both `[..., width]` of one shape.

    On a CPU in eager mode, in the dtype of both, without memory for noise and dropped states: for a long text touching
    fresh memory costs more than the work in it. Elsewhere as torch does it.

    Srivastava et al. 2014 (dropout). Time O(states), no memory but the result on a CPU.
    """
    fits = states.dtype == residual.dtype and states.shape == residual.shape
    if not fits or not _is_own(states, dropout_p):
        return residual + F.dropout(states, dropout_p)
    return _DropoutAdd.apply(states, residual, draw_replay(dropout_p))


def dropout(states: Tensor, dropout_p: float) -> Tensor:
    """`torch.nn.functional.dropout`, on a CPU in eager mode several times quicker and without a mask in memory.

    `states` is `[..., width]`, and so is the result.

    Srivastava et al. 2014 (dropout). Time O(states), no memory but the result on a CPU.
    """
    if not _is_own(states, dropout_p):
        return F.dropout(states, dropout_p)
    return _Dropout.apply(states, draw_replay(dropout_p))


def _is_own(states: Tensor, dropout_p: float) -> bool:
    return 0.0 < dropout_p < 1.0 and in_reach(states)


def _dropped(states: Tensor, residual: Tensor | None, dropout: DropoutReplay) -> Tensor:
    """`dropout(states)`, and the residual on top, some rows at a time."""
    width = states.shape[-1]
    target = torch.empty_like(states, memory_format=torch.contiguous_format)
    rows = max(1, CHUNK_BYTES * torch.get_num_threads() // (width * states.dtype.itemsize))
    generator, scratch = dropout.generator(), Scratch()
    given, into = states.reshape(-1, width), target.view(-1, width)
    residual = None if residual is None else residual.reshape(-1, width)
    for start in range(0, given.shape[0], rows):
        part = slice(start, start + rows)
        kept = dropout.kept(given[part], scratch, generator).mul_(1.0 / dropout.keep_share)
        if residual is None:
            torch.mul(given[part], kept, out=into[part])
        else:
            torch.addcmul(residual[part], given[part], kept, out=into[part])
    return target


class _DropoutAdd(torch.autograd.Function):
    """In the form that `torch.func` takes as well."""

    @staticmethod
    def forward(states: Tensor, residual: Tensor, dropout: DropoutReplay) -> Tensor:
        return _dropped(states, residual, dropout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, DropoutReplay], output: Tensor) -> None:
        ctx.dropout = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _Dropout.apply(grad, ctx.dropout), grad, None


class _Dropout(torch.autograd.Function):
    """The same entries dropped from a gradient; linear, so its own backward pass."""

    @staticmethod
    def forward(states: Tensor, dropout: DropoutReplay) -> Tensor:
        return _dropped(states, None, dropout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, DropoutReplay], output: Tensor) -> None:
        ctx.dropout = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Dropout.apply(grad, ctx.dropout), None
