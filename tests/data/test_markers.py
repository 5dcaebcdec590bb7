"""The two-way marker grid: targets by hand and by a slow loop, and how grids are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.data.markers import MarkerGrids, marker_distances, marker_grids, marker_targets
from headgate.data.recall import IGNORED

NONE = IGNORED


def f(value: int) -> int:
    """The symbol of an F marker, of eight values."""
    return 1 + value


def b(value: int) -> int:
    return 9 + value


DRAWN = [[[0, f(3), 0, b(6)], [0, 0, b(1), 0], [f(0), 0, 0, b(5)]]]


def test_targets_of_the_drawn_example() -> None:
    grids = marker_targets(torch.tensor(DRAWN))
    assert grids.symbols.tolist() == DRAWN
    assert grids.last_f.tolist() == [[[NONE, NONE, 3, 3], [3, 3, 3, 3], [3, 0, 0, 0]]]
    assert grids.next_b.tolist() == [[[6, 6, 6, 1], [1, 1, 5, 5], [5, 5, 5, NONE]]]
    assert grids.above.tolist() == [[[NONE] * 4, [NONE, f(3), NONE, b(6)], [NONE, NONE, b(1), NONE]]]


def test_distances_of_the_drawn_example() -> None:
    back, ahead = marker_distances(torch.tensor(DRAWN))
    assert back.tolist() == [[[0, 0, 1, 2], [3, 4, 5, 6], [7, 1, 2, 3]]]
    assert ahead.tolist() == [[[3, 2, 1, 3], [2, 1, 5, 4], [3, 2, 1, 0]]]


def test_a_marker_is_neither_before_nor_after_itself() -> None:
    grids = marker_targets(torch.tensor([[[f(2), f(5)], [b(1), b(7)]]]))
    assert grids.last_f.tolist() == [[[NONE, 2], [5, 5]]]
    assert grids.next_b.tolist() == [[[1, 1], [7, NONE]]]
    assert grids.above.tolist() == [[[NONE, NONE], [f(2), f(5)]]]


def test_an_empty_grid_asks_for_nothing() -> None:
    empty = torch.zeros(2, 3, 4, dtype=torch.int64)
    grids = marker_targets(empty)
    for target in grids[1:]:
        assert (target == NONE).all()
    for distance in marker_distances(empty):
        assert not distance.any()


def test_markers_of_one_type_answer_one_question() -> None:
    grids = marker_targets(torch.full((1, 2, 2), 2), num_values=2)
    assert grids.last_f.tolist() == [[[NONE, 1], [1, 1]]]
    assert (grids.next_b == NONE).all()
    grids = marker_targets(torch.full((1, 2, 2), 2), num_values=1)
    assert (grids.last_f == NONE).all()
    assert grids.next_b.tolist() == [[[0, 0], [0, NONE]]]


def by_loop(symbols: torch.Tensor, num_values: int) -> tuple[list[list[int]], ...]:
    """last_f, next_b, above and both distances of one grid, cell by cell."""
    _, columns = symbols.shape
    line = symbols.flatten().tolist()
    found: tuple[list[int], ...] = ([], [], [], [], [])
    for place in range(len(line)):
        before = [at for at in range(place) if 1 <= line[at] <= num_values]
        after = [at for at in range(place + 1, len(line)) if line[at] > num_values]
        over = line[place - columns] if place >= columns else 0
        found[0].append(line[before[-1]] - 1 if before else NONE)
        found[1].append(line[after[0]] - 1 - num_values if after else NONE)
        found[2].append(over or NONE)
        found[3].append(place - before[-1] if before else 0)
        found[4].append(after[0] - place if after else 0)
    return tuple(torch.tensor(entry).view_as(symbols).tolist() for entry in found)


@pytest.mark.parametrize(
    ("rows", "columns", "num_values", "probability"),
    [(8, 8, 8, 0.15), (3, 5, 2, 0.5), (1, 9, 3, 0.3), (6, 1, 1, 0.4), (2, 2, 4, 1.0), (4, 4, 4, 0.0)],
)
def test_targets_are_those_of_a_slow_loop(rows: int, columns: int, num_values: int, probability: float) -> None:
    grids = marker_grids(6, rows, columns, num_values, probability, seed=rows)
    back, ahead = marker_distances(grids.symbols, num_values)
    for grid in range(6):
        expected = by_loop(grids.symbols[grid], num_values)
        got = (grids.last_f, grids.next_b, grids.above, back, ahead)
        assert tuple(entry[grid].tolist() for entry in got) == expected


def test_cells_are_drawn_at_the_stated_rates_and_by_themselves() -> None:
    symbols = marker_grids(4000, 4, 4, 5, 0.3, seed=1).symbols
    counts = torch.bincount(symbols.flatten(), minlength=11).double()
    expected = 64_000 * torch.tensor([0.7] + 10 * [0.03], dtype=torch.float64)
    assert len(counts) == 11
    assert float(((counts - expected) ** 2 / expected).sum()) < 29.6  # 99.9% quantile at 10 degrees of freedom
    filled = (symbols > 0).double().flatten(1)
    correlation = torch.corrcoef(filled.T) - torch.eye(16)
    assert float(correlation.abs().max()) < 5 / 4000**0.5
    assert float((filled.mean(0) - 0.3).abs().max()) < 5 * (0.21 / 4000) ** 0.5


def equal(one: MarkerGrids, other: MarkerGrids) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def test_one_seed_gives_one_draw_and_leaves_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (marker_grids(3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, again)
    assert not torch.equal(first.symbols, other.symbols)
    assert first.symbols.shape == (3, 8, 8)
    assert {target.dtype for target in first} == {torch.int64}


def test_a_generator_takes_the_place_of_the_seed() -> None:
    first = marker_grids(3, generator=torch.Generator().manual_seed(3))
    again = marker_grids(3, generator=torch.Generator().manual_seed(3), seed=99)
    assert equal(first, again)
    assert not torch.equal(first.symbols, marker_grids(3).symbols)


def test_the_draw_is_the_same_on_every_machine() -> None:
    line = marker_grids(1, 2, 6, seed=0, marker_probability=0.5).symbols.flatten().tolist()
    assert line == [8, 0, 9, 0, 15, 0, 0, 0, 9, 7, 5, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be positive"),
        ({"rows": 0}, "rows must be positive"),
        ({"num_values": 0}, "num_values must be positive"),
        ({"marker_probability": 1.5}, r"marker_probability must lie in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_grid_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        marker_grids(**{"count": 1, **options})


def test_symbols_that_do_not_fit_are_refused() -> None:
    for function in (marker_targets, marker_distances):
        with pytest.raises(ValueError, match=r"symbols must lie in \[0, 4\] for num_values=2, got 0 to 5"):
            function(torch.tensor([[[0, 5]]]), 2)
        with pytest.raises(ValueError, match=r"got -1 to 0"):
            function(torch.tensor([[[0, -1]]]), 2)
        with pytest.raises(ValueError, match="symbols must have shape"):
            function(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="symbols must be int64 or int32"):
            function(torch.zeros(1, 2, 3))
