"""The first examples of every class."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from headgate.data.subsets import first_of_each_class


def test_the_first_share_of_every_class_is_kept() -> None:
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 2, 2, 1, 0])
    assert first_of_each_class(labels, 0.5).tolist() == [0, 1, 2, 6]
    assert first_of_each_class(labels, 1.0).tolist() == list(range(10))


def test_shares_that_are_no_binary_fractions_count_as_written() -> None:
    labels = torch.arange(20).remainder(2)
    for tenths in range(1, 11):
        assert len(first_of_each_class(labels, tenths / 10)) == 2 * tenths
    assert len(first_of_each_class(torch.zeros(1300, dtype=torch.int64), 0.05)) == 65
    assert len(first_of_each_class(torch.zeros(732, dtype=torch.int64), 0.05)) == 36


def test_a_smaller_part_lies_within_a_larger_one() -> None:
    labels = torch.randint(7, (500,), generator=torch.Generator().manual_seed(0))
    parts = [set(first_of_each_class(labels, share).tolist()) for share in (0.05, 0.3, 0.31, 0.9)]
    assert all(small < large for small, large in pairwise(parts))


def test_bad_shares_and_labels_are_refused() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1])
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            first_of_each_class(labels, share)
    with pytest.raises(ValueError, match=r"share=0.5 leaves class 1 without one of its 1 examples"):
        first_of_each_class(labels, 0.5)
    with pytest.raises(TypeError, match="labels must be int64 or int32"):
        first_of_each_class(labels.float(), 0.5)
    with pytest.raises(ValueError, match="labels must have shape"):
        first_of_each_class(labels[None], 0.5)
