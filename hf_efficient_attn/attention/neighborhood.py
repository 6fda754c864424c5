"""Neighborhood attention: a window in rows and columns of patches, and global tokens in front of them."""

from dataclasses import dataclass

from torch import Tensor

from ..functional import dense_attention, grid_window_allowed, grid_window_attention
from .base import SelfAttention


@dataclass(kw_only=True)
class NeighborhoodOptions:
    """Options of neighborhood attention.

    Args:
        radius: rows and columns of patches that a patch sees on each side; one number, or one for rows and one for
            columns. 7 are windows of 15 x 15 patches.
    """

    radius: int | list[int] | tuple[int, int] = 7

    def check_options(self) -> None:
        """Raises `ValueError` for a value that breaks a rule."""
        values = list(self.radius) if isinstance(self.radius, list | tuple) else [self.radius] * 2
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in values)
        if len(values) != 2 or not whole or min(values) < 0:
            raise ValueError(
                f"radius = {self.radius!r}: give one whole number, or one for rows and one for columns, of 0 or more."
            )


class NeighborhoodSelfAttention(SelfAttention):
    """A patch attends those near it in rows and columns, and the global tokens; these attend everything.

    The window ends at the edges of the grid (Ramachandran et al. 2019, arXiv 1906.05909); published neighborhood
    attention (Hassani et al. 2022, arXiv 2204.07143) shifts it inwards there instead. The global tokens (class token
    and registers) share the softmax and the projections with the patches.
    """

    options_class = NeighborhoodOptions
    wants = ("grid",)

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
        grid: tuple[int, int] | None = None,
        num_global: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """See `SelfAttention.attend`; `grid` and `num_global` as in `grid_window_attention`.

        Raises:
            ValueError: no grid.
        """
        if grid is None:
            raise ValueError(
                "neighborhood attention needs grid = (rows, columns) of the tokens; for a text use 'longformer'."
            )
        radius = self.options.radius if isinstance(self.options.radius, int) else tuple(self.options.radius)
        shape = {"grid": grid, "radius": radius, "num_global": num_global}
        if backend == "eager":
            allowed = grid_window_allowed(query.shape[2], key_padding_mask, query.device, **shape)
            mixed, weights = dense_attention(query, key, value, allowed, dropout_p=dropout_p)
            return self.merge(mixed), weights
        mixed = grid_window_attention(query, key, value, key_padding_mask, dropout_p=dropout_p, **shape)
        return self.merge(mixed), None
