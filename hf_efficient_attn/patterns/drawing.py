"""Pictures of attention patterns."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..extras import require_extras
from .pattern import AttentionPattern


FORMATS = (".png", ".svg", ".pdf")

# Kind -> red, green, blue. Kinds that several mechanisms have look the same in all.
COLOURS = {
    "attended": (59, 111, 182),
    "window": (59, 111, 182),
    "own chunk": (59, 111, 182),
    "neighbouring chunk": (156, 187, 222),
    "global": (224, 138, 30),
    "random": (58, 154, 91),
    "same bucket": (122, 79, 163),
    "another bucket, next in the order": (203, 180, 224),
}
_PADDING = (226, 226, 226)

_PANEL = 3.0  # inches
_COLUMNS = 4


def check_picture(path: str | Path) -> Path:
    """`path` as a `Path`; raises `ValueError` where no picture can be written there, or matplotlib is missing."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path}: the end of the name says what kind of picture it is; choose one of {', '.join(FORMATS)}."
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}.")
    require_extras("matplotlib")
    return path


def draw_pattern(pattern: AttentionPattern, path: str | Path, *, dpi: int = 100, title: str | None = None) -> Path:
    """Draw a pattern, queries from top to bottom and keys from left to right, and save it.

    Heads stand side by side, those that are equal in one panel. Pairs have the colour of their kind, and where several
    pairs share a point the mean; global tokens are never thinner than a point. Weights have a scale that is even around
    0 where there are negative ones; it ends where 99.5 % of them do.

    Args:
        pattern: what `attention_pattern` returned.
        path: file, whose suffix says what is written: `.png`, `.svg` or `.pdf`.
        dpi: points an inch; a panel is three inches wide.
        title: in place of the pattern's own.

    Returns:
        The path. The same pattern gives the same file.

    Raises:
        ValueError: another suffix, a folder that is not there, or matplotlib is not installed.
    """
    path = check_picture(path)
    # Not through pyplot: that would choose a backend for the whole program.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = equal_heads(pattern.matrix)
    columns = min(_COLUMNS, len(groups))
    rows = -(-len(groups) // columns)
    # Room for the title, which is as wide as it is.
    figure = Figure(figsize=(max(_PANEL * columns + 0.4, 5.0), _PANEL * rows + 0.95), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    points = max(32, round(0.8 * _PANEL * dpi))  # the rest is for numbers and names
    scale = None if pattern.kinds else _scale(pattern)
    for axis, heads in zip(axes, groups, strict=False):
        image = _draw(axis, pattern, heads[0], points, scale)
        axis.set_title(_named(heads, len(pattern.matrix)), fontsize="small")
    for axis in axes[len(groups) :]:
        axis.set_visible(False)
    for row in range(rows):
        axes[row * columns].set_ylabel("query")
    if scale is None:
        _add_legend(figure, pattern)
    else:
        ends = "both" if scale[0] < 0 else "max"
        figure.colorbar(image, ax=list(axes), shrink=0.8, extend=ends, label="weight")
    figure.suptitle(pattern.title if title is None else title, fontsize="small", wrap=True)
    # Nothing in the file that depends on when and where it was written.
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix.lower()]
    with rc_context({"svg.hashsalt": "pattern"}):
        figure.savefig(path, dpi=dpi, metadata=undated)
    return path


def equal_heads(matrix: Tensor) -> list[list[int]]:
    """Heads of `[heads, tokens, tokens]` in groups of equal ones, in order."""
    groups: list[list[int]] = []
    for head in range(len(matrix)):
        group = next((group for group in groups if torch.equal(matrix[group[0]], matrix[head])), None)
        if group is None:
            groups.append([head])
        else:
            group.append(head)
    return groups


def _named(heads: list[int], count: int) -> str:
    if len(heads) == count:
        return "" if count == 1 else f"all {count} heads"
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"


def _draw(axis: Any, pattern: AttentionPattern, head: int, points: int, scale: tuple[float, float] | None) -> Any:
    """One head of the pattern, at about so many `points`; returns matplotlib's image."""
    matrix, tokens = pattern.matrix[head], pattern.matrix.shape[1]
    step = max(1, round(tokens / points))
    # Cells that are larger than a point have sharp edges, smaller ones are mixed.
    how = "nearest" if -(-tokens // step) <= points else "antialiased"
    where = {"extent": (-0.5, tokens - 0.5, tokens - 0.5, -0.5), "interpolation": how}
    axis.set_xlabel("key")
    axis.spines[:].set(color="lightgrey", linewidth=0.5)  # global tokens stand at the edge
    if scale is None:
        return axis.imshow(kind_image(matrix, pattern.kinds, pattern.keep, step).numpy(), **where)
    colours = "RdBu_r" if scale[0] < 0 else "magma_r"
    return axis.imshow(_means(matrix, step).numpy(), cmap=colours, vmin=scale[0], vmax=scale[1], **where)


def kind_image(kinds: Tensor, names: tuple[str, ...], keep: Tensor, step: int) -> Tensor:
    """`kinds` int8 `[tokens, tokens]` as colours uint8 `[points, points, 3]`, a point for `step` x `step` pairs."""
    size = -(-len(kinds) // step)
    image = torch.full((size, size, 3), 255.0)
    for number, name in enumerate(names, start=1):
        share = _means((kinds == number).float(), step)
        colour = torch.tensor(COLOURS.get(name, COLOURS["attended"]), dtype=torch.float32)
        if name == "global":
            image = torch.where(share[:, :, None] > 0, colour, image)
        else:
            image += share[:, :, None] * (colour - 255.0)
    if not bool(keep.all()):
        outside = _means((~(keep[:, None] & keep)).float(), step)
        image += outside[:, :, None] * (torch.tensor(_PADDING) - 255.0)
    return image.clamp(0, 255).round().to(torch.uint8)


def _means(matrix: Tensor, step: int) -> Tensor:
    """Means of `[tokens, tokens]` over squares of `step` x `step`, smaller ones at the end."""
    if step == 1:
        return matrix
    pool = torch.nn.functional.avg_pool2d
    return pool(matrix[None, None], step, ceil_mode=True, count_include_pad=False)[0, 0]


def _scale(pattern: AttentionPattern) -> tuple[float, float]:
    """Lowest and highest weight of the colours."""
    some = pattern.matrix.flatten()[:: max(1, pattern.matrix.numel() // 2**20)]
    top = float(some.abs().quantile(0.995)) or float(pattern.matrix.abs().max()) or 1.0
    return (-top if bool((some < 0).any()) else 0.0), top


def _add_legend(figure: Any, pattern: AttentionPattern) -> None:
    from matplotlib.patches import Patch

    kinds = enumerate(pattern.kinds, start=1)
    shown = [name for number, name in kinds if any(bool((head == number).any()) for head in pattern.matrix)]
    patches = [Patch(color=[x / 255 for x in COLOURS.get(name, COLOURS["attended"])], label=name) for name in shown]
    if not bool(pattern.keep.all()):
        patches.append(Patch(color=[x / 255 for x in _PADDING], label="padding"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small", frameon=False)
