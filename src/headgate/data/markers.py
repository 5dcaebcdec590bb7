"""The two-way marker grid: three questions about every cell of a picture, each of which needs another kind of memory.

A few cells of a grid hold a marker of one of two types, F or B, with a value. Every cell is asked for

- the value of the last F marker **before** it in raster order: a memory that runs forwards;
- the value of the next B marker **after** it: a memory that runs backwards;
- the symbol of the cell directly **above** it: a look at the grid, or a memory of exactly one row.

A network whose layers cannot tell before from after fails at the first two, one that knows the sequence but not the grid
at the third.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor

from headgate.data.recall import IGNORED
from headgate.data.seeding import stream_generator
from headgate.validate import check_integer, check_positive, check_probability, check_shape

__all__ = ["MarkerGrids", "marker_distances", "marker_grids", "marker_targets"]


class MarkerGrids(NamedTuple):
    """Grids of symbols with three targets per cell, all int64 ``(count, rows, columns)``.

    Attributes:
        symbols: 0 for an empty cell, 1 … V for an F marker of the values 0 … V - 1, V + 1 … 2V for a B marker.
        last_f: value in [0, V) of the last F marker before the cell in raster order; ``-100`` where there is none.
        next_b: value in [0, V) of the next B marker after the cell; ``-100`` where there is none.
        above: symbol in [1, 2V] of the cell above; ``-100`` where that is empty, and in the first row.
    """

    symbols: Int64[Tensor, "count rows columns"]
    last_f: Int64[Tensor, "count rows columns"]
    next_b: Int64[Tensor, "count rows columns"]
    above: Int64[Tensor, "count rows columns"]


def marker_grids(
    count: int,
    rows: int = 8,
    columns: int = 8,
    num_values: int = 8,
    marker_probability: float = 0.15,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> MarkerGrids:
    """Draw grids whose cells hold, each by itself, a marker of random type and value or nothing.

    With three rows, four columns and eight values, for example (F3 is symbol 4, B6 symbol 15; a dot is an empty cell
    or an ignored target)::

        symbols             last_f              next_b              above
        .   F3  .   B6      .   .   3   3       6   6   6   1       .   .   .   .
        .   .   B1  .       3   3   3   3       1   1   5   5       .   4   .   15
        F0  .   .   B5      3   0   0   0       5   5   5   .       .   .   10  .

    Args:
        count: number of grids.
        rows: cells from top to bottom.
        columns: cells from left to right.
        num_values: V, values of either type of marker.
        marker_probability: of a cell to hold a marker; both types are equally likely.
        seed: of the draws.
        generator: CPU generator to draw from in place of ``seed``.

    Returns:
        The grids, the same on every machine.

    Raises:
        ValueError: a size is not positive, or the probability lies outside [0, 1].
    """
    check_positive(count=count, rows=rows, columns=columns, num_values=num_values)
    check_probability(marker_probability=marker_probability)
    generator = stream_generator(seed, "markers") if generator is None else generator
    shape = (count, rows, columns)
    is_marker = torch.rand(shape, generator=generator, dtype=torch.float64) < marker_probability
    symbols = 1 + torch.randint(2 * num_values, shape, generator=generator)
    return marker_targets(torch.where(is_marker, symbols, 0), num_values)


def marker_targets(symbols: Int64[Tensor, "count rows columns"], num_values: int = 8) -> MarkerGrids:
    """Work out the targets of given grids.

    Args:
        symbols: ``(count, rows, columns)`` in [0, 2V].
        num_values: V.

    Returns:
        ``symbols`` with their targets.

    Raises:
        TypeError: ``symbols`` holds no integers.
        ValueError: wrong rank, or a symbol outside [0, 2V].
    """
    is_f, is_b = _markers(symbols, num_values)
    line = symbols.long().flatten(1)

    def values(places: Tensor, first: int) -> Tensor:
        found = line.gather(1, places.clamp_min(0)) - first
        return torch.where(places >= 0, found, IGNORED).view_as(symbols)

    grid = symbols.long()
    above = torch.full_like(grid, IGNORED)
    above[:, 1:] = torch.where(grid[:, :-1] > 0, grid[:, :-1], IGNORED)
    return MarkerGrids(grid, values(_last_before(is_f), 1), values(_next_after(is_b), 1 + num_values), above)


def marker_distances(
    symbols: Int64[Tensor, "count rows columns"], num_values: int = 8
) -> tuple[Int64[Tensor, "count rows columns"], Int64[Tensor, "count rows columns"]]:
    """How many cells back the last F marker stands, and how many ahead the next B marker; 0 where there is none.

    Args:
        symbols: as for :func:`marker_targets`.
        num_values: V.

    Returns:
        Two int64 tensors ``(count, rows, columns)``: of ``last_f`` and of ``next_b``.

    Raises:
        TypeError: ``symbols`` holds no integers.
        ValueError: wrong rank, or a symbol outside [0, 2V].
    """
    is_f, is_b = _markers(symbols, num_values)
    here = torch.arange(is_f.shape[1], device=symbols.device)
    last, after = _last_before(is_f), _next_after(is_b)
    back, ahead = torch.where(last >= 0, here - last, 0), torch.where(after >= 0, after - here, 0)
    return back.view_as(symbols), ahead.view_as(symbols)


def _markers(symbols: Tensor, num_values: int) -> tuple[Bool[Tensor, "count cells"], Bool[Tensor, "count cells"]]:
    """Where an F and where a B marker stands, in raster order; checks the symbols."""
    check_positive(num_values=num_values)
    check_shape("symbols", symbols, (None, None, None), "count, rows, columns")
    check_integer("symbols", symbols)
    if symbols.numel() and not 0 <= int(symbols.min()) <= int(symbols.max()) <= 2 * num_values:
        raise ValueError(
            f"symbols must lie in [0, {2 * num_values}] for num_values={num_values}, "
            f"got {int(symbols.min())} to {int(symbols.max())}"
        )
    line = symbols.flatten(1)
    return (line > 0) & (line <= num_values), line > num_values


def _last_before(marked: Bool[Tensor, "count cells"]) -> Int64[Tensor, "count cells"]:
    """The last marked place strictly before each place; -1 where there is none."""
    here = torch.arange(marked.shape[1], device=marked.device)
    latest = torch.where(marked, here, -1).cummax(dim=1).values
    return F.pad(latest, (1, 0), value=-1)[:, :-1]


def _next_after(marked: Bool[Tensor, "count cells"]) -> Int64[Tensor, "count cells"]:
    """The next marked place strictly after each place; -1 where there is none."""
    mirrored = _last_before(marked.flip(1)).flip(1)
    return torch.where(mirrored >= 0, marked.shape[1] - 1 - mirrored, -1)
