from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from headgate.evaluate import (
    Ranking,
    cmc_at_k,
    map_at_k,
    map_full,
    map_trapezoid,
    metric_by_name,
    mrr,
    ndcg_at_k,
    precision_at_k,
    r_precision,
    rank_by_label,
    rank_by_positives,
    rank_scores,
    recall_at_k,
    torchmetrics_inputs,
    voc11,
)
from headgate.evaluate.retrieval_metrics_reference import retrieval_metrics_reference


def ranking_of(relevance: Any) -> Ranking:
    """A ranking of the whole gallery with the given relevance at its ranks."""
    table = np.atleast_2d(relevance)
    return rank_scores(-np.tile(np.arange(table.shape[1]), (len(table), 1)), table)


HAND = ranking_of([1, 0, 1, 0, 0, 1])


def test_every_metric_of_a_hand_made_ranking_is_right() -> None:
    assert map_full(HAND) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert map_at_k(HAND, 4) == pytest.approx((1 + 2 / 3) / 3)
    assert map_at_k(HAND, 2) == pytest.approx(1 / 2)
    assert map_at_k(HAND, 4, norm="k") == pytest.approx((1 + 2 / 3) / 4)
    assert map_at_k(HAND, 4, norm="hits") == pytest.approx((1 + 2 / 3) / 2)
    # Precision before a positive: 1 (none yet), 1/2, 2/5; after it: 1, 2/3, 3/6.
    assert map_trapezoid(HAND) == pytest.approx(((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 3 / 6) / 2) / 3)
    # Recalls 0 to 0.3 are reached at precision 1, 0.4 to 0.6 at 2/3, 0.7 to 1 at 1/2.
    assert voc11(HAND) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)
    assert cmc_at_k(HAND, 1) == 1.0
    assert recall_at_k(HAND, 3) == pytest.approx(2 / 3)
    assert recall_at_k(HAND, 3, denominator=1300) == pytest.approx(2 / 1300)
    assert precision_at_k(HAND, 4) == pytest.approx(2 / 4)
    assert r_precision(HAND) == pytest.approx(2 / 3)
    assert mrr(HAND) == 1.0
    gain = 1 + 1 / math.log2(4)
    assert ndcg_at_k(HAND, 4) == pytest.approx(gain / (1 + 1 / math.log2(3) + 1 / math.log2(4)))


def test_the_average_precision_of_one_late_positive_is_its_reciprocal_rank() -> None:
    late = ranking_of([0, 0, 0, 1])
    assert map_full(late) == mrr(late) == 0.25
    assert mrr(late, 3) == 0.0
    assert cmc_at_k(late, 3) == 0.0
    assert map_trapezoid(late) == pytest.approx((0 + 1 / 4) / 2)


def test_recall_three_of_ten_counts_as_three_tenths() -> None:
    # A comparison of 3/10 with 0.30000000000000004 in floating point would lose that point.
    relevance = [1, 1, 1] + [0] * 20 + [1] * 7
    assert voc11(ranking_of(relevance)) == pytest.approx((4 * 1 + 7 * 10 / 30) / 11)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_metric_equals_its_definition(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 25))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length).filter(any), min_size=1, max_size=4)
    )
    k = data.draw(st.integers(1, 30))
    ranking = ranking_of(rows)
    expected = [retrieval_metrics_reference(row, k) for row in rows]
    found = {
        "map_full": map_full.per_query(ranking),
        "map_at_k_min": map_at_k.per_query(ranking, k),
        "map_at_k_k": map_at_k.per_query(ranking, k, norm="k"),
        "map_at_k_hits": map_at_k.per_query(ranking, k, norm="hits"),
        "map_trapezoid": map_trapezoid.per_query(ranking),
        "voc11": voc11.per_query(ranking),
        "cmc_at_k": cmc_at_k.per_query(ranking, k),
        "recall_at_k": recall_at_k.per_query(ranking, k),
        "precision_at_k": precision_at_k.per_query(ranking, k),
        "r_precision": r_precision.per_query(ranking),
        "mrr": mrr.per_query(ranking, k),
        "ndcg_at_k": ndcg_at_k.per_query(ranking, k),
    }
    for name, values in found.items():
        np.testing.assert_allclose(values, [row[name] for row in expected], rtol=1e-12, err_msg=name)
        assert (values >= 0).all()
        assert (values <= 1 + 1e-12).all()


def test_average_precision_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    scores, relevance = generator.normal(size=(20, 50)), generator.random((20, 50)) < 0.3
    expected = [average_precision_score(row, score) for row, score in zip(relevance, scores, strict=True)]
    np.testing.assert_allclose(map_full.per_query(rank_scores(scores, relevance)), expected)


@pytest.mark.parametrize("k", [None, 1, 7, 50])
def test_graded_gain_is_that_of_scikit_learn(k: int | None) -> None:
    generator = np.random.default_rng(0)
    scores, grades = generator.normal(size=(20, 50)), generator.integers(0, 4, (20, 50))
    assert ndcg_at_k(rank_scores(scores, grades), k) == pytest.approx(ndcg_score(grades, scores, k=k))


def test_exponential_gain_weighs_a_grade_by_its_power_of_two() -> None:
    ranking = rank_scores(np.array([[3.0, 2.0, 1.0]]), np.array([[1, 3, 0]]))
    expected = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    assert ndcg_at_k(ranking, gain="exponential") == pytest.approx(expected)
    listed = rank_by_positives(np.array([[0, 1, 2]]), [np.array([0, 1])], 3, grades=[np.array([1.0, 3.0])])
    assert ndcg_at_k(listed, gain="exponential") == pytest.approx(expected)


