"""Tables of positions for more or fewer tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F


POSITIONS = ("tile", "interpolate", "init")


def resize_table(table: Tensor, rows: int, *, how: str, reserved: int = 0, std: float = 0.02, seed: int = 0) -> Tensor:
    """A table of positions for `rows` tokens: a copy of `[reserved + old rows, width]` -> `[reserved + rows, width]`.

    Args:
        table: the source's; its first `reserved` rows belong to no position (RoBERTa) and stay as they are.
        rows: positions wanted; fewer than there are cut the table off.
        how: what more positions get: `"tile"` repeats the table, which keeps distances right but at the seams
            (Beltagy, Peters & Cohan 2020, arXiv 2004.05150, section 5); `"interpolate"` spreads it, which moves every
            position; `"init"` keeps the old rows and draws new ones.
        std: standard deviation of drawn rows.
        seed: of their generator; torch's global one is not touched.

    Raises:
        ValueError: another name for `how`.
    """
    check_positions_option(how)
    front, old = table[:reserved], table[reserved:]
    if rows <= len(old):
        body = old[:rows]
    elif how == "tile":
        body = old.repeat(-(-rows // len(old)), 1)[:rows]
    elif how == "interpolate":
        spread = F.interpolate(old.float().T[None], size=rows, mode="linear", align_corners=True)
        body = spread[0].T.to(table.dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        drawn = std * torch.randn(rows - len(old), table.shape[1], generator=generator)
        body = torch.cat([old, drawn.to(table)])
    return torch.cat([front, body]).clone()


def check_positions_option(how: str) -> None:
    """Raises `ValueError` for a name that is none of `POSITIONS`."""
    if how not in POSITIONS:
        raise ValueError(f"positions = {how!r}: choose one of {', '.join(POSITIONS)}.")
