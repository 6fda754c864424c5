"""Triton's kernels on a CPU, one program after another; where there is a GPU, on that. To be imported for `DEVICE`.

Up to Triton 3.9 the interpreter multiplies the bits of bfloat16 matrices as if they were whole numbers, and cuts off
where a GPU rounds: mended here.
"""

import numpy as np
import pytest
import torch


pytest.importorskip("triton", reason="Triton is there for Linux only")

import triton.language as tl
from triton.runtime import interpreter


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


if DEVICE.type == "cpu":
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.InterpreterBuilder.cast_impl = _cast_impl
