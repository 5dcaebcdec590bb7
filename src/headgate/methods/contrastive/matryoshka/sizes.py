"""The nesting set M = {m_1 < … < m_G = d}: which prefixes of an embedding are trained (paper, Section 3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from numbers import Integral

__all__ = ["check_dims", "check_weights", "nested_dims"]


def nested_dims(dim: int, smallest: int = 8) -> tuple[int, ...]:
    """The paper's log-spaced nesting set: ``dim`` halved again and again while it stays at least ``smallest``.

    ``nested_dims(2048)`` is ``(8, 16, …, 2048)`` and ``nested_dims(768)`` is ``(12, 24, …, 768)``.

    Args:
        dim: the full size d.
        smallest: the least size wanted, in [1, dim].

    Returns:
        The sizes in increasing order; the last one is ``dim``.

    Raises:
        ValueError: ``smallest`` is below 1 or above ``dim``.
    """
    if not 1 <= smallest <= dim:
        raise ValueError(f"smallest must lie in [1, dim], got smallest={smallest}, dim={dim}")
    sizes = [dim]
    while sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return tuple(reversed(sizes))


def check_dims(dims: Sequence[int], name: str = "dims") -> tuple[int, ...]:
    """Check a nesting set and hand it on as a tuple.

    Args:
        dims: positive integers, strictly increasing, at least one.
        name: the argument's name in the message.

    Raises:
        TypeError: no sequence of integers.
        ValueError: empty, below 1, or not strictly increasing.
    """
    if isinstance(dims, str) or not isinstance(dims, Sequence):
        raise TypeError(f"{name} must be a sequence of integers, got {type(dims).__name__}")
    if any(isinstance(size, bool) or not isinstance(size, Integral) for size in dims):
        raise TypeError(f"{name} must hold integers, got {list(dims)}")
    if not dims:
        raise ValueError(f"{name} must hold at least one size, got none")
    if min(dims) < 1:
        raise ValueError(f"{name} must be at least 1, got {list(dims)}")
    if any(low >= high for low, high in itertools.pairwise(dims)):
        raise ValueError(f"{name} must be strictly increasing, got {list(dims)}")
    return tuple(int(size) for size in dims)


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Check the relative weights c_m of the sizes and hand them on as a tuple; ``None`` stands for all 1.

    Raises:
        ValueError: not ``count`` of them, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return (1.0,) * count
    values = tuple(float(weight) for weight in weights)
    if len(values) != count:
        raise ValueError(f"weights must hold one value for each of the {count} dims, got {len(values)}")
    if not all(0 <= value < float("inf") for value in values):
        raise ValueError(f"weights must be finite and not negative, got {list(values)}")
    if not any(values):
        raise ValueError(f"weights must not all be zero, got {list(values)}")
    return values
