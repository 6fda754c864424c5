"""The iteration towards an inverse of `functional.nystrom`, all steps of a matrix in one program."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cpu import first_derivatives
from .operators import operator
from .room import INVERSE, has_room


SIZES = (16, 32, 64)
"""Rows of matrices that the kernels are for."""

# As exact as float32 needs, on tensor cores.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _times(a, b):
    return tl.dot(a, b, input_precision=_PRECISION)


@triton.jit
def _forward_kernel(matrix, start, steps, result, count, iterations, SIZE: tl.constexpr):
    """All iterations of one matrix; `steps` gets what each one started from."""
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    a = tl.load(matrix + group * SIZE * SIZE + at)
    z = tl.load(start + group * SIZE * SIZE + at)
    for step in range(0, iterations):
        tl.store(steps + (step * count + group) * SIZE * SIZE + at, z)
        p = _times(a, z)
        inner = 7.0 * p - _times(p, p)
        inner = 15.0 * p - _times(p, inner)
        z = 3.25 * z - 0.25 * _times(z, inner)
    tl.store(result + group * SIZE * SIZE + at, z)


@triton.jit
def _backward_kernel(matrix, steps, above, matrix_grad, start_grad, count, iterations, SIZE: tl.constexpr):
    """Back through all iterations of one matrix, each computed again from what it started from."""
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    a = tl.load(matrix + group * SIZE * SIZE + at)
    g = tl.load(above + group * SIZE * SIZE + at)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for back in range(0, iterations):
        z = tl.load(steps + ((iterations - 1 - back) * count + group) * SIZE * SIZE + at)
        p = _times(a, z)
        inner = 7.0 * p - _times(p, p)
        outer = 15.0 * p - _times(p, inner)
        # z' = 3.25 z - z outer / 4, outer = 15 p - p inner, inner = 7 p - p p, p = a z
        outer_grad = -0.25 * _times(tl.trans(z), g)
        g = 3.25 * g - 0.25 * _times(g, tl.trans(outer))
        p_grad = 15.0 * outer_grad - _times(outer_grad, tl.trans(inner))
        inner_grad = -_times(tl.trans(p), outer_grad)
        p_grad += 7.0 * inner_grad - _times(inner_grad, tl.trans(p)) - _times(tl.trans(p), inner_grad)
        total += _times(p_grad, tl.trans(z))
        g += _times(tl.trans(a), p_grad)
    tl.store(matrix_grad + group * SIZE * SIZE + at, total)
    tl.store(start_grad + group * SIZE * SIZE + at, g)


@operator("pinv_iterations")
def _inverse_op(matrix: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    matrix, start = matrix.contiguous(), start.contiguous()
    size = matrix.shape[-1]
    count = matrix.numel() // size**2
    result, steps = torch.empty_like(matrix), matrix.new_empty(iterations, *matrix.shape)
    _forward_kernel[(count,)](matrix, start, steps, result, count, iterations, SIZE=size, num_warps=4, num_stages=1)
    return result, steps


@_inverse_op.register_fake
def _(matrix: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape), matrix.new_empty(iterations, *matrix.shape)


@operator("pinv_iterations_backward")
def _gradients_op(matrix: Tensor, steps: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    matrix, above = matrix.contiguous(), above.contiguous()
    size = matrix.shape[-1]
    count, iterations = matrix.numel() // size**2, steps.shape[0]
    matrix_grad, start_grad = torch.empty_like(matrix), torch.empty_like(matrix)
    arguments = (matrix, steps, above, matrix_grad, start_grad, count, iterations)
    _backward_kernel[(count,)](*arguments, SIZE=size, num_warps=4, num_stages=1)
    return matrix_grad, start_grad


@_gradients_op.register_fake
def _(matrix: Tensor, steps: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape), matrix.new_empty(matrix.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.set_materialize_grads(False)


@first_derivatives
def _backward(ctx: Any, above: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if above is None:
        return None, None, None
    return *_gradients_op(*ctx.saved_tensors, above), None


_inverse_op.register_autograd(_backward, setup_context=_keep)


def pinv_iterations(matrix: Tensor, start: Tensor, iterations: int) -> Tensor | None:
    """`Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4`, so many times from `start`.

    Args:
        matrix: A, float32 `[..., landmarks, landmarks]`.
        start: the first Z, likewise.

    Returns:
        As `matrix`; None for so many landmarks as there is no kernel, or no room, for.

    See `functional.nystrom.iterative_pinv`. Time O(iterations * landmarks^3) a matrix, each iterate kept for backward.
    """
    size = matrix.shape[-1]
    if size not in SIZES or (size == SIZES[-1] and not has_room(INVERSE)):
        return None
    return _inverse_op(matrix, start, iterations)[0]
