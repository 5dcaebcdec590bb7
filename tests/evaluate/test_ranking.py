from __future__ import annotations

import numpy as np
import pytest
import torch

from headgate.evaluate import rank_by_label, rank_by_positives, rank_scores

IDS = np.array([[2, 0, 1], [0, 1, 2]])
GALLERY = np.array([7, 8, 7])


def test_a_gallery_item_is_relevant_if_it_has_the_querys_label() -> None:
    ranking = rank_by_label(IDS, np.array([7, 8]), GALLERY)
    assert ranking.relevance.tolist() == [[True, True, False], [False, True, False]]
    assert ranking.num_relevant.tolist() == [2, 1]
    assert ranking.num_candidates.tolist() == [3, 3]
    assert ranking.num_ranked.tolist() == [3, 3]
    assert ranking.dropped == 0


def test_relevant_items_are_counted_in_the_whole_gallery_and_not_in_what_was_found() -> None:
    ranking = rank_by_label(IDS[:1, :1], torch.tensor([7]), torch.tensor([7, 7, 7]))
    assert ranking.num_relevant.tolist() == [3]
    assert ranking.num_ranked.tolist() == [1]


def test_queries_without_a_relevant_item_are_dropped_and_counted() -> None:
    ranking = rank_by_label(np.tile(IDS[:1], (3, 1)), np.array([99, 8, 5]), GALLERY)
    assert ranking.query_rows.tolist() == [1]
    assert ranking.dropped == 2
    assert ranking.relevance.tolist() == [[False, False, True]]


def test_the_query_itself_is_no_relevant_item_and_no_candidate() -> None:
    gallery_ids = np.array([10, 20, 30])
    ids = np.array([[30, 20], [10, 30], [30, 10]])
    ranking = rank_by_label(
        ids, np.array([7, 8, 7]), np.array([7, 8, 7]), gallery_ids=gallery_ids, query_ids=np.array([10, 20, 5])
    )
    # The second query is the only item of its class; the third is not in the gallery, so both of class 7 remain.
    assert ranking.query_rows.tolist() == [0, 2]
    assert ranking.num_relevant.tolist() == [1, 2]
    assert ranking.num_candidates.tolist() == [2, 3]
    assert ranking.dropped == 1


def test_what_was_masked_out_is_neither_relevant_nor_a_candidate() -> None:
    excluded = np.array([[False, True, True]])
    ranking = rank_by_label(np.array([[0]]), np.array([7]), GALLERY, excluded=excluded)
    assert ranking.num_relevant.tolist() == [1]
    assert ranking.num_candidates.tolist() == [1]
    both = rank_by_label(np.array([[0]]), np.array([7]), GALLERY, excluded=excluded, query_ids=np.array([2]))
    assert both.num_relevant.tolist() == [1]
    assert both.num_candidates.tolist() == [1]


def test_missing_items_are_not_ranked() -> None:
    ranking = rank_by_label(np.array([[2, -1, -1]]), np.array([7]), GALLERY)
    assert ranking.num_ranked.tolist() == [1]
    assert ranking.relevance.tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"ids": IDS + 1}, ValueError, "ids must be ids of the gallery, got 3 in row 0"),
        ({"ids": IDS.astype(float)}, TypeError, "ids must hold integers"),
        ({"ids": IDS[:1]}, ValueError, "q=2"),
        (
            {"ids": np.array([[0, 0], [1, 2]])},
            ValueError,
            "must not repeat within a ranking, got a repeated id in row 0",
        ),
        ({"ids": np.array([[-1, 0], [1, 2]])}, ValueError, "at the end of a row only"),
        ({"query_labels": np.array([0.5, 1.0])}, TypeError, "query_labels must hold integers"),
        ({"gallery_ids": np.array([0, 1, 1])}, ValueError, "gallery_ids must be unique, got 1 twice"),
        ({"gallery_ids": np.array([0, 1])}, ValueError, "expected 3, got 2"),
        ({"query_ids": np.array([2, 9])}, ValueError, "must not hold items that are left out, got 2 in row 0"),
        ({"excluded": np.eye(2, 3, dtype=bool)}, ValueError, "left out, got 0 in row 0"),
        ({"excluded": np.eye(2, 3)}, ValueError, "excluded must be booleans"),
    ],
)
def test_rankings_that_cannot_be_are_refused(changes: dict, error: type[Exception], match: str) -> None:
    arguments = {"ids": IDS, "query_labels": np.array([7, 8]), "gallery_labels": GALLERY}
    with pytest.raises(error, match=match):
        rank_by_label(**{**arguments, **changes})


