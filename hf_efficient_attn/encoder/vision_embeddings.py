"""Images as patches: their embeddings, positions for a grid of any size, and the tokens in front of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..cpu import without_autocast
from .layer import dropped
from .vision_configuration import EffVisionConfig


# Keys' convolution kernel (1981), with the parameter that torch.nn.functional.interpolate has.
_SHARPNESS = -0.75


def bicubic_weights(count: int, source: int, first: Tensor, size: Tensor) -> Tensor:
    """How much of each of `source` places goes into each of `count`: `[examples, count, source]` in float32.

    Places `first` to `first + size - 1` of an example, both `[examples]`, span the source from edge to edge; at equal
    sizes each is one place of the source, exactly. The weights of `torch.nn.functional.interpolate` along one axis
    (`mode="bicubic"`, `align_corners=False`).
    """
    place = torch.arange(count, device=size.device)[None, :] - first[:, None]
    where = (place.float() + 0.5) * (source / size.clamp(min=1).float())[:, None] - 0.5
    # Places outside the span belong to padding; wherever they point to, they must be finite.
    below = where.floor()
    rest = where - below
    columns = torch.arange(source, device=size.device)
    weights = torch.zeros(1, device=size.device)
    for step in (-1, 0, 1, 2):
        hit = (below + step).clamp(0, source - 1)[:, :, None] == columns
        weights = weights + torch.where(hit, _bicubic((rest - step).abs())[:, :, None], 0.0)
    return weights


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel at distances of 0 to 2."""
    near = ((_SHARPNESS + 2) * distance - (_SHARPNESS + 3)) * distance * distance + 1
    far = ((_SHARPNESS * distance - 5 * _SHARPNESS) * distance + 8 * _SHARPNESS) * distance - 4 * _SHARPNESS
    return torch.where(distance <= 1, near, far)


def interpolate_positions(table: Tensor, grid: tuple[int, int], patch_mask: Tensor | None) -> Tensor:
    """A table of positions for another grid: `[rows, columns, hidden]` -> `[batch or 1, rows * columns, hidden]`.

    `patch_mask` is bool `[batch, *grid]` or None; the table is spread over each example's own rows and columns, from
    its first one to its last one. In float32 at least, also under autocast.
    """
    weights = []
    for axis, count in enumerate(grid):
        if patch_mask is None:
            first, size = (torch.full((1,), value, device=table.device) for value in (0, count))
        else:
            used = patch_mask.any(dim=2 - axis).long()
            first = used.argmax(dim=1)
            size = count - used.flip(1).argmax(dim=1) - first
        weights.append(bicubic_weights(count, table.shape[axis], first, size))
    by_row, by_column = weights
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    # Columns first: what is broadcast then are the rows of the table, whose number a compiler knows.
    with without_autocast(table.device):
        columns = torch.matmul(by_column.to(wide.dtype)[:, None], wide)
        found = torch.matmul(by_row.to(wide.dtype), columns.flatten(2)).contiguous()
    # By strides, because a compiler does not know that what is split here divides.
    patches, width = grid[0] * grid[1], table.shape[2]
    found = found.as_strided((found.shape[0], patches, width), (patches * width, width, 1))
    return found.to(table.dtype)


