"""BigBird: blocks with a window, global and random blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional import (
    BigBirdPlan,
    big_bird_attention,
    blocks_in_reach,
    count_blocks,
    count_text_blocks,
    dense_big_bird_attention,
    pick_random_blocks,
    plan_big_bird,
    random_draws,
)
from .base import SelfAttention


ATTENTION_TYPES = ("block_sparse", "original_full")


@dataclass(kw_only=True)
class BigBirdOptions:
    """Options of BigBird attention; defaults of the published base model (internal form, ITC).

    The extended form (ETC) of the paper's base model is `block_size=84, num_random_blocks=0, num_global_tokens=256,
    global_ends=False`.

    Args:
        attention_type: `"block_sparse"`, or `"original_full"` for full softmax attention.
        block_size: tokens of a block.
        num_random_blocks: random blocks that each block attends.
        random_seed: random blocks are a pure function of it, the layer, the head and an example's number of blocks.
        num_global_tokens: tokens at the start of each example that attend everything and are attended by everything;
            in the text models of this package learned ones, added in front of the text.
        global_ends: the first and the last block of each example do so too.
    """

    attention_type: str = "block_sparse"
    block_size: int = 64
    num_random_blocks: int = 3
    random_seed: int = 0
    num_global_tokens: int = 0
    global_ends: bool = True

    def check_options(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        if self.attention_type not in ATTENTION_TYPES:
            raise ValueError(f"attention_type = {self.attention_type!r}: choose one of {', '.join(ATTENTION_TYPES)}.")
        if self.block_size < 1:
            raise ValueError(f"block_size = {self.block_size}: a block has 1 token or more.")
        for name in ("num_random_blocks", "num_global_tokens", "random_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be 0 or more.")
        if self.attention_type == "original_full" and self.num_global_tokens > 0:
            raise ValueError(
                f"num_global_tokens = {self.num_global_tokens} with attention_type = 'original_full': every token is "
                "global there already; set num_global_tokens = 0, or attention_type = 'block_sparse'."
            )


class BigBirdSelfAttention(SelfAttention):
    """BigBird self-attention (Zaheer et al. 2020, arXiv 2007.14062).

    A block attends itself, its two neighbours, random blocks, and the global ones: the first and last block of the text
    (ITC), or global tokens in front of it (ETC). All rules go by an example's own tokens. There is no causal form: the
    paper's decoder has full attention.
    """

    options_class = BigBirdOptions

    @property
    def pattern(self) -> dict[str, int | bool]:
        """The options that are no random blocks, as the formulas take them."""
        options = self.options
        shape = {"num_global": options.num_global_tokens, "global_ends": options.global_ends}
        return {"block_size": options.block_size, **shape}

    @classmethod
    def are_alike(cls, layers: Sequence[nn.Module]) -> bool:
        """See `SelfAttention.are_alike`: block sparse besides, and numbered from 0 on."""
        return super().are_alike(layers) and all(
            layer.options.attention_type == "block_sparse" and layer.layer_idx == number
            for number, layer in enumerate(layers)
        )

    def random_blocks(self, text_blocks: Tensor, rows: int, layers: int = 1) -> Tensor:
        """This layer's random blocks for examples of `text_blocks` `[batch]` blocks, at most `rows`.

        Returns:
            `[batch, layers * heads, rows, count]`, as `pick_random_blocks` gives them: those of as many layers from
            this one on, which must have its options and heads.
        """
        options = self.options
        count = options.num_random_blocks
        if not torch.compiler.is_compiling():
            # No row of a short text has more blocks left to draw.
            count = min(count, max(0, rows - blocks_in_reach(options.global_ends)))
        shape = (self.num_attention_heads, rows, count)
        draws = random_draws(options.random_seed, self.layer_idx, *shape, text_blocks.device, layers)
        return pick_random_blocks(draws, text_blocks, ends_are_global=options.global_ends)

    def plan(self, key_padding_mask: Tensor | None, length: int, device: torch.device, layers: int = 1) -> BigBirdPlan:
        """What blocks attend in inputs of `length` tokens, padded as `key_padding_mask` `[batch, length]` says.

        `layers` as in `random_blocks`.
        """
        size, num_global = self.options.block_size, self.options.num_global_tokens
        rows = count_blocks(torch.sym_max(1, length - num_global), size)
        text_blocks = count_text_blocks(key_padding_mask, length, size, num_global, device)
        blocks = self.random_blocks(text_blocks, rows, layers)
        return plan_big_bird(key_padding_mask, length, random_blocks=blocks, **self.pattern)

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
        block_plans: list[BigBirdPlan] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`; `block_plans` are those of all layers, by their index."""
        if self.options.attention_type == "original_full":
            return self.attend_fully(query, key, value, key_padding_mask, dropout_p, backend)
        if block_plans is None:
            plan = self.plan(key_padding_mask, query.shape[2], query.device)
        else:
            plan = block_plans[self.layer_idx]
        pattern = {"random_blocks": plan.random_blocks, "plan": plan, **self.pattern}
        if backend == "eager":
            mixed, weights = dense_big_bird_attention(
                query, key, value, key_padding_mask, dropout_p=dropout_p, **pattern
            )
            return self.merge(mixed), weights
        mixed = big_bird_attention(query, key, value, key_padding_mask, dropout_p=dropout_p, **pattern)
        return self.merge(mixed), None
