"""Attention through random features, with every feature and every weight in memory."""

import torch
from torch import Tensor

from .common import padding, project, softmax


def performer_weights(
    query: Tensor, key: Tensor, allowed: Tensor, *, projection: Tensor, kernel: str, scale: float | None = None
) -> Tensor:
    """`[batch, heads, n, n]`: products of features where `allowed`, divided by their row's sum; a row of none is 0.

    No stabiliser: for inputs whose exponentials fit into float64.
    """
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    features = []
    for x in (query, key):
        logits = torch.einsum("bhnd,md->bhnm", root * x, projection)
        if kernel == "softmax":
            features.append(torch.exp(logits - (root * x).square().sum(dim=-1, keepdim=True) / 2))
        else:
            features.append(torch.where(logits > 0, logits, 0.0) + 1e-3)
    terms = torch.where(allowed, torch.einsum("bhim,bhjm->bhij", *features), 0.0)
    total = terms.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, terms / torch.where(total > 0, total, 1.0), 0.0)


def performer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    *,
    projection: Tensor,
    kernel: str = "softmax",
    causal: bool = False,
    exact_below: int = 0,
) -> Tensor:
    """`weights @ value`; if causal of the keys up to the query. Examples below `exact_below` have softmax attention."""
    batch, heads, length, _ = query.shape
    allowed = padding(keep, batch, heads, length)
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    weights = performer_weights(query, key, allowed, projection=projection.to(query.dtype), kernel=kernel)
    mixed = torch.einsum("bhij,bhjd->bhid", weights, value)
    counts = torch.full((batch,), length) if keep is None else keep.sum(dim=1)
    return torch.where((counts < exact_below)[:, None, None, None], softmax(query, key, value, keep), mixed)


def performer_module(
    weights: dict[str, Tensor],
    states: Tensor,
    keep: Tensor | None,
    *,
    heads: int,
    **options: object,
) -> Tensor:
    """Performer's self-attention with the projection that the module has."""
    parts = (project(weights, name, states, heads) for name in ("query", "key", "value"))
    mixed = performer(*parts, keep, projection=weights["projection"], **options)
    return mixed.permute(0, 2, 1, 3).flatten(2)
