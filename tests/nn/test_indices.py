"""Choosing some of a network's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from headgate.nn.indices import choose_indices


@pytest.mark.parametrize(
    ("indices", "chosen"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([3, 0], [0, 3]), ((-1, 1), [1, 3]), (4, [0, 1, 2, 3])]
)
def test_outputs_are_named_in_rising_order(indices: int | Sequence[int] | None, chosen: list[int]) -> None:
    assert choose_indices("indices", indices, 4) == chosen


@pytest.mark.parametrize("indices", [0, 5, -1])
def test_a_number_must_lie_between_one_and_all(indices: int) -> None:
    with pytest.raises(ValueError, match=f"out_indices must be at least 1 and at most the 4 outputs.*got {indices}"):
        choose_indices("out_indices", indices, 4)


@pytest.mark.parametrize("indices", [[], [4], [-5], [1, 1], [3, -1]])
def test_positions_must_exist_and_differ(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="indices must name different ones of 4 outputs"):
        choose_indices("indices", indices, 4)