def test_a_perfect_ranking_scores_one_where_the_norm_allows_it() -> None:
    perfect = ranking_of([1, 1, 0, 0, 0])
    for value in (map_full(perfect), map_at_k(perfect, 4), voc11(perfect), r_precision(perfect), ndcg_at_k(perfect)):
        assert value == pytest.approx(1.0)
    assert map_trapezoid(perfect) == pytest.approx(1.0)
    assert map_at_k(perfect, 4, norm="k") == 0.5


def test_junk_counts_as_neither_right_nor_wrong() -> None:
    ids = np.array([[8, 3, 9, 1, 2]])
    with_junk = rank_by_positives(ids, [np.array([3, 2])], 5, junk=[np.array([8, 9])])
    without = rank_by_positives(np.array([[3, 1, 2]]), [np.array([3, 2])], 3)
    for metric in (map_full, map_trapezoid, voc11, r_precision):
        assert metric(with_junk) == metric(without)
    assert map_full(with_junk) == pytest.approx((1 + 2 / 3) / 2)


def test_the_mean_goes_over_the_queries_that_have_something_to_find() -> None:
    ranking = rank_by_label(np.array([[0, 1]] * 3), np.array([5, 6, 99]), np.array([5, 6]))
    assert ranking.dropped == 1
    assert map_full.per_query(ranking).tolist() == [1.0, 0.5]
    assert map_full(ranking) == 0.75


def test_no_query_with_something_to_find_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one query must have a relevant item, got none of 1"):
        map_full(rank_by_label(np.array([[0]]), np.array([1]), np.array([0])))


@pytest.mark.parametrize("metric", [map_full, map_trapezoid, voc11, ndcg_at_k])
def test_a_metric_of_the_whole_gallery_refuses_a_part(metric: Any) -> None:
    part = rank_by_label(np.array([[0, 1]]), np.array([0]), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="whole gallery for this metric, got 2 of 3 items for query 0"):
        metric(part)


@pytest.mark.parametrize("metric", [map_at_k, cmc_at_k, recall_at_k, precision_at_k, mrr, ndcg_at_k])
def test_a_cut_beyond_the_ranking_is_refused_unless_the_gallery_ends_there(metric: Any) -> None:
    part = rank_by_label(np.array([[0, 1]]), np.array([0]), np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="must reach rank k=3, got 2 items"):
        metric(part, 3)
    whole = rank_by_label(np.array([[0, 1]]), np.array([0]), np.array([0, 0]))
    assert metric(whole, 3) >= 0
    with pytest.raises(ValueError, match="k must be at least 1"):
        metric(whole, 0)


def test_r_precision_needs_as_many_ranks_as_there_are_relevant_items() -> None:
    with pytest.raises(ValueError, match="must reach rank k=2"):
        r_precision(rank_by_label(np.array([[0]]), np.array([0]), np.array([0, 0, 1])))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="norm must be one of 'min', 'k', 'hits'"):
        map_at_k(HAND, 2, norm="R")
    with pytest.raises(ValueError, match="gain must be one of"):
        ndcg_at_k(HAND, 2, gain="square")
    with pytest.raises(ValueError, match="denominator must be positive"):
        recall_at_k(HAND, 2, denominator=0)


def test_metrics_are_found_by_name() -> None:
    for name, value in (
        ("map_full", map_full(HAND)),
        ("map@4", map_at_k(HAND, 4)),
        ("cmc@2", 1.0),
        ("recall@3", recall_at_k(HAND, 3)),
        ("precision@10", precision_at_k(HAND, 10)),
        ("mrr", 1.0),
        ("mrr@1", 1.0),
        ("ndcg", ndcg_at_k(HAND)),
        ("ndcg@4", ndcg_at_k(HAND, 4)),
        ("voc11", voc11(HAND)),
        ("map_trapezoid", map_trapezoid(HAND)),
        ("r_precision", r_precision(HAND)),
    ):
        assert metric_by_name(name)(HAND).mean() == value
    for name in ("map", "cmc", "map_full@3", "cmc@0", "cmc@x", "speed", ""):
        with pytest.raises(ValueError, match="metric must be one of map_full"):
            metric_by_name(name)


def test_a_metric_keeps_its_name_and_documentation() -> None:
    assert map_full.__name__ == "map_full"
    assert "average precision" in (map_full.__doc__ or "")


def torchmetrics_average_precision(preds: np.ndarray, target: np.ndarray, k: int) -> float:
    """torchmetrics 1.9: items with a score of at most 0 lose their relevance; divided by the hits in the first k."""
    target = np.where(preds > 0, target, False)
    order = np.argsort(-preds, kind="stable")[:k]
    found = target[order]
    return float((np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean()) if found.any() else 0.0


def test_inputs_for_torchmetrics_survive_its_treatment_of_negative_scores() -> None:
    cosines = np.array([[0.3, -0.2, -0.5, 0.1]])
    relevance = np.array([[False, True, True, False]])
    ranking = rank_scores(cosines, relevance)
    preds, target, indexes = torchmetrics_inputs(ranking)
    assert (preds > 0).all()
    assert indexes.tolist() == [0] * 4
    assert torchmetrics_average_precision(preds, target, 3) == map_at_k(ranking, 3, norm="hits") == pytest.approx(1 / 3)
    assert torchmetrics_average_precision(cosines[0], relevance[0], 3) == 0.0
