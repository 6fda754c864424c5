"""Mends Triton's interpreter in bfloat16: to be imported in place of `triton_interpreter`.

Up to Triton 3.9 it multiplies the bits of bfloat16 matrices as if they were whole numbers, and cuts off where a GPU
rounds.
"""

from triton_interpreter import DEVICE  # isort: skip  # it must come before Triton

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(builder, a, b, d, *rest):
    return _dot(builder, _widened(a), _widened(b), d, *rest)


def _cast_impl(builder, source, target):
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(rounded.reshape(source.data.shape), tl.bfloat16)
    return _cast(builder, source, target)


if DEVICE == "cpu":
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
