r"""Attention by relative position on a grid of patches: a softmax that is the product of one over rows and one over columns.

A head's score of the offset δ from query to key is (d'Ascoli et al., arXiv 2103.10697, equations 4 to 6)

.. math:: s(\delta) = w_x\,\delta_x + w_y\,\delta_y + w_d\,(\delta_x^2 + \delta_y^2) + b
          = [w_x\,\delta_x + w_d\,\delta_x^2 + b] + [w_y\,\delta_y + w_d\,\delta_y^2]

so :math:`P = \mathrm{softmax}(s)` over all N = R · C keys is the product of a softmax over the C columns and one over the R
rows. Two small matrices per head stand for N × N weights, and averaging values with P costs N · (R + C) products a channel
in place of N². The bias b cancels; it is there because published weights have it.

With :math:`w = \alpha\,(2\Delta_x, 2\Delta_y, -1)` the score is :math:`-\alpha\,\|\delta - \Delta\|^2` up to a constant: the head
attends at the offset Δ, the more narrowly the larger α (Cordonnier et al., arXiv 1911.03584, theorem 1).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_positive

__all__ = ["average_by_position", "axis_attention", "grid_attention", "offsets_of_heads", "relative_coordinates"]

Grid = tuple[int, int]


def relative_coordinates(
    grid_size: Grid, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "tokens tokens 3"]:
    """Offsets between the patches of a grid in raster order.

    Args:
        grid_size: rows and columns.
        device: of the result.
        dtype: of the result, floating; default PyTorch's.

    Returns:
        ``(tokens, tokens, 3)``: for query i and key j the columns from i to j, the rows from i to j, and the squared
        distance.

    Raises:
        ValueError: an empty grid.
    """
    rows, columns = grid_size
    check_positive(rows=rows, columns=columns)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    y = _offsets(rows, device, dtype)[:, None, :, None].expand(rows, columns, rows, columns)
    x = _offsets(columns, device, dtype)[None, :, None, :].expand(rows, columns, rows, columns)
    return torch.stack([x, y, x**2 + y**2], dim=-1).flatten(2, 3).flatten(0, 1)


def axis_attention(
    weight: Float[Tensor, "heads 3"], bias: Float[Tensor, " heads"], grid_size: Grid
) -> tuple[Float[Tensor, "heads rows rows"], Float[Tensor, "heads columns columns"]]:
    """The two factors of every head's positional attention, in at least float32.

    Args:
        weight: w_x, w_y and w_d of every head.
        bias: b of every head.
        grid_size: rows and columns.

    Returns:
        From row to row and from column to column; each row of both sums to one.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)  # scores reach -2α(S - 1)²
    w_x, w_y, w_d = weight.to(dtype)[:, :, None, None].unbind(dim=1)
    y, x = (_offsets(side, weight.device, dtype) for side in grid_size)
    by_row = w_y * y + w_d * y**2
    by_column = w_x * x + w_d * x**2 + bias.to(dtype)[:, None, None]
    return by_row.softmax(dim=-1), by_column.softmax(dim=-1)


def grid_attention(
    by_row: Float[Tensor, "heads rows rows"], by_column: Float[Tensor, "heads columns columns"]
) -> Float[Tensor, "heads tokens tokens"]:
    """All N × N weights P of every head, from the factors."""
    product = by_row[:, :, None, :, None] * by_column[:, None, :, None, :]
    return product.flatten(3, 4).flatten(1, 2)


def average_by_position(
    by_row: Float[Tensor, "heads rows rows"],
    by_column: Float[Tensor, "heads columns columns"],
    v: Float[Tensor, "batch heads tokens head_dim"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """P v, from the factors: first from row to row, then from column to column."""
    batch, heads, _, dim = v.shape
    rows, columns = by_row.shape[-1], by_column.shape[-1]
    # One matrix product per head for the whole batch, since the weights are the same for all of it.
    along_rows = by_row @ v.permute(1, 2, 0, 3).reshape(heads, rows, columns * batch * dim)
    along_both = by_column[:, None] @ along_rows.view(heads, rows, columns, batch * dim)
    return along_both.view(heads, rows * columns, batch, dim).permute(2, 0, 1, 3)


def offsets_of_heads(num_heads: int) -> Float[Tensor, "taps 2"]:
    """The offsets Δ of a k × k filter, k = ⌊√num_heads⌋, around its centre, in the order of the heads.

    For even k they are halves: a head straddles patches.

    Args:
        num_heads: heads, at least 1.

    Returns:
        ``(k², 2)``: columns and rows from query to key. Head h1 + k · h2 looks h2 columns and h1 rows from the corner.

    Raises:
        ValueError: ``num_heads`` is not positive.
    """
    check_positive(num_heads=num_heads)
    side = math.isqrt(num_heads)
    taps = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    column, row = torch.meshgrid(taps, taps, indexing="ij")
    return torch.stack([column.flatten(), row.flatten()], dim=1)


def _offsets(side: int, device: torch.device | str | None, dtype: torch.dtype) -> Float[Tensor, "side side"]:
    """Key minus query along one axis."""
    place = torch.arange(side, device=device, dtype=dtype)
    return place - place[:, None]
