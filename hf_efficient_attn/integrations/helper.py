"""Putting a mechanism of this package into a model of transformers, and taking it out again."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..auto import COMPOSITES, FAMILIES
from .layers import keep_numbers, number_layers
from .mechanisms import MECHANISMS
from .names import PREFIX
from .options import FIELD, make_options, pick_name
from .probe import calling_modules, modules_with_the_interface


Model = TypeVar("Model", bound=PreTrainedModel)


def use_efficient_attention(model: Model, mechanism: str | None, **options: Any) -> Model:
    """Let every attention layer of a transformers model use a mechanism of this package, with the weights it has.

    The options are kept in the model's config, as `efficient_attention`, and are saved with it; transformers saves no
    choice of attention, so load with `attn_implementation="eff:<mechanism>"`. Layers that have a sliding window of
    their own keep it (ModernBERT's local layers).

    At padded places attention gives 0s, not what the model itself has there. No valid token sees them, but a model
    that pools a place by its number, padded or not, gives something else for a padded text: SigLIP's text model pools
    the last one. Give those texts without padding, or as they were trained, with no attention_mask.

    Args:
        model: a model whose attention goes through transformers' interface (BERT, RoBERTa, ELECTRA, DistilBERT,
            ModernBERT, ViT, DINOv2, SigLIP, Llama, Mistral, Qwen and many others).
        mechanism: `"sliding_window"`, `"block_sparse"`, `"nystrom"`, `"performer"`, `"lsh"` or, in image models,
            `"neighborhood"`; decoders have `"sliding_window"` and `"performer"`. None goes back to transformers'
            default and forgets the options.
        options: the mechanism's, its defaults where absent:
            sliding_window: `attention_window`, `attention_dilation`, `num_global_tokens`;
            block_sparse: `block_size`, `num_random_blocks`, `random_seed`, `num_global_tokens`, `global_ends`;
            nystrom: `num_landmarks`, `pinv_iterations`, `inv_coeff_init_option`;
            performer: `num_features`, `kernel`, `orthogonal`, `projection_seed`;
            lsh: `lsh_attn_chunk_length`, `lsh_num_chunks_before`, `lsh_num_chunks_after`, `num_hashes`, `num_buckets`,
            `hash_seed`; queries and keys are hashed by the same directions. It is not Reformer, whose queries are its
            keys;
            neighborhood: `radius`, `grid`, the rows and columns of patches of images that are not of the config's
            `image_size`. Another number of patches raises; the same number in another shape cannot be told apart.

    Returns:
        `model`, changed in place.

    Raises:
        ValueError: a name or an option there is not (with the nearest one), a value that breaks a rule, a model that
            would ignore the choice or cannot follow it. The model is then as before.

    Example:

    ```python
    >>> model = AutoModelForMaskedLM.from_pretrained("bert-base-uncased")
    >>> use_efficient_attention(model, "nystrom", num_landmarks=64)
    ```
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; give a model of transformers, unwrapped.")
    if model.config.model_type in FAMILIES or model.config.model_type in COMPOSITES:
        raise ValueError(
            f"{type(model).__name__} has a mechanism of its own, chosen by its config; this function is for the models "
            "of transformers."
        )
    if mechanism is None:
        if options:
            raise ValueError(f"mechanism = None takes no options, got {', '.join(options)}.")
        _restore(model, {id(config): (config, None) for config in _configs(model)}, None)
        return model
    row = MECHANISMS[pick_name(mechanism, MECHANISMS, "there is no mechanism")]
    make_options(mechanism, row, options)

    configs = _configs(model)
    before = {id(config): (config, copy.deepcopy(getattr(config, FIELD, None))) for config in configs}
    implementation = {id(config): config._attn_implementation for config in configs}
    for config in configs:
        setattr(config, FIELD, {**(getattr(config, FIELD, None) or {}), mechanism: dict(options)})
    try:
        # Inner parts come behind and win, as they do in `layer_of`.
        for part in _parts(model):
            keep_numbers(part, number_layers(part))
        model.set_attn_implementation(PREFIX + mechanism)
        _check_called(model)
    except BaseException:
        _restore(model, before, implementation)
        raise
    return model


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of a model and its parts, each once."""
    return list({id(part.config): part.config for part in _parts(model)}.values())


def _check_called(model: PreTrainedModel) -> None:
    """Raises `ValueError` where the model, or a part of it with a config of its own, would ignore the choice."""
    parts: dict[int, PreTrainedModel] = {}
    for part in _parts(model):
        parts.setdefault(id(part.config), part)  # the outermost
    for part in parts.values():
        ignored = sorted({type(module).__name__ for module in part.modules() if _looks_like_attention(module)})
        if part is not model and not ignored:
            continue  # convolutions and the like
        called = calling_modules(part)
        if called or (called is None and modules_with_the_interface(part)):
            continue
        whole = "" if part is model else f", a part of {type(model).__name__},"
        raise ValueError(
            f"{type(part).__name__}{whole} does not call attention through transformers' interface, so the choice "
            f"would be ignored ({', '.join(ignored) or 'it has no attention layer'}); convert it to a family of this "
            "package, or choose another model."
        )


def _looks_like_attention(module: Any) -> bool:
    return "SelfAttention" in type(module).__name__ or type(module).__name__.endswith("Attention")


def _restore(
    model: PreTrainedModel, options: Mapping[int, tuple[PreTrainedConfig, Any]], implementation: dict[int, str] | None
) -> None:
    """Put options back, and implementations by config; None for the default of transformers."""
    for config, value in options.values():
        if value is not None:
            setattr(config, FIELD, value)
        elif hasattr(config, FIELD):
            delattr(config, FIELD)
    if implementation is None:
        model.set_attn_implementation(None)
    else:
        for config, _ in options.values():
            config._attn_implementation_internal = implementation[id(config)]
