"""Functions of single numbers, lane by lane."""

from __future__ import annotations

from typing import Any

from numba import njit

from headgate.ops.native.vectors import (
    add,
    cast,
    divide,
    exponential,
    item_size,
    minimum,
    multiply,
    multiply_add,
    splat,
    subtract,
)

__all__ = ["log_gate", "log_gate_terms", "sigmoid"]

_compiled = njit(nogil=True, error_model="numpy")


@_compiled
def sigmoid(x: Any, zero: Any) -> Any:
    """1 / (1 + exp(-x))."""
    one = splat(cast(1.0, zero))
    return divide(one, add(one, exponential(subtract(splat(zero), x))))


@_compiled
def log_gate_terms(zero: Any) -> int:
    """Terms of the series in :func:`log_gate` that the dtype can tell from none."""
    return 8 if item_size(zero) == 4 else 17


@_compiled
def log_gate(x: Any, factor: Any, lowest: Any, terms: int, zero: Any) -> Any:
    r"""factor · log σ(x), at least ``lowest``.

    log σ(x) = min(x, 0) - log(1 + e) with e = exp(-\|x\|), and log(1 + e) = 2·artanh(e / (2 + e)) by its series.
    """
    two, nothing = splat(cast(2.0, zero)), splat(zero)
    negative = minimum(x, nothing)
    small = exponential(subtract(add(negative, negative), x))  # min(x, -x)
    z = divide(small, add(two, small))
    square = multiply(z, z)
    series = splat(cast(1 / (2 * terms + 1), zero))
    for term in range(terms - 1, -1, -1):
        series = multiply_add(series, square, splat(cast(1 / (2 * term + 1), zero)))
    result = multiply(subtract(negative, multiply(multiply(two, z), series)), splat(factor))
    # the larger one of result and lowest
    return subtract(nothing, minimum(subtract(nothing, result), subtract(nothing, splat(lowest))))
