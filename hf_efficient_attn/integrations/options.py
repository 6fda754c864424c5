"""Options of mechanisms inside other models: one field of the model's config, a dictionary by mechanism."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..attention.longformer import check_window
from ..attention.neighborhood import NeighborhoodOptions


FIELD = "efficient_attention"
"""The config's field: `{"nystrom": {"num_landmarks": 64}}`. It is saved and loaded with the config."""


@dataclass(kw_only=True)
class SlidingWindowOptions:
    """Options of a sliding window.

    Args:
        attention_window: total width of the window, `attention_window // 2` keys on each side, in decoders backwards
            only; even; one number, or one a layer.
        attention_dilation: distance of neighbouring keys in a window.
        num_global_tokens: tokens at the start of each example that are attended by everything and, in encoders,
            attend everything. 1 is the classification token.
    """

    attention_window: int | list[int] = 512
    attention_dilation: int = 1
    num_global_tokens: int = 0

    def check_options(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        for window in self.attention_window if isinstance(self.attention_window, list) else [self.attention_window]:
            check_window(window)
        if self.attention_dilation < 1:
            raise ValueError(f"attention_dilation = {self.attention_dilation}: it must be 1 (no gaps) or more.")
        if self.num_global_tokens < 0:
            raise ValueError(f"num_global_tokens = {self.num_global_tokens}: it must be 0 or more.")

    def window_of(self, layer: int) -> int:
        """Total window width of `layer`; raises `ValueError` where there is none for it."""
        if not isinstance(self.attention_window, list):
            return self.attention_window
        if layer >= len(self.attention_window):
            raise ValueError(
                f"attention_window has {len(self.attention_window)} entries and none for layer {layer}; give one "
                "number or one entry a layer."
            )
        return self.attention_window[layer]


@dataclass(kw_only=True)
class NeighborhoodInsideOptions(NeighborhoodOptions):
    """Options of neighborhood attention inside an image model.

    Args:
        radius: see `NeighborhoodOptions`.
        grid: rows and columns of patches; None takes those of the config's `image_size` and `patch_size`. What comes
            before them (a class token, registers) attends everything and is attended by everything. An image of
            another number of patches raises; one of another shape and the same number (64 x 16 pixels for 32 x 32)
            cannot be told apart and needs the option.
    """

    grid: list[int] | tuple[int, int] | None = None

    def check_options(self) -> None:
        """See `NeighborhoodOptions.check_options`."""
        super().check_options()
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid = {self.grid!r}: give rows and columns of patches, both 1 or more.")


def pick_name(name: str, known: Iterable[str], what: str) -> str:
    """`name`, if it is one of `known`; else raises `ValueError` that says `what` there is none of, and what is near."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what} {name!r}: choose one of {', '.join(known)}.{hint}")


def make_options(name: str, row: Any, given: Mapping[str, Any]) -> Any:
    """An instance of the row's `options_class`; raises `ValueError` for what is no option, or breaks a rule."""
    for option in given:
        if option not in row.known:
            pick_name(option, row.known, f"{name!r} has no option")
    options = row.options_class(**{**row.defaults, **row.without, **given})
    row.check(options)
    return options


def options_of(config: Any, name: str, table: Mapping[str, Any]) -> Any:
    """The options that `config` has for the mechanism `name` of the `table`, its defaults where there are none."""
    given = getattr(config, FIELD, None) or {}
    for other in given:
        if other not in table:
            pick_name(
                other, table, f"config.{FIELD} is a dictionary of options by mechanism, and there is no mechanism"
            )
    return make_options(name, table[name], given.get(name) or {})
