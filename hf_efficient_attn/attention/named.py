"""The table of mechanisms, and one chosen by its name, for frames that are not about one of them."""

import difflib
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .base import SelfAttention
from .big_bird import BigBirdSelfAttention
from .local import LocalSelfAttention
from .longformer import LongformerSelfAttention
from .lsh import LSHSelfAttention
from .neighborhood import NeighborhoodSelfAttention
from .nystromformer import NystromformerSelfAttention
from .performer import PerformerSelfAttention
from .softmax import SoftmaxSelfAttention


ATTENTIONS: dict[str, type[SelfAttention]] = {
    "big_bird": BigBirdSelfAttention,
    "local": LocalSelfAttention,
    "longformer": LongformerSelfAttention,
    "lsh": LSHSelfAttention,
    "neighborhood": NeighborhoodSelfAttention,
    "nystromformer": NystromformerSelfAttention,
    "performer": PerformerSelfAttention,
    "softmax": SoftmaxSelfAttention,
}
"""Name -> class; adding a mechanism is adding a row."""


@dataclass(kw_only=True)
class NamedAttentionOptions:
    """The choice of a mechanism.

    Args:
        attention: a row of `ATTENTIONS`; `"softmax"` is exact.
        attention_options: options of that mechanism by name, its defaults where absent.
    """

    has_grid: ClassVar[bool] = False
    """Whether the tokens stand in rows and columns, as patches of an image do."""

    attention: str = "softmax"
    attention_options: dict[str, Any] | None = None

    def check_attention(self) -> None:
        """Raises `ValueError` for a name or an option that there is not, or one that breaks its mechanism's rule."""
        mechanism = attention_class_of(self)
        if "grid" in mechanism.wants and not self.has_grid:
            raise ValueError(
                f"attention = {self.attention!r} needs tokens in rows and columns, and a text has none; choose "
                "'longformer' for a window over a text, or an image model (EffViTConfig)."
            )
        mechanism.check(attention_options_of(self), self)


def attention_class_of(config: Any) -> type[SelfAttention]:
    """The class that `config.attention` names; raises `ValueError` for another name."""
    if config.attention not in ATTENTIONS:
        near = difflib.get_close_matches(config.attention, ATTENTIONS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"attention = {config.attention!r}: choose one of {', '.join(ATTENTIONS)}.{hint}")
    return ATTENTIONS[config.attention]


def attention_options_of(config: Any) -> Any:
    """An instance of the mechanism's `options_class`, None if it has none; raises `ValueError` for unknown options."""
    kind, given = attention_class_of(config).options_class, config.attention_options or {}
    known = [] if kind is None else [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            has = f"it has {', '.join(known)}" if known else "it has none"
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"attention_options has {name!r}, no option of {config.attention!r}: {has}.{hint}")
    return None if kind is None else kind(**given)


def named_attention(config: Any, layer_idx: int) -> SelfAttention:
    """The module of a layer, as `config.attention` and `config.attention_options` say."""
    return attention_class_of(config)(config, layer_idx, attention_options_of(config))
