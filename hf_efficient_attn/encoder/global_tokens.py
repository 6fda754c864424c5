"""Which tokens are global: the rules a config names, and the slots they take."""

import torch
from torch import Tensor
from transformers.utils import logging

from .inputs import as_bool_mask


logger = logging.get_logger(__name__)

GLOBAL_ATTENTION_RULES = ("cls", "question", "second_text", "none")


def global_token_mask(
    rule: str | list[int],
    input_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    global_attention_mask: Tensor | None,
    *,
    sep_token_id: int | None,
    max_global_tokens: int,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor | None, int]:
    """Which tokens are global, bool `[batch, length]`, and room for how many an example; None and 0 for none by rule.

    `global_attention_mask` `[batch, length]` overrides the `rule`, which is one of `GLOBAL_ATTENTION_RULES` or a list
    of token ids. Padding is never global. In eager mode there is as much room as the batch needs; while compiling or
    exporting, where that number would be data-dependent, `max_global_tokens`, and more tokens trip an assertion.
    """
    mask = as_bool_mask("global_attention_mask", global_attention_mask, *shape)
    if mask is None:
        if rule == "cls":
            return _first_tokens(key_padding_mask, shape, device), 1
        if rule == "none":
            return None, 0
        if input_ids is None:
            logger.warning_once(
                f"global_attention = {rule!r} reads input_ids, which are not given with inputs_embeds: no token is "
                "global. Pass global_attention_mask to choose them."
            )
            return None, 0
        mask = _token_id_mask(rule, input_ids) if isinstance(rule, list) else _text_mask(rule, input_ids, sep_token_id)
    if key_padding_mask is not None:
        mask = mask & key_padding_mask
    count = mask.sum(dim=1)
    if not torch.compiler.is_compiling():
        return mask, int(count.max())
    torch._assert_async((count <= max_global_tokens).all(), _too_many(max_global_tokens))
    return mask, max_global_tokens


def causal_prefix_mask(
    rule: str,
    key_padding_mask: Tensor | None,
    global_attention_mask: Tensor | None,
    *,
    past_length: int,
    past_global: Tensor | int,
    max_global_tokens: int,
    shape: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor | None, int]:
    """As `global_token_mask`, for a causal model, in which only the first tokens of an example may be global.

    `key_padding_mask` `[batch, past_length + length]` covers the tokens before the input, `past_global` `[batch]` of
    which are global; `rule` is `"cls"` or `"none"`.

    While compiling there is room for `max_global_tokens` marked ones, for one by the rule `"cls"`, and for none by it
    after a cache, where that would be room for one more at each call: the first call has to reach every first token.

    Raises:
        ValueError: a global token after one that is not.
    """
    batch, length = shape
    by_rule = global_attention_mask is None
    if key_padding_mask is None:
        key_padding_mask = torch.ones(batch, past_length + length, dtype=torch.bool, device=device)
    own = key_padding_mask[:, past_length:]
    mask = as_bool_mask("global_attention_mask", global_attention_mask, *shape)
    if mask is None and rule == "none":
        return None, 0
    mask = _first_tokens(key_padding_mask, shape, device)[:, past_length:] if mask is None else mask & own
    tokens_so_far = key_padding_mask.long().cumsum(dim=1)[:, past_length:]
    global_so_far = mask.long().cumsum(dim=1) + (past_global[:, None] if isinstance(past_global, Tensor) else 0)
    is_prefix = (~mask | (tokens_so_far == global_so_far)).all()
    count = mask.sum(dim=1)
    message = (
        "global_attention_mask in a causal model marks a token after one that it does not mark; mark the first ones."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(is_prefix, message)
        if by_rule and past_length > 0:
            torch._assert_async((count == 0).all(), "the first compiled call must hold each first token")
            return None, 0
        room = 1 if by_rule else max_global_tokens
        torch._assert_async((count <= room).all(), _too_many(room))
        return mask, room
    if not bool(is_prefix):
        raise ValueError(message)
    return mask, int(count.max())


def refuse_global_tokens(global_attention_mask: Tensor | None) -> None:
    """Raises `ValueError` where a causal model that has no global tokens is given some."""
    if global_attention_mask is None:
        return
    none = (global_attention_mask == 0).all()
    message = (
        "global_attention_mask in a causal model: a global token attends later tokens, which must not be seen. Leave "
        "it out, or load with causal_global='prefix' to make the first tokens global."
    )
    if torch.compiler.is_compiling():
        torch._assert_async(none, message)
    elif not bool(none):
        raise ValueError(message)


def _too_many(max_global_tokens: int) -> str:
    return (
        f"an example has more than max_global_tokens = {max_global_tokens} global tokens; raise "
        "config.max_global_tokens before compiling or exporting."
    )


def _first_tokens(key_padding_mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    if key_padding_mask is None:
        key_padding_mask = torch.ones(shape, dtype=torch.bool, device=device)
    return key_padding_mask & (key_padding_mask.long().cumsum(dim=1) == 1)


def _token_id_mask(token_ids: list[int], input_ids: Tensor) -> Tensor:
    wanted = torch.tensor(token_ids, dtype=input_ids.dtype, device=input_ids.device)
    # Not isin, which ONNX has no form of.
    return (input_ids[..., None] == wanted).any(dim=-1)


def _text_mask(rule: str, input_ids: Tensor, sep_token_id: int) -> Tensor:
    """Tokens before the first separator, or after the run of separators there; none where there is no separator."""
    is_separator = input_ids == sep_token_id
    reached = is_separator.long().cumsum(dim=1) > 0
    if rule == "question":
        return ~reached & is_separator.any(dim=1, keepdim=True)
    return (reached & ~is_separator).long().cumsum(dim=1) > 0
