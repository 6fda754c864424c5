"""Random features of FAVOR+: the projection, and positive features of queries and keys whose products are a kernel."""

from typing import NamedTuple

import torch
from torch import Tensor


KERNELS = ("softmax", "relu")
RELU_OFFSET = 1e-3  # keeps features positive where the ReLU is 0, as in the paper's code


def orthogonal_features(blocks: Tensor, lengths: Tensor) -> Tensor:
    """Projection rows that are orthogonal within blocks of `head_dim`, each distributed like a Gaussian vector.

    The rows of a block are those of a Haar-distributed orthogonal matrix. QR alone does not give one: the factorisation
    fixes the signs, which leaves the kernel's estimate biased; multiplying columns by the signs of R's diagonal undoes
    it. A row's norm is that of an independent Gaussian vector; with fixed norms the estimate would be biased as well.

    Args:
        blocks: `[count, head_dim, head_dim]`, independent standard normal draws.
        lengths: `[features, head_dim]`, likewise; `features <= count * head_dim`.

    Returns:
        `[features, head_dim]` in float64.

    Raises:
        ValueError: too few blocks for the features.

    Choromanski et al. 2020, arXiv 2009.14794. Time O(features * head_dim^2).
    """
    count, head_dim = blocks.shape[:2]
    features = lengths.shape[0]
    if features > count * head_dim:
        raise ValueError(
            f"{count} blocks of {head_dim} rows are too few for {features} features; "
            f"draw {(features + head_dim - 1) // head_dim}."
        )
    orthogonal, triangular = torch.linalg.qr(blocks.double())
    diagonal = triangular.diagonal(dim1=-2, dim2=-1)
    rows = orthogonal * torch.where(diagonal < 0, -1.0, 1.0)[:, None, :]
    return rows.flatten(0, 1)[:features] * lengths.double().norm(dim=1, keepdim=True)


class FeatureMap(NamedTuple):
    """How queries and keys become features.

    `exp(w x - |x|^2 / 2)` for each row w of the projection (kernel "softmax"), or `relu(w x) + 1e-3` ("relu"), with
    `x = sqrt(scale) * query` or `key`. The factor `1 / sqrt(features)` cancels and is left out.

    Args:
        projection: `[features, head_dim]`, in the dtype to compute in.
        kernel: "softmax" or "relu".
        root: `sqrt(scale)`.
    """

    projection: Tensor
    kernel: str
    root: float

    def query_logits(self, query: Tensor) -> Tensor:
        """`[..., head_dim]` -> `[..., features]`, the logarithms up to a constant a row, which cancels."""
        return self._products(query * self.root)

    def key_logits(self, key: Tensor) -> Tensor:
        """`[..., head_dim]` -> `[..., features]`, the logarithms."""
        key = key * self.root
        return self._products(key) - key.square().sum(dim=-1, keepdim=True) / 2

    def linear(self, tensor: Tensor) -> Tensor:
        """Features of the ReLU kernel."""
        return self._products(tensor * self.root).relu() + RELU_OFFSET

    def _products(self, tensor: Tensor) -> Tensor:
        # As a batch of one: torch joins and splits dimensions for a plain matrix, which ties a graph to some lengths.
        return torch.matmul(tensor, self.projection.T[None])

    def pair(self, query: Tensor, key: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of queries and keys where every query sees every key; those of padding are 0.

        Each feature's largest key is divided out of the keys, and multiplied into the queries: nothing overflows, no
        normaliser is below 1, and the result is the same. The largest are those of one head of one example.
        """
        hole = None if keep is None else ~keep[:, None, :, None]
        if self.kernel == "relu":
            keys = self.linear(key)
            return self.linear(query), keys if hole is None else keys.masked_fill(hole, 0.0)
        logits = self.key_logits(key)
        if hole is not None:
            logits = logits.masked_fill(hole, -torch.inf)
        top = finite(logits.detach().amax(dim=2, keepdim=True))
        queries = self.query_logits(query) + top
        return (queries - queries.detach().amax(dim=-1, keepdim=True)).exp(), (logits - top).exp()

    def queries(self, query: Tensor) -> Tensor:
        """Features of queries, the largest of a row 1 in the softmax kernel."""
        if self.kernel == "relu":
            return self.linear(query)
        logits = self.query_logits(query)
        return (logits - logits.detach().amax(dim=-1, keepdim=True)).exp()

    def keys(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """Features of keys, each key for itself: `[..., n, features]`, and the logarithm of what was divided out.

        For the causal form, where a key may depend on no other one.
        """
        if self.kernel == "relu":
            features = self.linear(key)
            return features, features.new_zeros(features.shape[:-1])
        logits = self.key_logits(key)
        top = logits.detach().amax(dim=-1)
        return (logits - top[..., None]).exp(), top


def make_feature_map(query: Tensor, projection: Tensor, kernel: str, scale: float | None) -> FeatureMap:
    """A `FeatureMap` that computes in fp32 at least; raises `ValueError` for arguments that do not fit."""
    head_dim = query.shape[-1]
    if kernel not in KERNELS:
        raise ValueError(f"kernel = {kernel!r}: choose one of {', '.join(KERNELS)}.")
    if projection.dim() != 2 or projection.shape[1] != head_dim:
        raise ValueError(
            f"projection must be [features, head_dim] = [any, {head_dim}], got {list(projection.shape)}; "
            "draw it with `orthogonal_features`."
        )
    scale = head_dim**-0.5 if scale is None else scale
    if not scale > 0.0:
        raise ValueError(f"scale = {scale}: its square root is taken of queries and keys; give a positive number.")
    return FeatureMap(projection.to(torch.promote_types(query.dtype, torch.float32)), kernel, scale**0.5)


def finite(tensor: Tensor) -> Tensor:
    """`tensor` with 0 for -inf, the largest of nothing, so that differences to it are defined."""
    return tensor.masked_fill(tensor == -torch.inf, 0.0)


def ratio(sums: Tensor) -> Tensor:
    """`[..., d + 1]` -> `[..., d]`: divided by the last column; 0 where that is 0, with a gradient of 0."""
    total = sums[..., -1:]
    return sums[..., :-1] / torch.where(total > 0, total, 1.0)
