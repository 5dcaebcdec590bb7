"""Linear maps of tokens across the lanes, through compiled drivers, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import float32, float64, njit

from headgate.ops.native.functions import log_gate, log_gate_terms, sigmoid
from headgate.ops.native.products import add_rows, linear, read_tokens, write_tokens
from headgate.ops.native.vectors import VECTOR_BYTES, cast, load, square_root, store


@njit
def map_tokens(
    x: int, weight: int, out: int, block: int, result: int, spare: int,
    count: int, depth: int, rows: int, pitch: int, size: int, zero: Any,
) -> None:  # fmt: skip
    read_tokens(x, depth * size, count, depth, block, pitch, spare, zero)
    linear(weight, depth * size, rows, depth, block, result, pitch, zero)
    add_rows(result, result, rows, pitch, zero)
    write_tokens(result, pitch, rows, out, rows * size, count, spare, zero)


@njit
def each_lane(x: int, out: int, length: int, zero: Any) -> None:
    terms = log_gate_terms(zero)
    for at in range(0, length, VECTOR_BYTES):
        value = load(x + at, zero)
        store(out + at, square_root(value))
        store(out + length + at, sigmoid(value, zero))
        store(out + 2 * length + at, log_gate(value, cast(0.25, zero), cast(-2.0, zero), terms, zero))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 7, 16, 31, 33, 64])
@pytest.mark.parametrize(("depth", "rows"), [(16, 32), (48, 16)])
def test_a_linear_map_of_any_number_of_tokens(dtype: type, count: int, depth: int, rows: int) -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((count, depth)).astype(dtype)
    weight = random.standard_normal((rows, depth)).astype(dtype)
    lane_count = VECTOR_BYTES // x.itemsize
    pitch = -(-count // lane_count) * lane_count
    block, result = np.full((depth, pitch), np.nan, dtype), np.full((rows, pitch), np.nan, dtype)
    spare, out = np.empty((lane_count, max(depth, rows)), dtype), np.full((count + 1, rows), 7.0, dtype)
    addresses = (array.ctypes.data for array in (x, weight, out, block, result, spare))
    zero = float32(0) if dtype is np.float32 else float64(0)
    map_tokens(*addresses, count, depth, rows, pitch * x.itemsize, x.itemsize, zero)
    np.testing.assert_allclose(out[:count], 2 * x @ weight.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[count], 7.0)
    np.testing.assert_array_equal(block[:, :count], x.T)
    np.testing.assert_array_equal(block[:, count:], 0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 4e-7), (np.float64, 1e-15)])
def test_functions_of_single_numbers(dtype: type, tolerance: float) -> None:
    x = np.linspace(0, 12, 64, dtype=dtype)
    signed = np.concatenate([x, -x])
    out = np.empty((3, 128), dtype)
    each_lane(signed.ctypes.data, out.ctypes.data, signed.nbytes, dtype(0))
    wide = signed.astype(np.float64)
    np.testing.assert_allclose(out[0, :64], np.sqrt(wide[:64]), rtol=tolerance)
    np.testing.assert_allclose(out[1], 1 / (1 + np.exp(-wide)), rtol=4 * tolerance)
    np.testing.assert_allclose(out[2], np.maximum(-np.log1p(np.exp(-wide)) / 4, -2.0), rtol=4 * tolerance, atol=1e-12)
