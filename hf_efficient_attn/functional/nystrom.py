"""Nyström attention: the softmax matrix from its rows and columns at a few landmarks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cpu import TOKENS_AT_ONCE, in_reach, without_autocast
from .dense import masked_softmax, padded_attention
from .dense_execution import dense_is_on
from .dropout_cpu import cpu_dropout_attention
from .feature_kernels import feature_kernels
from .fused import fused
from .inputs import check_prepared, check_qkv, masked_bias, zero_padding


class Landmarks(NamedTuple):
    """Segment means of each example's valid tokens.

    Args:
        segment: `[batch or 1, length]` int64, the segment of each token; one more than there are at padding.
        sizes: `[batch or 1, landmarks, 1]`, the tokens of each segment, 1 at least; in the tensors' dtype, or float32
            where that is wider.
        filled: `[batch or 1, 1, 1, landmarks]` bool, False at segments without a token, which only examples shorter
            than the landmarks have; None if there can be none.
        exact: `[batch or 1, 1, 1, 1]` bool, True where each token is a segment of its own; None if that is nowhere.
    """

    segment: Tensor
    sizes: Tensor
    filled: Tensor | None
    exact: Tensor | None

    @property
    def average(self) -> Tensor:
        """What takes the means, `[batch or 1, landmarks, length]`: row s is `1 / size of s` at its tokens."""
        return _members(self.segment, self.sizes.shape[1]).to(self.sizes.dtype) / self.sizes

    def means(self, tensor: Tensor) -> Tensor:
        """`[batch, heads, length, head_dim]` -> `[batch, heads, landmarks, head_dim]`."""
        batch, heads, _, width = tensor.shape
        landmarks, joined = self.sizes.shape[1], tensor.transpose(1, 2).flatten(2)
        if in_reach(tensor):
            # A product with a matrix that is nearly all zeros takes many times as long. Padding has a row of its own.
            rows = self.segment + (landmarks + 1) * torch.arange(batch, device=tensor.device)[:, None]
            sums = joined.new_zeros(batch * (landmarks + 1), heads * width)
            sums = sums.index_add(0, rows.flatten(), joined.flatten(0, 1))
            means = sums.unflatten(0, (batch, landmarks + 1))[:, :landmarks] / self.sizes
        else:
            means = torch.matmul(_members(self.segment, landmarks).to(joined.dtype), joined) / self.sizes
        return means.unflatten(-1, (heads, width)).transpose(1, 2)


def _members(segment: Tensor, landmarks: int) -> Tensor:
    """Which tokens each segment has, bool `[batch or 1, landmarks, length]`."""
    return segment[:, None, :] == torch.arange(landmarks, device=segment.device)[None, :, None]


def segment_landmarks(like: Tensor, key_padding_mask: Tensor | None, num_landmarks: int) -> Landmarks:
    """The segments of the sequences `like` `[batch, heads, length, head_dim]`, whose device they get.

    A token's segment is `floor(rank * num_landmarks / count)` with its rank among the `count` valid tokens of its
    example, so that padding, on either side, moves no boundary.
    """
    length, device = like.shape[2], like.device
    if key_padding_mask is None:
        segment = (torch.arange(length, device=device) * num_landmarks // length)[None]
        count = torch.full((1, 1), length, device=device)
    else:
        count = key_padding_mask.sum(dim=1, keepdim=True)
        segment = (key_padding_mask.long().cumsum(dim=1) - 1) * num_landmarks // count.clamp(min=1)
        segment = torch.where(key_padding_mask, segment, num_landmarks)
    if in_reach(like):
        sizes = torch.zeros(segment.shape[0], num_landmarks + 1, dtype=torch.long, device=device)
        sizes = sizes.scatter_add(1, segment, torch.ones_like(segment))[:, :num_landmarks, None]
    else:
        sizes = _members(segment, num_landmarks).sum(dim=2, keepdim=True)
    divisors = sizes.clamp(min=1).to(torch.promote_types(like.dtype, torch.float32))
    # A choice by shape, not by data; in a graph the length is not known.
    if key_padding_mask is None and not torch.compiler.is_compiling() and length > num_landmarks:
        return Landmarks(segment, divisors, None, None)
    return Landmarks(segment, divisors, (sizes > 0)[:, None, None, :, 0], (count <= num_landmarks)[:, :, None, None])


def iterative_pinv(
    matrix: Tensor,
    iterations: int,
    scale_per_matrix: bool = True,
    kernel: Callable[[Tensor, Tensor, int], Tensor | None] | None = None,
) -> Tensor:
    """Moore-Penrose inverse of matrices whose rows are probabilities, by a third-order iteration.

    `Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4` from `Z = A^T / (largest column sum)`; the largest row sum, the
    other factor that makes it converge, is 1.

    Args:
        matrix: `[batch, heads, landmarks, landmarks]`.
        iterations: 6 as published; each brings singular values that are 1.8 times smaller within reach.
        scale_per_matrix: take the largest column sum of each matrix; else of all heads of an example, which is
            slower to converge. Never of the batch.
        kernel: takes the matrices, what to start from and the iterations, and gives what they come to, or None.

    Returns:
        Like `matrix`.

    Xiong et al. 2021, arXiv 2102.03902, after Razavi et al. 2014. Time O(iterations * landmarks^3).
    """
    largest = matrix.sum(dim=-2, keepdim=True).amax(dim=-1 if scale_per_matrix else (1, -1), keepdim=True)
    inverse = matrix.transpose(-1, -2) / largest
    found = None if kernel is None else kernel(matrix, inverse, iterations)
    if found is not None:
        return found
    inverse = inverse.flatten(0, 1)
    shape, matrix = matrix.shape, matrix.flatten(0, 1)
    for _ in range(iterations):
        # Multiplied out, so that every step is one product with a sum in it.
        product = torch.bmm(matrix, inverse)
        inner = torch.baddbmm(product, product, product, beta=7, alpha=-1)
        inner = torch.baddbmm(product, product, inner, beta=15, alpha=-1)
        inverse = torch.baddbmm(inverse, inverse, inner, beta=3.25, alpha=-0.25)
    return inverse.view(shape)


class _Kernels(NamedTuple):
    """The parts of the product in full precision, 0 at padding; scores need no more scaling.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        row, column: query and key landmarks `[batch, heads, landmarks, head_dim]`, both scaled.
        valid: `[batch, 1, 1, length]` bool, or None.
        inverse: `[batch, heads, landmarks, landmarks]`.
        landmarks: where they come from.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor | None
    inverse: Tensor
    landmarks: Landmarks


