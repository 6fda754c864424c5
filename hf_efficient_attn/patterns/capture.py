"""What a layer's mechanism is given when a model reads an input, without computing what comes after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attention import SelfAttention
from ..modes import eval_mode


class Given(NamedTuple):
    """What one mechanism is called with.

    Args:
        attention: the mechanism.
        states: `[1, tokens, hidden]`.
        keep: bool `[1, tokens]`, True at an example's own tokens; None for all.
        context: what the model prepared for all layers.
        packing: of images with a mask, the order in which the mechanism gets the tokens; None where it is the input's.
    """

    attention: SelfAttention
    states: Tensor
    keep: Tensor | None
    context: dict[str, Any]
    packing: Any


class _Reached(Exception):
    """Ends a forward pass at the layer that is looked at."""


def attentions_of(model: PreTrainedModel) -> list[SelfAttention]:
    """The mechanism of each layer; raises `ValueError` for a model that is none of a family's."""
    encoder = getattr(getattr(model, "base_model", None), "encoder", None)
    if not hasattr(encoder, "attentions"):
        raise ValueError(
            f"{type(model).__name__} is no model of one family of this package; give such a one, or its config. Of an "
            "EffElectraForJointPreTraining that is its .discriminator or .generator."
        )
    return encoder.attentions()


@torch.no_grad()
def layer_input(model: PreTrainedModel, layer: int, inputs: Mapping[str, Tensor]) -> Given:
    """What the mechanism of `layer` is given when `model` reads `inputs`, its forward's arguments, in eval mode.

    The model is as it was afterwards.

    Raises:
        ValueError: a layer that is not there, packed rows, more than one example, or what the model's forward raises.
    """
    base, attentions = model.base_model, attentions_of(model)
    if not 0 <= layer < len(attentions):
        raise ValueError(f"layer = {layer}: the model has the layers 0 to {len(attentions) - 1}.")
    if inputs.get("document_ids") is not None:
        raise ValueError("document_ids: give one document, without them; each is attended like a text of its own.")
    attention, seen = attentions[layer], {}

    def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["call"] = (args, kwargs)
        raise _Reached

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["packing"] = kwargs.get("packing")

    # What stands around the mechanism may put the tokens into another order for it.
    around = next(module for module in base.modules() if attention in module.children())
    hooks = [around.register_forward_pre_hook(remember, with_kwargs=True)]
    hooks.append(attention.register_forward_pre_hook(reach, with_kwargs=True))
    quietly = {"output_attentions": False, "output_hidden_states": False}
    if getattr(model.config, "is_decoder", False):
        quietly["use_cache"] = False
    try:
        with eval_mode(model):
            base(**inputs, **quietly)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    (states, keep), context = seen["call"]
    if states.shape[0] != 1:
        raise ValueError(f"the inputs hold {states.shape[0]} examples; give one.")
    return Given(attention, states, keep, context, seen["packing"])


def random_inputs(model: PreTrainedModel, length: int, seed: int, num_global: int = 0) -> dict[str, Tensor]:
    """A text of `length` random tokens, or an image of as many patches in the most nearly square grid.

    Args:
        model: what is to read it.
        length: 1 or more.
        seed: the input is a pure function of it, the length and the config.
        num_global: so many tokens at the beginning are marked as global.

    Raises:
        ValueError: global tokens for images, or more than there are tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    config, device = model.config, model.device
    if not hasattr(config, "vocab_size"):
        if num_global:
            raise ValueError("global tokens are for texts: in images they are the class token and the registers.")
        rows = next(rows for rows in range(int(length**0.5), 0, -1) if length % rows == 0)
        size = [count * step for count, step in zip((rows, length // rows), config.patch_shape, strict=True)]
        return {"pixel_values": torch.randn(1, config.num_channels, *size, generator=generator).to(device, model.dtype)}
    if not 0 <= num_global <= length:
        raise ValueError(f"global tokens: {num_global} of {length} tokens; give 0 to {length}.")
    # A special token may be padding, or the end of a question.
    known = torch.ones(config.vocab_size, dtype=torch.bool)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
        ids = getattr(config, name, None)
        for token in [] if ids is None else ids if isinstance(ids, list) else [ids]:
            known[token : token + 1] = False
    words = known.nonzero()[:, 0]
    if len(words) == 0:
        raise ValueError(
            f"vocab_size = {config.vocab_size} has special tokens alone; give inputs={{'input_ids': ...}}."
        )
    found = {"input_ids": words[torch.randint(len(words), (1, length), generator=generator)].to(device)}
    if num_global:
        found["global_attention_mask"] = (torch.arange(length, device=device) < num_global).long()[None]
    return found
