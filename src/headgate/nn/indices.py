"""Which of a network's outputs are wanted: the argument ``indices`` of ``forward_maps`` and its like."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["choose_indices"]


def choose_indices(name: str, indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Name some of ``count`` outputs, in rising order.

    Args:
        name: the argument's name in messages.
        indices: positions, counted from the end where they are negative; or n for the last n; ``None`` for all.
        count: how many there are.

    Returns:
        Positions in [0, count).

    Raises:
        ValueError: an output that does not exist, one twice, or none.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"{name} must be at least 1 and at most the {count} outputs there are, got {indices}")
        return list(range(count - indices, count))
    chosen = sorted(index + count if index < 0 else index for index in indices)
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"{name} must name different ones of {count} outputs, got {list(indices)}")
    return chosen