def _check_options(num_landmarks: int, pinv_iterations: int | None) -> None:
    if num_landmarks < 1:
        raise ValueError(f"num_landmarks = {num_landmarks}: give 1 or more.")
    if pinv_iterations is not None and pinv_iterations < 1:
        raise ValueError(f"pinv_iterations = {pinv_iterations}: give 1 or more, or None to solve exactly.")


def _check_segments(
    segments: Landmarks | None, query: Tensor, key_padding_mask: Tensor | None, num_landmarks: int
) -> None:
    """Raises `ValueError` for segments of other inputs, as far as shapes tell; in a graph they are not known."""
    if segments is None or torch.compiler.is_compiling():
        return
    is_padded = key_padding_mask is not None
    facts = [
        ("length", segments.segment.shape[1], query.shape[2]),
        ("num_landmarks", segments.sizes.shape[1], num_landmarks),
        ("examples with padding of their own", segments.segment.shape[0], query.shape[0] if is_padded else 1),
    ]
    if is_padded:
        # With a mask there may always be segments without a token.
        facts.append(("padding", segments.filled is not None, True))
    check_prepared(
        "segments were",
        facts,
        "they are for inputs of one length and padding. Give what segment_landmarks makes of this call's arguments, "
        "or no segments.",
    )


def _kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    scale: float | None,
    num_landmarks: int,
    pinv_iterations: int | None,
    scale_per_matrix: bool,
    overwrite: bool = False,
    segments: Landmarks | None = None,
) -> _Kernels:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # An inverse multiplies rounding errors: half precision is too little for any part of the product.
    dtype = torch.promote_types(query.dtype, torch.float32 if pinv_iterations is not None else torch.float64)
    query, key, value = (zero_padding(x, key_padding_mask, overwrite).to(dtype) for x in (query, key, value))
    landmarks = segment_landmarks(key, key_padding_mask, num_landmarks) if segments is None else segments
    row, means = landmarks.means(query) * scale, landmarks.means(key)
    square = _square(row, means, landmarks)
    if pinv_iterations is None:
        inverse = torch.linalg.pinv(square)
    else:
        inverse = iterative_pinv(square, pinv_iterations, scale_per_matrix)
    valid = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    return _Kernels(query, key, value, row, means * scale, valid, inverse, landmarks)


