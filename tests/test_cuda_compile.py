"""Every kernel compiles for GPUs and fits into their memory, which the interpreter does not show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="Triton is there for Linux only")

from hf_efficient_attn.cuda import room


KERNELS = {
    "blocks": ("_forward", "_backward"),
    "features_forward": ("_sum_kernel", "_join_kernel", "_mix_kernel"),
    "inverse": ("_forward_kernel", "_backward_kernel"),
    "mix_backward": ("_token_kernel", "_feature_kernel"),
    "nearby": ("_convolve", "_kernel_gradients"),
    "segments": ("_segment_kernel", "_spread_kernel"),
    "sums_backward": ("_token_kernel", "_weight_kernel"),
    "window": ("_forward", "_queries", "_keys"),
}


@pytest.mark.slow
def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    """For Hopper, where all have room, and for a GPU with the least shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # nothing compiled before
    program = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    names = {f"{module}.{kernel}" for module, kernels in KERNELS.items() for kernel in kernels}
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {(gpu, name) for gpu, name, _ in lines} == {(gpu, name) for gpu in ("90", "89") for name in names}
    most = {"inverse._backward_kernel": room.INVERSE, "blocks._backward": room.LARGE_BLOCKS}
    for gpu, name, memory in lines:
        bound = room.NARROW if gpu == "89" else most.get(name, room.WIDE)
        assert int(memory) <= bound, (gpu, name, memory)
