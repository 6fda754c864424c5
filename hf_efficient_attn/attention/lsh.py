"""LSH attention of Reformer: tokens attend those that hashing puts near them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cpu import linear_maps
from ..functional import (
    all_are_short,
    check_exact_below,
    chunk_step,
    hash_buckets,
    hash_rotations,
    powers_of_two,
    table_sizes,
    valid_counts,
)
from .chunks import ChunkSelfAttention, check_chunks


if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .lsh_cache import LSHCacheLayer


# Directions for one factor of the buckets cost half as many products a token.
_MOST_BUCKETS = 2**16


@dataclass(kw_only=True)
class LSHOptions:
    """Options of LSH attention, with the names and defaults of published configs.

    Args:
        lsh_attn_chunk_length: tokens of a chunk.
        lsh_num_chunks_before, lsh_num_chunks_after: neighbouring chunks that a chunk attends besides itself.
        num_hashes: rounds; more come closer to full attention, at as many times the cost.
        num_buckets: an even number, or a list of them whose product counts; None takes about two a chunk, a power of
            two, from each example's own tokens.
        hash_seed: directions of the hash are a pure function of it, the layer, the round and the head.
        chunk_rule: `"released"`, as in the released code: a token attends all of its chunk and of the neighbours, the
            last chunk of a round is also the one before the first of the next (the very last before the very first),
            and what meets in several rounds counts as often. `"paper"`: only tokens of one bucket meet, nothing is
            before the first chunk, and each pair counts once.
        exact_below: tokens of examples of fewer valid ones than this attend all other ones of their example, whatever
            their buckets, and themselves only where there is no other: another function, on a CPU quicker below about
            256 tokens. Each example's own tokens count, not the length of the batch. 0 is never; not in the causal
            form.
    """

    lsh_attn_chunk_length: int = 64
    lsh_num_chunks_before: int = 1
    lsh_num_chunks_after: int = 0
    num_hashes: int = 1
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    hash_seed: int = 0
    chunk_rule: str = "released"
    exact_below: int = 0

    def check_lsh_options(self, causal: bool) -> None:
        """Raises `ValueError` for a value that breaks a rule; `causal` ones have no chunks behind."""
        check_chunks(self, "lsh", causal)
        check_exact_below(self.exact_below, causal)
        if self.num_hashes < 1:
            raise ValueError(f"num_hashes = {self.num_hashes}: give 1 round or more.")
        if self.hash_seed < 0:
            raise ValueError(f"hash_seed = {self.hash_seed}: it must be 0 or more.")
        for count in self.fixed_buckets or ():
            if count < 2 or count % 2 != 0:
                raise ValueError(
                    f"num_buckets = {self.num_buckets}: each direction makes two buckets, so every number must be even "
                    "and positive; None chooses by the length."
                )
            if count > _MOST_BUCKETS:
                raise ValueError(
                    f"num_buckets = {self.num_buckets}: each factor has half as many directions for every token, so "
                    f"none may be above {_MOST_BUCKETS:,}; give several, such as [256, 256]."
                )
        if math.prod(self.fixed_buckets or ()) > 2**31:
            raise ValueError(f"num_buckets = {self.num_buckets}: their product must be at most 2 ** 31.")
        if self.fixed_buckets == ():
            raise ValueError(f"num_buckets = {self.num_buckets}: give a number, a list of factors, or None.")

    @property
    def fixed_buckets(self) -> tuple[int, ...] | None:
        """`num_buckets` as factors, or None."""
        if self.num_buckets is None:
            return None
        return (self.num_buckets,) if isinstance(self.num_buckets, int) else tuple(self.num_buckets)


def bucket_factors(
    options: LSHOptions, counts: Tensor, max_length: int, longest: int
) -> tuple[Tensor, tuple[int, ...]]:
    """Bucket factors `[batch or 1, tables]` for examples of `counts` `[batch]` tokens, and room for each.

    No example here has more than `max_length` tokens, none that there can be more than `longest`.
    """
    fixed = options.fixed_buckets
    if fixed is not None:
        return torch.tensor([fixed], device=counts.device), fixed
    chunk = options.lsh_attn_chunk_length
    limit = 2 * max(int((longest // chunk) ** 0.5), chunk)
    # While compiling the length is not known.
    sizes = table_sizes(longest if torch.compiler.is_compiling() else max_length, chunk, limit)
    return powers_of_two(counts, chunk, limit, len(sizes)), sizes


def unit_keys(query: Tensor) -> Tensor:
    """Queries `[..., head_dim]` as keys: each divided by its root mean square, in `query.dtype`."""
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()).to(query.dtype)


class LSHSelfAttention(ChunkSelfAttention):
    """LSH self-attention (Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451).

    Queries are keys as well, these at unit length. Each round sorts an example's tokens by the bucket of their query
    and by position, and cuts them into chunks, which attend themselves and neighbours; a token attends itself only
    where there is nothing else. Without `num_buckets` their number goes by the tokens of each example; a generation
    keeps the number that its prompt had.
    """

    options_class = LSHOptions
    projections = ("query_key", "value")
    kind, exclude_self = "lsh", True

    def __init__(self, config: Any, layer_idx: int, options: LSHOptions | None = None) -> None:
        super().__init__(config, layer_idx, options)
        self.chunks["exact_below"] = self.options.exact_below
        self.redraws = 0

    def redraw_(self, count: int) -> None:
        """Use the hash directions after `count` redraws; 0 are the first ones."""
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**31:
            raise ValueError(f"count = {count!r}: give the number of redraws so far, from 0 to 2 ** 31 - 1.")
        self.redraws = count

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `SelfAttention.project`."""
        query, value = linear_maps(hidden_states, (self.query_key, self.value))
        query = self.split(query)
        return query, unit_keys(query), self.split(value)

    def factors(self, counts: Tensor, max_length: int) -> tuple[Tensor, tuple[int, ...]]:
        """Bucket factors `[batch or 1, tables]` for examples of `counts` `[batch]` tokens, and room for each.

        No example has more than `max_length` tokens.
        """
        return bucket_factors(self.options, counts, max_length, self._longest())

    def _longest(self) -> int:
        return getattr(self.config, "max_position_embeddings", None) or 2**16

    def buckets(self, query: Tensor, factors: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Buckets `[batch, heads, rounds, length]` of `query` `[batch, heads, length, head_dim]`."""
        rotations = hash_rotations(
            self.options.hash_seed,
            self.layer_idx,
            self.redraws,
            heads=self.num_attention_heads,
            head_dim=self.head_dim,
            rounds=self.options.num_hashes,
            directions=sum(size // 2 for size in sizes),
            device=query.device,
        )
        return hash_buckets(query, rotations, factors, sizes)

    def make_cache_layer(self) -> "LSHCacheLayer":
        """An empty cache of keys, values and buckets."""
        from .lsh_cache import LSHCacheLayer  # loads transformers' caches: not for a config or an encoder

        return LSHCacheLayer()

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        *,
        dropout_p: float,
        backend: str,
        past_key_values: "Cache | None" = None,
        replay: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`.

        `replay` belongs to one call in one layer: empty, it takes the buckets; with them, they are used again, where
        states that were computed again may be rounded differently.
        """
        if past_key_values is not None:
            layer = self._cache_layer(past_key_values)
            if layer.factors is None:
                counts = valid_counts(key_padding_mask, query.shape[2], query.device)
                layer.factors, layer.sizes = self.factors(counts, self._longest())
            buckets = layer.extend_buckets(self.buckets(query, layer.factors, layer.sizes))
            key, value = past_key_values.update(key, value, self.layer_idx)
            if query.shape[2] == 1 and backend != "eager" and dropout_p == 0.0 and not torch.compiler.is_compiling():
                found = layer.candidates(key_padding_mask, **self._step_chunks())
                if found is not None:
                    valid = None if key_padding_mask is None else key_padding_mask[:, -1:]
                    return self.merge(chunk_step(query, key, value, valid, *found)), None
        elif all_are_short(query.shape[2], self.options.exact_below):
            buckets = None  # nothing is looked for by them
        elif replay:
            buckets = replay["buckets"].long()
        else:
            length = query.shape[2]
            factors, sizes = self.factors(valid_counts(key_padding_mask, length, query.device), length)
            buckets = self.buckets(query, factors, sizes)
            if replay is not None:
                # Kept for as long as every layer's, which is all that grows with depth.
                replay["buckets"] = buckets.to(torch.int16 if math.prod(sizes) <= 2**15 else torch.int32)
        return self.attend_chunks(query, key, value, key_padding_mask, buckets, dropout_p=dropout_p, backend=backend)

    def _step_chunks(self) -> dict[str, int | bool]:
        return {name: self.chunks[name] for name in ("chunk_length", "chunks_before", "released")}

    def _cache_layer(self, past_key_values: "Cache") -> "LSHCacheLayer":
        """This layer's cache; raises `ValueError` where it is of another kind."""
        from .lsh_cache import LSHCacheLayer

        layer = self.own_layer(past_key_values)
        if not isinstance(layer, LSHCacheLayer):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__} without buckets for layer {self.layer_idx}; "
                "give what the last call returned, or model.make_cache()."
            )
        return layer


def lsh_layers(model: nn.Module) -> list[LSHSelfAttention]:
    """Every LSH attention in a model, in order."""
    return [module for module in model.modules() if isinstance(module, LSHSelfAttention)]