def _square(row: Tensor, means: Tensor, landmarks: Landmarks) -> Tensor:
    """What is to be inverted, `[batch, heads, landmarks, landmarks]`, of scaled query and of key landmarks."""
    square = masked_softmax(torch.matmul(row, means.transpose(-1, -2)), landmarks.filled)
    if landmarks.exact is not None:
        # Where nothing is inverted the identity is, which keeps every gradient finite.
        square = torch.where(landmarks.exact, torch.eye(row.shape[2], dtype=row.dtype, device=row.device), square)
    return square


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    *,
    scale: float | None,
    dropout_p: float,
    num_landmarks: int,
    pinv_iterations: int | None,
    scale_per_matrix: bool,
    segments: Landmarks | None = None,
) -> Tensor | None:
    """The iterated form in kernels of a GPU, in full precision but for what they read; None where there are none."""
    kernels, take_means = feature_kernels(query, key, value), fused("segment_means", query)
    if kernels is None or take_means is None or pinv_iterations is None:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"root": 1.0, "dropout_p": dropout_p, "precise": True}
    landmarks = segment_landmarks(key, key_padding_mask, num_landmarks) if segments is None else segments
    row, means = (take_means(x, landmarks.segment, landmarks.sizes) for x in (query, key))
    if row is None or means is None:
        return None
    row = row * scale
    found = kernels.sums(key, value, row, key_padding_mask, half_norm=False, **options)
    if found is None:
        return None
    sums, ones, _ = found
    iterate = fused("pinv_iterations", query)
    inverse = iterative_pinv(_square(row, means, landmarks), pinv_iterations, scale_per_matrix, iterate)
    # No key at all is no number to divide by.
    mixed = torch.matmul(inverse, sums / torch.where(ones > 0, ones, 1.0)[..., None])
    bias = None
    if landmarks.exact is not None:
        mixed = torch.where(landmarks.exact, take_means(value, landmarks.segment, landmarks.sizes), mixed)
        bias = torch.zeros_like(ones).masked_fill(~landmarks.filled[:, :, 0], -torch.inf)
    return kernels.mix(query, means * scale, mixed, torch.ones_like(ones), bias, key_padding_mask, **options)


