"""Random numbers as a pure function of what they are for. No generator is touched, and no device matters."""

import math

import torch
from torch import Tensor


_MASK = 2**32 - 1


def _mixed(number: Tensor) -> Tensor:
    """A hash of 32-bit numbers, held in int64: each factor is below 2^31, so that no product overflows."""
    number = ((number ^ (number >> 16)) * 0x21F0AAAD) & _MASK
    number = ((number ^ (number >> 15)) * 0x735A2D97) & _MASK
    return number ^ (number >> 15)


def counter_draws(seed: int, *places: int | Tensor, device: torch.device) -> Tensor:
    """Uniform numbers in `[0, 2^32)`, int64, one for each of the `places`, which broadcast.

    A number depends on `seed` and its own place only: neither on the device, nor on how many there are.
    """
    hashed = torch.zeros((), dtype=torch.long, device=device)
    for part in (seed % 2**31, seed // 2**31 % 2**31, *places):
        hashed = _mixed((hashed + (part + 1) * 0x1E3779B9) & _MASK)
    return hashed


def normal_draws(seed: int, *places: int | Tensor, device: torch.device) -> Tensor:
    """Standard normal numbers in float32, one for each of the `places` (Box and Muller 1958)."""
    first, second = (counter_draws(seed, *places, half, device=device) for half in (0, 1))
    # 24 bits are what a float32 holds; never 0, for its logarithm.
    radius = (((first >> 8).float() + 0.5) / 2**24).log().mul(-2.0).sqrt()
    return radius * torch.cos((second >> 8).float() * (2 * math.pi / 2**24))