def test_junk_is_removed_before_ranks_are_counted() -> None:
    ids = np.array([[5, 1, 6, 2, 3]])
    ranking = rank_by_positives(ids, [np.array([1, 2])], 8, junk=[np.array([5, 6])])
    assert ranking.relevance.tolist() == [[True, True, False, False, False]]
    assert ranking.num_ranked.tolist() == [3]
    assert ranking.num_candidates.tolist() == [6]
    assert ranking.num_relevant.tolist() == [2]


def test_a_query_without_positives_is_dropped() -> None:
    empty = np.array([], dtype=np.int64)
    ranking = rank_by_positives(np.array([[0, 1], [1, 0]]), [empty, np.array([1])], 2)
    assert ranking.query_rows.tolist() == [1]
    assert ranking.dropped == 1


def test_grades_follow_their_items() -> None:
    ranking = rank_by_positives(np.array([[4, 9, 2]]), [np.array([9, 2, 7])], 10, grades=[np.array([3.0, 1.0, 2.0])])
    assert ranking.gains.tolist() == [[0.0, 3.0, 1.0]]
    assert ranking.ideal_gains is not None
    assert ranking.ideal_gains.tolist() == [[3.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"junk": [np.array([1])]}, "must not share items"),
        ({"junk": []}, "one entry per query: expected 1, got 0"),
        ({"positives": [np.array([1, 1])]}, "positives must not repeat an item"),
        ({"grades": [np.array([0.0])]}, "one positive gain per positive"),
        ({"grades": [np.array([1.0, 2.0])]}, "one positive gain per positive"),
        ({"gallery_size": 2}, "gallery_size must count every item"),
    ],
)
def test_lists_that_contradict_each_other_are_refused(changes: dict, match: str) -> None:
    arguments = {"ids": np.array([[0, 1, 2]]), "positives": [np.array([1])], "gallery_size": 3}
    with pytest.raises(ValueError, match=match):
        rank_by_positives(**{**arguments, **changes})


def test_scores_are_ranked_from_the_top_and_equal_ones_by_position() -> None:
    scores = np.array([[0.5, 0.9, 0.5, 0.1]])
    ranking = rank_scores(scores, np.array([[False, False, True, True]]))
    assert ranking.relevance.tolist() == [[False, False, True, True]]
    swapped = rank_scores(scores, np.array([[True, False, False, True]]))
    assert swapped.relevance.tolist() == [[False, True, False, True]]


def test_junk_among_scores_stands_behind_the_ranking() -> None:
    ranking = rank_scores(np.array([[0.9, 0.8, 0.7]]), np.array([[0, 0, 1]]), junk=np.array([[True, False, False]]))
    assert ranking.relevance.tolist() == [[False, True, False]]
    assert ranking.num_ranked.tolist() == [2]
    assert ranking.num_candidates.tolist() == [2]


@pytest.mark.parametrize(
    ("scores", "gains", "junk", "match"),
    [
        ([[np.nan, 1]], [[1, 0]], None, "scores must be finite, got NaN in row 0"),
        ([[1.0, 2]], [[1, 0, 0]], None, "gains must have shape"),
        ([[1.0, 2]], [[-1, 0]], None, "gains must be at least 0"),
        ([[1.0, 2]], [[1, 0]], [[True, False]], "relevant and junk"),
        ([[1.0, 2]], [[1, 0]], [[1, 0]], "junk must be booleans"),
    ],
)
def test_bad_scores_are_refused(scores: list, gains: list, junk: list | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rank_scores(np.array(scores), np.array(gains), junk=None if junk is None else np.array(junk))
