"""Triton's kernels on a CPU, one program after another: to be imported before any module of `hf_efficient_attn.cuda`.

Triton decides when a kernel is defined whether it is compiled or interpreted. Where there is a GPU, the kernels run on it.
"""

import os

import pytest
import torch


pytest.importorskip("triton", reason="Triton is there for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