class PatchEmbeddings(nn.Module):
    """A strided convolution: one vector for each patch."""

    def __init__(self, config: EffVisionConfig) -> None:
        super().__init__()
        shape = config.patch_shape
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=shape, stride=shape)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[batch, channels, height, width]`, whole patches -> `[batch, patches, hidden]`, row by row."""
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class VisionEmbeddings(nn.Module):
    """Patches with their positions, behind the class token and the registers. Parameter names of ViT.

    Dosovitskiy et al. 2020, arXiv 2010.11929; registers: Darcet et al. 2023, arXiv 2309.16588.
    """

    def __init__(self, config: EffVisionConfig, use_mask_token: bool) -> None:
        super().__init__()
        self.native_grid = config.native_grid
        self.patch_shape = config.patch_shape
        self.uneven_size = config.uneven_size
        self.num_channels = config.num_channels
        rows, columns = self.native_grid
        class_tokens = int(config.use_cls_token)
        self.cls_token = _tokens(class_tokens, config)
        self.mask_token = _tokens(int(use_mask_token), config)
        self.patch_embeddings = PatchEmbeddings(config)
        self.position_embeddings = _tokens(class_tokens + rows * columns, config)
        self.register_tokens = _tokens(config.num_register_tokens, config)
        self.dropout = nn.Dropout(float(config.hidden_dropout_prob))

    def reset_(self, std: float) -> None:
        """Initial values, where none were loaded."""
        for tokens in (self.cls_token, self.position_embeddings, self.register_tokens):
            if tokens is not None:
                init.trunc_normal_(tokens, mean=0.0, std=std)
        if self.mask_token is not None:
            init.zeros_(self.mask_token)

    def whole_patches(self, pixel_values: Tensor) -> Tensor:
        """`[batch, channels, height, width]` with zeros at the right and bottom, so that every pixel is in a patch.

        Raises:
            ValueError: another shape or number of channels; an uneven size that is to be refused.
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must be [batch, {self.num_channels}, height, width], got shape "
                f"{list(pixel_values.shape)}; num_channels = {self.num_channels} in the config, and images of "
                "different size are padded to one (DataCollatorWithPatchMask)."
            )
        if not torch.compiler.is_compiling() and 0 in pixel_values.shape:
            raise ValueError(f"the input is empty, pixel_values have shape {list(pixel_values.shape)}.")
        missing = [-size % step for size, step in zip(pixel_values.shape[2:], self.patch_shape, strict=True)]
        if self.uneven_size == "refuse":
            if torch.compiler.is_compiling():
                torch._check(missing[0] == 0)
                torch._check(missing[1] == 0)
            elif any(missing):
                raise ValueError(
                    f"an image of {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels has no whole patches of "
                    f"{self.patch_shape[0]} x {self.patch_shape[1]}, and uneven_size = 'refuse'; resize it, or set "
                    "config.uneven_size = 'pad' before the model is built."
                )
            return pixel_values
        if torch.compiler.is_compiling():
            # A size is no number to look at then: room for one more patch, which takes zeros if any.
            missing = [step - 1 for step in self.patch_shape]
        return F.pad(pixel_values, (0, missing[1], 0, missing[0])) if any(missing) else pixel_values

    def own_pixels(self, pixel_values: Tensor, grid: tuple[int, int], patch_mask: Tensor) -> Tensor:
        """`pixel_values` with 0 outside the patches `patch_mask`: not even inf or NaN there may reach a gradient."""
        pixels = patch_mask
        for dim, (size, step, count) in enumerate(zip(pixel_values.shape[2:], self.patch_shape, grid, strict=True), 1):
            patch = (torch.arange(size, device=patch_mask.device) // step).clamp(max=count - 1)
            pixels = pixels.index_select(dim, patch)
        return pixel_values.masked_fill(~pixels[:, None], 0.0)

    def positions(self, grid: tuple[int, int], patch_mask: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Of the class token, `[1, 1, hidden]` or None, and of patches, `[batch or 1, patches, hidden]`."""
        first = 0 if self.cls_token is None else 1
        of_class = self.position_embeddings[:, :first] if first else None
        table = self.position_embeddings[:, first:]
        # Equal sizes need no looking, except where a size may be any.
        if not torch.compiler.is_compiling() and patch_mask is None and tuple(grid) == tuple(self.native_grid):
            return of_class, table
        return of_class, interpolate_positions(table[0].unflatten(0, self.native_grid), grid, patch_mask)

    def forward(
        self, pixel_values: Tensor, grid: tuple[int, int], patch_mask: Tensor | None, bool_masked_pos: Tensor | None
    ) -> Tensor:
        """Whole patches `[batch, channels, height, width]` -> `[batch, prefix + patches, hidden]`.

        Args:
            grid: rows and columns of patches.
            patch_mask: bool `[batch, *grid]` or None; patches outside count for nothing, whatever their pixels are.
            bool_masked_pos: bool `[batch, patches]` or None; patches that the mask token stands for.
        """
        batch = pixel_values.shape[0]
        if patch_mask is not None:
            pixel_values = self.own_pixels(pixel_values, grid, patch_mask)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.projection.weight.dtype))
        if bool_masked_pos is not None:
            patches = torch.where(bool_masked_pos[:, :, None], self.mask_token.to(patches.dtype), patches)
        of_class, positions = self.positions(grid, patch_mask)
        parts = [patches + positions]
        if self.register_tokens is not None:
            parts.insert(0, self.register_tokens.expand(batch, -1, -1))
        if self.cls_token is not None:
            parts.insert(0, (self.cls_token + of_class).expand(batch, -1, -1))
        embedded = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return dropped(self.dropout, embedded)


def _tokens(count: int, config: EffVisionConfig) -> nn.Parameter | None:
    """Learned tokens `[1, count, hidden]`, or None for none."""
    return nn.Parameter(torch.zeros(1, count, config.hidden_size)) if count > 0 else None
