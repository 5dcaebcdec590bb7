"""The vector functions that compiled backends are made of, each against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from headgate.ops.native.tiles import CHUNK, add_tile, multiply_scores, multiply_tile, transpose_square
from headgate.ops.native.vectors import (
    TILE_ROWS,
    TILE_VECTORS,
    VECTOR_BYTES,
    exponential,
    fetch_add,
    inverse_exponential,
    lanes,
    load,
    smallest,
    store,
    total,
)


@njit
def _exponentials(source: int, target: int, count: int, zero: Any) -> None:
    for offset in range(0, count * (VECTOR_BYTES // lanes(zero)), VECTOR_BYTES):
        store(target + offset, exponential(load(source + offset, zero)))


@njit
def _inverse_exponentials(source: int, target: int, count: int, zero: Any) -> None:
    for offset in range(0, count * (VECTOR_BYTES // lanes(zero)), VECTOR_BYTES):
        store(target + offset, inverse_exponential(load(source + offset, zero)))


@njit
def _reductions(source: int, zero: Any) -> Any:
    return smallest(load(source, zero)), total(load(source, zero))


@njit
def _transpose(source: int, row: int, target: int, target_row: int, zero: Any) -> None:
    transpose_square(source, row, target, target_row, zero)


@njit
def _products(c: int, added: int, row: int, a: int, a_row: int, size: int, b: int, depth: int, zero: Any) -> None:
    multiply_tile(c, row, a, a_row, size, b, row, depth, 0, 0, 0, 0, 0, 0, zero)
    add_tile(added, row, a, a_row, size, b, row, depth, a, a_row, size, b, row, 1, zero)


@njit
def _scores(c: int, row: int, a: int, a_row: int, size: int, b: int, depth: int, first: int, zero: Any) -> None:
    multiply_scores(c, row, a, a_row, size, b, row, depth, first, zero)


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


@pytest.mark.parametrize(("dtype", "lowest", "tolerance"), [(np.float32, -87, 2.5e-7), (np.float64, -708, 4.5e-16)])
def test_inverse_exponentials_are_as_right_as_exponentials(dtype: Any, lowest: int, tolerance: float) -> None:
    x = np.concatenate([np.linspace(lowest, -lowest, 100_000), -np.logspace(-12, 1.5, 1_000), [0.0]]).astype(dtype)
    x = np.resize(x, -(-len(x) // 64) * 64)
    result = np.full_like(x, np.nan)
    _inverse_exponentials(x.ctypes.data, result.ctypes.data, len(x), dtype(0))
    assert np.abs(result * np.exp(x.astype(np.longdouble)) - 1).max() <= tolerance
    assert (result[x == 0] == 1).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_exponentials_of_very_negative_numbers_are_finite(dtype: Any) -> None:
    x = np.resize(np.array([-np.inf, -1e30, -1e4, -800.0], dtype=dtype), 64)
    result = np.full_like(x, np.nan)
    _inverse_exponentials(x.ctypes.data, result.ctypes.data, len(x), dtype(0))
    assert np.isfinite(result).all()


@pytest.mark.parametrize("function", [_exponentials, _inverse_exponentials])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponentials_of_nan_are_nan(dtype: Any, function: Any) -> None:
    x = np.full(64, np.nan, dtype=dtype)
    result = np.zeros_like(x)
    function(x.ctypes.data, result.ctypes.data, len(x), dtype(0))
    assert np.isnan(result).all()


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiles_start_from_zero_or_from_what_is_there(dtype: Any) -> None:
    generator = np.random.default_rng(0)
    columns = TILE_VECTORS * VECTOR_BYTES // np.dtype(dtype).itemsize
    a = generator.integers(-9, 9, (TILE_ROWS, 5)).astype(dtype)
    b = generator.integers(-9, 9, (5, columns)).astype(dtype)
    product = np.full((TILE_ROWS, columns), np.nan, dtype=dtype)
    there = generator.integers(-9, 9, product.shape).astype(dtype)
    added = there.copy()
    addresses = (product.ctypes.data, added.ctypes.data, product.strides[0], a.ctypes.data, *a.strides, b.ctypes.data)
    _products(*addresses, 5, dtype(0))
    assert (product == a @ b).all()
    assert (added == there + a @ b + a[:, :1] @ b[:1]).all()


@pytest.mark.parametrize("first", range(0, CHUNK, TILE_ROWS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_above_the_diagonal_are_zero(dtype: Any, first: int) -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(1, 9, (TILE_ROWS, 5)).astype(dtype)
    b = generator.integers(1, 9, (5, CHUNK)).astype(dtype)
    scores = np.full((TILE_ROWS, CHUNK), np.nan, dtype=dtype)
    addresses = (scores.ctypes.data, scores.strides[0], a.ctypes.data, *a.strides, b.ctypes.data)
    _scores(*addresses, 5, first, dtype(0))
    assert (scores == np.tril(a @ b, first)).all()


def test_counters_give_the_old_value_and_go_on() -> None:
    counter = np.array([4], dtype=np.int64)
    assert _count(counter.ctypes.data) == 4
    assert counter[0] == 7
