"""The table of mechanisms that work on the queries, keys and values of other models' attention modules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.big_bird import BigBirdOptions
from ..attention.lsh import LSHOptions, bucket_factors, unit_keys
from ..attention.nystromformer import NystromformerOptions
from ..attention.performer import PerformerOptions
from ..functional import (
    all_are_short,
    big_bird_attention,
    count_blocks,
    count_text_blocks,
    dense_attention,
    gather_tokens,
    grid_window_attention,
    hash_buckets,
    hash_rotations,
    hashed_attention,
    nystrom_attention,
    performer_attention,
    pick_random_blocks,
    random_draws,
    replace_tokens,
    select_tokens,
    sliding_window_attention,
    softmax_attention,
    valid_counts,
    zero_padding,
)
from .grids import grid_of
from .layers import layer_of, projection_of
from .options import NeighborhoodInsideOptions, SlidingWindowOptions


class Call(NamedTuple):
    """What an attention module hands over, in the terms of this package.

    Args:
        module: the attention module.
        query: `[batch, heads, queries, head_dim]`; with a cache the last of the keys' tokens.
        key, value: `[batch, heads, length, head_dim]`, as many heads as `query`.
        key_padding_mask: `[batch, length]` bool, or None.
        causal: no token attends a later one.
        scale: factor of the scores, None for `head_dim ** -0.5`.
        dropout_p: dropout of the probabilities.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    key_padding_mask: Tensor | None
    causal: bool
    scale: float | None
    dropout_p: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of a formula by position."""
        return self.query, self.key, self.value, self.key_padding_mask

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that every formula has by name."""
        return {"scale": self.scale, "dropout_p": self.dropout_p}


@dataclass(frozen=True)
class Mechanism:
    """One row of `MECHANISMS`.

    Args:
        attend: the formula's result `[batch, heads, queries, head_dim]` for a call and its options.
        options_class: dataclass of options.
        check: what checks them.
        without: fields that mean nothing here, with the values they get.
        defaults: other defaults than the class has.
        why_not_causal: None where there is a causal form, else the reason why not.
        known: names of the options, which follow from the others.
    """

    attend: Callable[[Call, Any], Tensor]
    options_class: type
    check: Callable[[Any], None]
    without: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    why_not_causal: str | None = None
    known: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Here once, because a graph cannot ask a dataclass for its fields.
        known = tuple(x.name for x in fields(self.options_class) if x.name not in self.without)
        object.__setattr__(self, "known", known)


def own_window(call: Call, radius: int) -> Tensor:
    """A window that the model itself has: `radius` keys on each side, backwards only in the causal form."""
    return sliding_window_attention(*call.tensors, radius=radius, causal=call.causal, **call.shared)


def _sliding_window(call: Call, options: SlidingWindowOptions) -> Tensor:
    window = {"radius": options.window_of(layer_of(call.module)) // 2, "dilation": options.attention_dilation}
    if options.num_global_tokens == 0:
        return sliding_window_attention(*call.tensors, causal=call.causal, **window, **call.shared)
    batch, length = call.query.shape[0], call.key.shape[2]
    valid = call.key_padding_mask
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=call.key.device)
    slots = select_tokens(valid & (valid.long().cumsum(dim=1) <= options.num_global_tokens), options.num_global_tokens)
    mixed = sliding_window_attention(*call.tensors, causal=call.causal, global_tokens=slots, **window, **call.shared)
    if call.causal:
        return mixed
    query = gather_tokens(call.query, slots.index)
    key, value = (zero_padding(x, call.key_padding_mask) for x in (call.key, call.value))
    rows, _ = dense_attention(query, key, value, valid[:, None, None, :], **call.shared)
    return replace_tokens(mixed, rows, slots)


def _block_sparse(call: Call, options: BigBirdOptions) -> Tensor:
    heads, length = call.query.shape[1:3]
    size, front = options.block_size, options.num_global_tokens
    text_blocks = count_text_blocks(call.key_padding_mask, length, size, front, call.query.device)
    rows = count_blocks(torch.sym_max(1, length - front), size)
    shape = (heads, rows, options.num_random_blocks)
    draws = random_draws(options.random_seed, layer_of(call.module), *shape, device=call.query.device)
    return big_bird_attention(
        *call.tensors,
        block_size=size,
        random_blocks=pick_random_blocks(draws, text_blocks, ends_are_global=options.global_ends),
        num_global=front,
        global_ends=options.global_ends,
        **call.shared,
    )


