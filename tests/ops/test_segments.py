"""Reductions over segments against loops over the segments."""

from __future__ import annotations

import math

import pytest
import torch

from headgate.ops import (
    segment_counts,
    segment_max,
    segment_mean,
    segment_pack,
    segment_ranks,
    segment_softmax,
    segment_sum,
    segment_top_k,
)

SEGMENTS = torch.tensor([2, 0, 2, 3, 0, 2])
VALUES = torch.tensor([[1.0, -1], [2, 5], [3, 0], [-4, 2], [6, -3], [5, 7]])


def test_sums_means_and_counts_of_a_small_example() -> None:
    assert segment_sum(VALUES, SEGMENTS, 5).tolist() == [[8, 2], [0, 0], [9, 6], [-4, 2], [0, 0]]
    assert segment_mean(VALUES, SEGMENTS, 5).tolist() == [[4, 1], [0, 0], [3, 2], [-4, 2], [0, 0]]
    assert segment_counts(SEGMENTS, 5).tolist() == [2, 0, 3, 1, 0]


def test_the_largest_value_of_a_segment_may_be_negative_and_an_empty_one_has_zero() -> None:
    assert segment_max(VALUES - 10, SEGMENTS, 4).tolist() == [[-4, -5], [0, 0], [-5, -3], [-14, -8]]


def test_softmax_is_that_of_each_segment_alone() -> None:
    logits = VALUES * 100
    expected = torch.empty_like(logits)
    for segment in range(4):
        rows = segment == SEGMENTS
        expected[rows] = logits[rows].softmax(dim=0)
    torch.testing.assert_close(segment_softmax(logits, SEGMENTS, 4), expected)


def test_softmax_has_the_gradient_of_each_segment_alone() -> None:
    values = VALUES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: segment_softmax(logits, SEGMENTS, 4), (values,))
    assert torch.autograd.gradcheck(lambda rows: segment_mean(rows, SEGMENTS, 5), (values,))


def test_ranks_number_rows_in_the_order_in_which_they_stand() -> None:
    assert segment_ranks(SEGMENTS, 5).tolist() == [0, 0, 1, 0, 1, 2]


def test_packing_puts_rows_in_their_places_with_zeros_elsewhere() -> None:
    packed, mask = segment_pack(VALUES, SEGMENTS, 4, 3)
    assert packed[2].tolist() == [[1, -1], [3, 0], [5, 7]]
    assert packed[3].tolist() == [[-4, 2], [0, 0], [0, 0]]
    assert mask.tolist() == [[True, True, False], [False] * 3, [True] * 3, [True, False, False]]


def test_top_k_keeps_the_share_of_each_segment_rounded_up_best_first() -> None:
    scores = torch.tensor([0.3, 0.9, 0.7, -1.0, 0.1, 0.5])
    assert segment_top_k(scores, SEGMENTS, 0.5).tolist() == [1, 2, 5, 3]
    assert segment_top_k(scores, SEGMENTS, 1.0).tolist() == [1, 4, 2, 5, 0, 3]
    assert segment_top_k(scores, None, 0.5).tolist() == [1, 2, 5]


def test_top_k_takes_equal_scores_in_their_order() -> None:
    scores = torch.zeros(6)
    assert segment_top_k(scores, SEGMENTS, 0.5).tolist() == [1, 0, 2, 3]
    assert segment_top_k(scores, None, 0.4).tolist() == [0, 1, 2]


@pytest.mark.parametrize("ratio", [0.05, 0.55, 0.6, 0.7, 0.9, 0.95])
def test_top_k_counts_as_pytorch_geometric_does(ratio: float) -> None:
    reason = "needs torch_geometric (extra graph)"
    topk = pytest.importorskip("torch_geometric.nn.pool.select.topk", reason=reason).topk
    sizes = torch.arange(1, 60)
    segments = torch.arange(59).repeat_interleave(sizes)
    scores = torch.rand(len(segments), generator=torch.Generator().manual_seed(0))
    expected = topk(scores, ratio, segments)
    assert segment_top_k(scores, segments, ratio).tolist() == expected.tolist()
    for size in (1, 20, 59):
        alone = segment_top_k(scores[:size], None, ratio)
        assert alone.tolist() == topk(scores[:size], ratio, torch.zeros(size, dtype=torch.int64)).tolist()


def test_half_precision_is_summed_in_single() -> None:
    ones = torch.ones(1000, 1, dtype=torch.bfloat16)
    segments = torch.zeros(1000, dtype=torch.int64)
    assert segment_mean(ones, segments, 1).item() == 1
    assert math.isclose(segment_sum(ones, segments, 1).item(), 1000)


def test_no_rows_give_zeros() -> None:
    nothing, none = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    for reduce in (segment_sum, segment_mean, segment_max):
        assert reduce(nothing, none, 2).tolist() == [[0, 0], [0, 0]]
    assert segment_softmax(nothing, none, 2).shape == (0, 2)
    assert segment_top_k(none.float(), none, 0.5).tolist() == segment_top_k(none.float(), None, 0.5).tolist() == []
    packed, mask = segment_pack(nothing, none, 2, 0)
    assert packed.shape == (2, 0, 2)
    assert mask.shape == (2, 0)