def _mix(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout_p: float) -> Tensor:
    """`softmax(query key^T) value`, finite but otherwise unspecified where nothing is `allowed`."""
    bias = None if allowed is None else masked_bias(allowed, query.dtype)
    if dropout_p == 0.0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    # With dropout torch's own kernels keep the whole matrix, several times over.
    if query.device.type == "cpu" and dropout_p < 1.0 and not torch.compiler.is_compiling():
        return cpu_dropout_attention(query, key, value, bias, dropout_p)
    scores = torch.matmul(query, key.transpose(-1, -2))
    probs = (scores if bias is None else scores + bias).softmax(dim=-1)
    return torch.matmul(F.dropout(probs, dropout_p), value)


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    num_landmarks: int,
    pinv_iterations: int | None,
    scale_per_matrix: bool,
    overwrite: bool = False,
    segments: Landmarks | None = None,
) -> Tensor:
    """`F A^+ (B value)` with `F = softmax(query k^T)`, `A = softmax(q k^T)` and `B = softmax(q key^T)`.

    The landmarks q and k are the means of query and key over `num_landmarks` segments of each example's valid tokens,
    `floor(rank * num_landmarks / count)` being the segment of a token. An example with no more tokens than landmarks
    has a landmark a token, and gets softmax attention itself. The product is softmax attention also where queries and
    keys are constant within segments and A is inverted exactly; elsewhere it approximates it, and its rows sum to 1
    only as nearly as A is inverted.

    Args:
        query, key, value: `[batch, heads, length, head_dim]`.
        key_padding_mask: `[batch, length]` bool, True = attend.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        dropout_p: dropout of the entries of F and, independently, of B.
        num_landmarks: 1 or more, 64 as published.
        pinv_iterations: steps towards the inverse of A, 6 as published; None for `torch.linalg.pinv`, with everything
            in float64. That is exact, and multiplies the rounding of its inputs by the condition number of A.
        scale_per_matrix: see `iterative_pinv`.
        overwrite: without a graph, let the result take the memory of `query`, and set what is padding in `key` and
            `value` to 0 where it stands.
        segments: what `segment_landmarks` gives for all this, to prepare several layers at once.

    Returns:
        As `query`, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, landmarks or iterations below 1, segments whose shapes are those of other
            inputs.

    Xiong et al. 2021, arXiv 2102.03902. There is no causal form: every landmark is a mean over the whole text.
    Time O(length * landmarks + iterations * landmarks^3), memory O(length) without dropout, O(length * landmarks) with.
    """
    check_qkv(query, key, value, key_padding_mask)
    _check_options(num_landmarks, pinv_iterations)
    _check_segments(segments, query, key_padding_mask, num_landmarks)
    if dense_is_on() and query.shape[2] <= num_landmarks:
        # No example has more tokens than landmarks.
        return padded_attention(query, key, value, key_padding_mask, scale=scale, dropout_p=dropout_p)
    options = {
        "scale": scale,
        "num_landmarks": num_landmarks,
        "pinv_iterations": pinv_iterations,
        "scale_per_matrix": scale_per_matrix,
        "segments": segments,
    }
    # Autocast would take the inverse in half precision.
    with without_autocast(query.device):
        mixed = _fused(query, key, value, key_padding_mask, dropout_p=dropout_p, **options)
        if mixed is not None:
            return mixed
        x = _kernels(query, key, value, key_padding_mask, overwrite=overwrite, **options)
        mixed = torch.matmul(x.inverse, _mix(x.row, x.key, x.value, x.valid, dropout_p))
        if x.landmarks.exact is not None:
            mixed = torch.where(x.landmarks.exact, x.landmarks.means(x.value), mixed)
        # With dropout all at once, so that a pass that is computed again for its gradients drops the same.
        if overwrite and dropout_p == 0.0:
            for rows in x.query.split(TOKENS_AT_ONCE, dim=2):
                rows.copy_(_mix(rows, x.column, mixed, x.landmarks.filled, dropout_p))
            mixed = x.query
        else:
            mixed = _mix(x.query, x.column, mixed, x.landmarks.filled, dropout_p)
        return zero_padding(mixed.to(query.dtype), key_padding_mask, overwrite)


def dense_nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    num_landmarks: int,
    pinv_iterations: int | None,
    scale_per_matrix: bool,
) -> tuple[Tensor, Tensor]:
    """`nystrom_attention` with the whole matrix `F A^+ B` in memory; arguments and errors as there.

    Returns:
        The result `[batch, heads, length, head_dim]` and the weights before dropout `[batch, heads, length, length]`,
        both in `query.dtype`. Weights may be negative, and a row sums to 1 only as nearly as A is inverted.

    Xiong et al. 2021, arXiv 2102.03902. Time O(length^2 * landmarks), memory O(length^2).
    """
    check_qkv(query, key, value, key_padding_mask)
    _check_options(num_landmarks, pinv_iterations)
    with without_autocast(query.device):
        x = _kernels(
            query,
            key,
            value,
            key_padding_mask,
            scale=scale,
            num_landmarks=num_landmarks,
            pinv_iterations=pinv_iterations,
            scale_per_matrix=scale_per_matrix,
        )
        columns = masked_softmax(torch.matmul(x.query, x.column.transpose(-1, -2)), x.landmarks.filled)
        rows = masked_softmax(torch.matmul(x.row, x.key.transpose(-1, -2)), x.valid)
        spread, dropped = torch.matmul(x.inverse, rows), torch.matmul(x.inverse, F.dropout(rows, dropout_p))
        if x.landmarks.exact is not None:
            average = x.landmarks.average[:, None]
            spread, dropped = (torch.where(x.landmarks.exact, average, y) for y in (spread, dropped))
        mixed = torch.matmul(F.dropout(columns, dropout_p), torch.matmul(dropped, x.value))
        weights = zero_padding(torch.matmul(columns, spread).to(query.dtype), key_padding_mask)
        return zero_padding(mixed.to(query.dtype), key_padding_mask), weights
