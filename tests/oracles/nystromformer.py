"""Nyström attention, example by example over the valid tokens alone, and the convolution beside it."""

import torch
from torch import Tensor

from .common import project


def segments(count: int, landmarks: int) -> list[list[int]]:
    """Ranks of the tokens of each segment."""
    return [[rank for rank in range(count) if rank * landmarks // count == s] for s in range(landmarks)]


def inverse(matrices: Tensor, iterations: int | None, scale_per_matrix: bool) -> Tensor:
    """Of matrices `[heads, m, m]` of one example: exact, or after so many iterations."""
    if iterations is None:
        return torch.linalg.inv(matrices)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    column_sums = matrices.sum(dim=1)
    results = []
    for head, a in enumerate(matrices):
        z = a.T / (column_sums[head].max() if scale_per_matrix else column_sums.max())
        for _ in range(iterations):
            az = a @ z
            z = z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az))) / 4
        results.append(z)
    return torch.stack(results)


def nystrom(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    num_landmarks: int,
    pinv_iterations: int | None,
    scale_per_matrix: bool,
) -> Tensor:
    """`softmax(q k~) pinv(softmax(q~ k~)) softmax(q~ k) v`; softmax attention where there are no more tokens."""
    batch, _, length, width = query.shape
    rows = []
    for example in range(batch):
        own = torch.arange(length) if keep is None else keep[example].nonzero()[:, 0]
        q, k, v = (x[example].index_select(1, own) for x in (query, key, value))
        count = len(own)
        if count <= num_landmarks:
            mixed = torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1) @ v
        else:
            parts = segments(count, num_landmarks)
            q_means, k_means = (torch.stack([x[:, part].mean(dim=1) for part in parts], dim=1) for x in (q, k))
            left = torch.softmax(q @ k_means.transpose(1, 2) / width**0.5, dim=-1)
            middle = torch.softmax(q_means @ k_means.transpose(1, 2) / width**0.5, dim=-1)
            right = torch.softmax(q_means @ k.transpose(1, 2) / width**0.5, dim=-1)
            mixed = left @ (inverse(middle, pinv_iterations, scale_per_matrix) @ (right @ v))
        rows.append(torch.zeros_like(query[example]).index_copy(1, own, mixed))
    return torch.stack(rows)


def convolution(value: Tensor, keep: Tensor | None, kernels: Tensor) -> Tensor:
    """Of each head's values `[batch, heads, n, d]` with its kernel `[heads, size]`, over the valid tokens alone."""
    batch, heads, length, _ = value.shape
    size = kernels.shape[1]
    rows = []
    for example in range(batch):
        own = torch.arange(length) if keep is None else keep[example].nonzero()[:, 0]
        v = value[example].index_select(1, own)
        count = len(own)
        mixed = torch.zeros_like(v)
        for step in range(size):
            shift = step - size // 2
            for i in range(max(0, -shift), min(count, count - shift)):
                mixed[:, i] = mixed[:, i] + kernels[:, step, None] * v[:, i + shift]
        rows.append(torch.zeros_like(value[example]).index_copy(1, own, mixed))
    return torch.stack(rows)


def nystromformer_module(
    weights: dict[str, Tensor],
    states: Tensor,
    keep: Tensor | None,
    *,
    heads: int,
    num_landmarks: int,
    pinv_iterations: int | None,
    scale_per_matrix: bool,
) -> Tensor:
    """Nystromformer's self-attention; it has a convolution if there are weights for one."""
    query, key, value = (project(weights, name, states, heads) for name in ("query", "key", "value"))
    options = {"pinv_iterations": pinv_iterations, "scale_per_matrix": scale_per_matrix}
    mixed = nystrom(query, key, value, keep, num_landmarks=num_landmarks, **options)
    if "conv.weight" in weights:
        mixed = mixed + convolution(value, keep, weights["conv.weight"][:, 0, :, 0])
    return mixed.permute(0, 2, 1, 3).flatten(2)
