from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from headgate.evaluate import checks
from headgate.evaluate.checks import (
    as_features,
    as_groups,
    as_labels,
    as_probabilities,
    as_scores,
    as_seed,
    as_tensor,
    check_choice,
    check_count,
    check_finite,
    check_same_length,
    check_same_width,
    normalize_rows,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.ones((2, 3), np.float16), np.float32),
        (np.ones((2, 3), np.float32), np.float32),
        (np.ones((2, 3), np.float64), np.float64),
        (np.ones((2, 3), np.uint8), np.float32),
        (torch.ones(2, 3, dtype=torch.bfloat16), np.float32),
        (torch.ones(2, 3, dtype=torch.float64, requires_grad=True), np.float64),
    ],
)
def test_features_of_any_real_dtype_become_single_or_double_precision(values, expected) -> None:
    assert as_features("X", values).dtype == expected
    tensor = as_tensor("X", values)
    assert tensor.dtype == (torch.float64 if expected is np.float64 else torch.float32)
    assert not tensor.requires_grad
    assert tensor.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("convert", [as_features, as_tensor])
@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "infinite value"), (-np.inf, "infinite value")])
def test_a_value_that_is_not_finite_is_refused_with_its_row(convert, wrap, bad: float, kind: str) -> None:
    values = np.zeros((5, 2))
    values[3, 1] = bad
    with pytest.raises(ValueError, match=f"X must be finite, got {kind} in row 3"):
        convert("X", wrap(values))


def test_the_row_of_a_bad_value_is_right_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_BLOCK_BYTES", 64)
    values = np.zeros((100, 4))
    values[97, 0] = np.nan
    with pytest.raises(ValueError, match="in row 97 "):
        check_finite("X", values)
    with pytest.raises(ValueError, match="in row 107 "):
        check_finite("X", torch.from_numpy(values), first_row=10)


def test_a_double_beyond_single_precision_is_refused_and_not_turned_into_infinity() -> None:
    with pytest.raises(ValueError, match="X must be finite, got infinite value in row 1"):
        as_features("X", np.array([[1.0], [1e300]]), dtype=np.float32)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 2, 2)])
@pytest.mark.parametrize("convert", [as_features, as_tensor])
def test_an_empty_matrix_or_another_rank_is_refused(convert, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"X must have shape \(n, dim\)"):
        convert("X", np.zeros(shape))


@pytest.mark.parametrize("values", [[[1.0]], np.array([["a"]]), np.array([[1j]]), None])
@pytest.mark.parametrize("convert", [as_features, as_tensor])
def test_features_that_are_no_array_of_real_numbers_are_refused(convert, values: object) -> None:
    with pytest.raises(TypeError, match="X must"):
        convert("X", values)
    with pytest.raises(TypeError, match="real numbers"):
        convert("X", torch.ones(1, 1, dtype=torch.complex64))


def test_a_least_number_of_rows_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="at least 4 rows"):
        as_features("X", np.zeros((3, 1)), min_rows=4)


def test_labels_of_any_integer_dtype_become_int64() -> None:
    for values in (np.array([3, 1], np.uint8), torch.tensor([3, 1], dtype=torch.int32)):
        labels = as_labels("y", values)
        assert labels.dtype == np.int64
        assert labels.tolist() == [3, 1]


@pytest.mark.parametrize("values", [np.array([0.0, 1.0]), torch.tensor([True, False]), [0, 1]])
def test_labels_that_are_no_integers_are_refused(values: object) -> None:
    with pytest.raises(TypeError, match="y must"):
        as_labels("y", values)


def test_labels_of_another_length_or_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3, got 2"):
        as_labels("y", np.array([0, 1]), length=3)
    with pytest.raises(ValueError, match=r"shape \(n,\)"):
        as_labels("y", np.zeros((2, 1), int))
    with pytest.raises(ValueError, match="n > 0"):
        as_labels("y", np.zeros(0, int))


def test_groups_may_be_booleans() -> None:
    assert as_groups("group", np.array([True, False])).tolist() == [1, 0]


def test_scores_and_probabilities_are_held_to_shape_and_range() -> None:
    assert as_scores("s", np.ones((2, 3), np.float16), shape=(2, None), axes="a, b").dtype == np.float64
    with pytest.raises(ValueError, match=r"s must have shape \(a, b\) of sizes \(2, any\)"):
        as_scores("s", np.ones((3, 3)), shape=(2, None), axes="a, b")
    with pytest.raises(ValueError, match="none of them 0"):
        as_scores("s", np.ones((2, 0)), shape=(2, None), axes="a, b")
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\]"):
        as_probabilities("p", np.array([0.0, 1.5]), shape=(None,), axes="n")


def test_seeds_counts_and_choices_are_checked() -> None:
    assert as_seed("seed", np.int64(3)) == 3
    with pytest.raises(ValueError, match="at least 0"):
        as_seed("seed", -1)
    with pytest.raises(TypeError, match="integer"):
        as_seed("seed", True)
    assert check_count("k", np.int32(5), high=5) == 5
    with pytest.raises(ValueError, match=r"k must be in \[1, 5\], got 6"):
        check_count("k", 6, high=5)
    with pytest.raises(TypeError, match="k must be an integer, got float"):
        check_count("k", 2.0)
    with pytest.raises(ValueError, match="'a', 'b', got 'c'"):
        check_choice("mode", "c", ("a", "b"))


def test_lengths_and_widths_are_compared_by_name() -> None:
    assert check_same_length(a=np.zeros(3), b=[1, 2, 3]) == 3
    with pytest.raises(ValueError, match="a and b must have the same length, got a=3, b=2"):
        check_same_length(a=np.zeros(3), b=[1, 2])
    assert check_same_width(a=np.zeros((1, 4)), b=torch.zeros(9, 4)) == 4
    with pytest.raises(ValueError, match="a=4, b=5"):
        check_same_width(a=np.zeros((1, 4)), b=np.zeros((1, 5)))


def test_rows_of_any_size_come_to_unit_length() -> None:
    rows = torch.tensor([[3.0, 4.0], [3e-200, 4e-200], [3e200, 4e200]], dtype=torch.float64)
    torch.testing.assert_close(
        normalize_rows("X", rows), torch.tensor([[0.6, 0.8]] * 3, dtype=torch.float64), rtol=1e-15, atol=0
    )


def test_a_zero_row_is_refused_or_left_zero() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="zero vector for the cosine, got one in row 11"):
        normalize_rows("X", rows, first_row=10)
    assert normalize_rows("X", rows, zero="ignore")[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="zero must be one of"):
        normalize_rows("X", rows, zero="keep")


def test_a_read_only_memory_map_is_accepted_and_left_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float16).reshape(3, 2))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert as_tensor("X", mapped).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert as_features("X", mapped).dtype == np.float32
