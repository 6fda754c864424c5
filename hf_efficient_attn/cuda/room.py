"""What the GPUs at hand have room for: shared memory of a program, in bytes."""

from typing import Any

import torch


NARROW = 101_376
"""What NVIDIA's GPUs from compute capability 8.0 on have at least; enough for all kernels but those below."""

LARGE_TILES = 132_000
"""For gradients through features in tiles of 128 tokens."""

LARGE_BLOCKS = 131_072
"""For blocks of more than 64 tokens."""

INVERSE = 163_840
"""For the gradient of the inverse of 64 x 64 matrices."""

WIDE = 200_000
"""For heads of more than 64."""


def least(gpus: list[Any], is_nvidia: bool) -> int:
    """The least that any of these GPUs has, as `torch.cuda.get_device_properties` describes them.

    0 where one is not of NVIDIA or does not tell. Without any GPU, where kernels are interpreted, enough for all.
    """
    found = [getattr(gpu, "shared_memory_per_block_optin", 0) if is_nvidia else 0 for gpu in gpus]
    return min(found, default=WIDE)


ROOM = least(
    [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())], torch.version.hip is None
)
"""The least that any GPU of this machine has."""


def has_room(size: int) -> bool:
    """Whether kernels may take so much."""
    return size <= ROOM
