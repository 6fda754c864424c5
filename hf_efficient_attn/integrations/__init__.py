"""The package's attention inside transformers' models, as names for `attn_implementation`: `"eff:nystrom"` and others.

Only names are registered here, as soon as transformers has the tables for them; what they name is imported when it is
first called. So this costs nothing where it is not used.
"""

from collections.abc import Callable
from typing import Any

from ..auto import after_import
from .names import MECHANISM_NAMES, PREFIX


def register_attention() -> None:
    """Register every name with transformers' attention and mask functions, now or when those are imported.

    Idempotent.
    """
    after_import("transformers.masking_utils", "AttentionMaskInterface", _register_masks)
    after_import("transformers.modeling_utils", "AttentionInterface", _register_functions)


def _register_masks(interface: Any) -> None:
    for name in MECHANISM_NAMES:
        interface.register(PREFIX + name, _padding_mask)


def _register_functions(interface: Any) -> None:
    for name in MECHANISM_NAMES:
        interface.register(PREFIX + name, _attention_function(name))


def _padding_mask(*args: Any, **kwargs: Any) -> Any:
    """See `inside.padding_mask`."""
    from .inside import padding_mask

    return padding_mask(*args, **kwargs)


def _attention_function(name: str) -> Callable[..., Any]:
    def attention(*args: Any, **kwargs: Any) -> Any:
        """See `inside.attend_inside`."""
        from .inside import attend_inside

        return attend_inside(name, *args, **kwargs)

    return attention
