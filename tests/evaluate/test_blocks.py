from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headgate.evaluate.blocks import (
    as_rows,
    blocks,
    centred,
    class_sums,
    column_means,
    is_negligible,
    singular_values,
    unit_rows,
)


def test_blocks_cover_all_rows_in_order_as_float64() -> None:
    rows = np.arange(14, dtype=np.float16).reshape(7, 2)
    parts = list(blocks(rows, 3))
    assert [start for start, _ in parts] == [0, 3, 6]
    assert all(block.dtype == np.float64 for _, block in parts)
    assert np.array_equal(np.concatenate([block for _, block in parts]), rows)


def test_writing_to_a_block_leaves_the_matrix_as_it_was() -> None:
    rows = np.ones((4, 2))
    for _, block in blocks(rows, 4):
        block *= 5
    assert np.array_equal(rows, np.ones((4, 2)))


def test_rows_of_a_memory_map_are_not_copied(tmp_path: Path) -> None:
    stored = np.lib.format.open_memmap(tmp_path / "z.npy", mode="w+", dtype=np.float16, shape=(100, 8))
    stored[:] = np.random.default_rng(0).standard_normal((100, 8))
    rows = as_rows("Z", stored)
    assert np.shares_memory(rows, stored)
    assert rows.dtype == np.float16


def test_rows_are_refused_where_they_are_no_finite_matrix() -> None:
    with pytest.raises(ValueError, match="Z must be finite, got NaN in row 5"):
        as_rows("Z", torch.tensor([[0.0]] * 5 + [[float("nan")]]))
    with pytest.raises(ValueError, match="Z must have at least 3 rows"):
        as_rows("Z", np.ones((2, 2)), min_rows=3)
    with pytest.raises(ValueError, match="n > 0 and dim > 0"):
        as_rows("Z", np.ones((2, 0)))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        list(blocks(np.ones((2, 2)), 0))


def test_means_of_constant_columns_are_exact_enough_to_centre_to_zero() -> None:
    rows = np.full((100_003, 2), 0.1)
    assert np.abs(rows - column_means(rows, 1000)).max() <= np.spacing(0.1)
    deviations, mean = centred(rows)
    assert not deviations.any()
    assert mean == pytest.approx([0.1, 0.1], rel=1e-15)


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (7, 7), (1, 3), (3, 1)])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_singular_values_are_those_of_the_whole_matrix(shape: tuple[int, int], chunk: int) -> None:
    rows = np.random.default_rng(0).standard_normal(shape)
    mean = rows.mean(axis=0)
    assert singular_values(rows, chunk) == pytest.approx(np.linalg.svd(rows, compute_uv=False), rel=1e-12)
    expected = np.linalg.svd(rows - mean, compute_uv=False)
    assert singular_values(rows, chunk, mean) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_singular_values_keep_the_digits_that_a_covariance_would_lose() -> None:
    rng = np.random.default_rng(1)
    left, right = np.linalg.qr(rng.standard_normal((400, 4)))[0], np.linalg.qr(rng.standard_normal((4, 4)))[0]
    sigma = np.array([1.0, 1e-4, 1e-9, 1e-11])
    assert singular_values(left * sigma @ right, 50) == pytest.approx(sigma, rel=1e-4)


def test_class_sums_add_up_each_class() -> None:
    rows = np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    for chunk in (1, 3, 4):
        assert class_sums(rows, np.array([0, 2, 0, 2]), 3, chunk).tolist() == [[6, 8], [0, 0], [10, 12]]


def test_unit_rows_name_the_zero_row_of_the_whole_matrix() -> None:
    with pytest.raises(ValueError, match="row 12"):
        unit_rows("Z", np.array([[1.0, 0], [2, 0], [0, 0]]), "error", first_row=10)
    assert unit_rows("Z", np.array([[3.0, 4.0], [0, 0]]), "ignore") == pytest.approx(np.array([[0.6, 0.8], [0, 0]]))


def test_only_rounding_error_is_negligible() -> None:
    assert is_negligible(1e-16, 1.0)
    assert is_negligible(0.0, 0.0)
    assert not is_negligible(1e-12, 1.0)
