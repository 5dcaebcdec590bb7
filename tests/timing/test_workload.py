from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headgate.timing import Workload, array_bytes, load_builder, relative_difference
from tests.timing import toys


def test_a_builder_is_found_by_its_path():
    assert load_builder(f"{toys.__name__}:build") is toys.build


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.timing.toys", "must have the form"),
        (":build", "must have the form"),
        ("tests.timing.toys:", "must have the form"),
        ("tests.timing.toys:unheard", "no function 'unheard'"),
        ("tests.timing.toys:MIB", "no function 'MIB'"),
    ],
)
def test_a_path_that_names_no_function_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        load_builder(path)


def test_a_prepared_call_runs_on_the_inputs_and_returns_the_results():
    workload = Workload(inputs=lambda: (2, 3), run=lambda a, b: a * b)
    assert workload.prepare()() == 6


def test_bytes_are_those_of_the_distinct_arrays():
    x = torch.zeros(10, 4)
    y = np.zeros(7, np.float64)
    assert array_bytes((x, [y, None, "text"]), {"again": x, "raw": bytes(5)}) == 160 + 56 + 5
    assert array_bytes(x, x[:2]) == 160


def test_equal_results_differ_by_nothing_and_others_relative_to_their_size():
    x = torch.tensor([3.0, 4.0])
    assert relative_difference((x, {"y": x}), (x, {"y": x})) == 0.0
    assert relative_difference((x, 1.5 * x), (x, x)) == pytest.approx(0.5)
    assert relative_difference(torch.tensor([3.0, 5.0]), x) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ((torch.ones(2),), (torch.ones(3),)),
        ((torch.ones(2),), (torch.ones(2), torch.ones(2))),
        (torch.tensor([1.0, math.nan]), torch.ones(2)),
        (torch.ones(2), torch.zeros(2)),
    ],
)
def test_results_of_another_shape_or_without_a_value_differ_infinitely(results, expected):
    assert relative_difference(results, expected) == math.inf