def _nystrom(call: Call, options: NystromformerOptions) -> Tensor:
    return nystrom_attention(
        *call.tensors,
        num_landmarks=options.num_landmarks,
        pinv_iterations=options.pinv_iterations,
        scale_per_matrix=options.inv_coeff_init_option,
        **call.shared,
    )


def _performer(call: Call, options: PerformerOptions) -> Tensor:
    # With a cache, sums over its keys are taken anew, since keys and values are all that other models keep.
    head_dim = call.query.shape[3]
    projection = projection_of(
        layer_of(call.module),
        options.features_of(head_dim),
        head_dim,
        orthogonal=options.orthogonal,
        seed=options.projection_seed,
        device=call.query.device,
    )
    options = {"projection": projection, "kernel": options.kernel, "exact_below": options.exact_below}
    options["causal"] = call.causal
    return performer_attention(*call.tensors, **options, **call.shared)


def _lsh(call: Call, options: LSHOptions) -> Tensor:
    length, device = call.query.shape[2], call.query.device
    if all_are_short(length, options.exact_below):
        return softmax_attention(*call.tensors, **call.shared)  # nothing is looked for by hashes
    longest = getattr(call.module.config, "max_position_embeddings", None) or 2**16
    factors, sizes = bucket_factors(
        options, valid_counts(call.key_padding_mask, length, device), length, max(longest, 2**16)
    )
    rotations = hash_rotations(
        options.hash_seed,
        layer_of(call.module),
        0,
        heads=call.query.shape[1],
        head_dim=call.query.shape[3],
        rounds=options.num_hashes,
        directions=sum(size // 2 for size in sizes),
        device=device,
    )
    return hashed_attention(
        *call.tensors,
        query_buckets=hash_buckets(unit_keys(call.query), rotations, factors, sizes),
        key_buckets=hash_buckets(unit_keys(call.key), rotations, factors, sizes),
        chunk_length=options.lsh_attn_chunk_length,
        chunks_before=options.lsh_num_chunks_before,
        chunks_after=options.lsh_num_chunks_after,
        exact_below=options.exact_below,
        **call.shared,
    )


def _neighborhood(call: Call, options: NeighborhoodInsideOptions) -> Tensor:
    grid, front = grid_of(options, call.module, call.query.shape[2])
    radius = options.radius if isinstance(options.radius, int) else tuple(options.radius)
    return grid_window_attention(*call.tensors, grid=grid, num_global=front, radius=radius, **call.shared)


MECHANISMS: dict[str, Mechanism] = {
    "block_sparse": Mechanism(
        _block_sparse,
        BigBirdOptions,
        BigBirdOptions.check_options,
        without={"attention_type": "block_sparse"},
        why_not_causal="its first block attends everything and its random blocks lie on both sides",
    ),
    "lsh": Mechanism(
        _lsh,
        LSHOptions,
        lambda options: options.check_lsh_options(False),
        without={"chunk_rule": "released"},
        defaults={"lsh_num_chunks_after": 1},
        why_not_causal="which keys stand near a query depends on all tokens, later ones too",
    ),
    "neighborhood": Mechanism(
        _neighborhood,
        NeighborhoodInsideOptions,
        NeighborhoodInsideOptions.check_options,
        why_not_causal="it is for images",
    ),
    "nystrom": Mechanism(
        _nystrom,
        NystromformerOptions,
        NystromformerOptions.check_options,
        without={"conv_kernel_size": None},
        why_not_causal="its landmarks are means over the whole text",
    ),
    "performer": Mechanism(_performer, PerformerOptions, PerformerOptions.check_options),
    "sliding_window": Mechanism(_sliding_window, SlidingWindowOptions, SlidingWindowOptions.check_options),
}
"""Name -> row; `names.MECHANISM_NAMES` has the same names, for whoever must not import this."""
