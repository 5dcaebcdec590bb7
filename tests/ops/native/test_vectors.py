"""The vector functions that compiled backends are made of, each against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from headgate.ops.native.tiles import CHUNK, transpose_square
from headgate.ops.native.vectors import VECTOR_BYTES, exponential, fetch_add, lanes, load, smallest, store, total


@njit
def _exponentials(source: int, target: int, count: int, zero: Any) -> None:
    for offset in range(0, count * (VECTOR_BYTES // lanes(zero)), VECTOR_BYTES):
        store(target + offset, exponential(load(source + offset, zero)))


@njit
def _reductions(source: int, zero: Any) -> Any:
    return smallest(load(source, zero)), total(load(source, zero))


@njit
def _transpose(source: int, row: int, target: int, target_row: int, zero: Any) -> None:
    transpose_square(source, row, target, target_row, zero)


@njit
def _count(address: int) -> int:
    return fetch_add(address, 3)


@pytest.mark.parametrize(("dtype", "lowest", "tolerance"), [(np.float32, -87, 2.5e-7), (np.float64, -708, 4.5e-16)])
def test_exponentials_are_right_to_two_units_in_the_last_place(dtype: Any, lowest: int, tolerance: float) -> None:
    x = np.concatenate([np.linspace(lowest, -lowest, 100_000), -np.logspace(-12, 1.5, 1_000), [0.0]]).astype(dtype)
    x = np.resize(x, -(-len(x) // 64) * 64)
    result = np.full_like(x, np.nan)
    _exponentials(x.ctypes.data, result.ctypes.data, len(x), dtype(0))
    expected = np.exp(x.astype(np.longdouble))
    assert np.abs(result / expected - 1).max() <= tolerance
    assert (result[x == 0] == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_of_very_negative_numbers_are_zero(dtype: Any) -> None:
    x = np.resize(np.array([-np.inf, -1e30, -1e4, -800.0], dtype=dtype), 64)
    result = np.full_like(x, np.nan)
    _exponentials(x.ctypes.data, result.ctypes.data, len(x), dtype(0))
    assert (result == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reductions_see_every_lane(dtype: Any) -> None:
    count = VECTOR_BYTES // np.dtype(dtype).itemsize
    for lane in range(count):
        x = np.arange(1, count + 1, dtype=dtype)
        x[lane] = -5
        least, sum_ = _reductions(x.ctypes.data, dtype(0))
        assert least == -5
        assert sum_ == x.sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_square_is_transposed(dtype: Any) -> None:
    side = VECTOR_BYTES // np.dtype(dtype).itemsize
    assert CHUNK % side == 0
    x = np.arange(side * (side + 3), dtype=dtype).reshape(side, side + 3)
    y = np.full((side, side + 5), -1, dtype=dtype)
    _transpose(x.ctypes.data, x.strides[0], y.ctypes.data, y.strides[0], dtype(0))
    assert (y[:, :side] == x[:, :side].T).all()
    assert (y[:, side:] == -1).all()


def test_counters_give_the_old_value_and_go_on() -> None:
    counter = np.array([4], dtype=np.int64)
    assert _count(counter.ctypes.data) == 4
    assert counter[0] == 7
