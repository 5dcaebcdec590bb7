from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from headgate.evaluate import Split, cmc_at_k, knn_probe, rank_by_label, search
from headgate.evaluate.probes_reference import knn_reference

DIGITS, LABELS = load_digits(return_X_y=True)
X, Y = DIGITS[:400], LABELS[:400]
SPLIT = Split.random(Y, seed=0)


@pytest.mark.parametrize(("k", "temperature"), [(1, None), (5, None), (20, 0.07), (20, 0.005)])
def test_predictions_equal_the_definition(k: int, temperature: float | None) -> None:
    options: dict[str, Any] = {"weights": "uniform"} if temperature is None else {"temperature": temperature}
    result = knn_probe(X, Y, SPLIT, k, **options)
    train = np.sort(SPLIT.train)
    rows = SPLIT.test[:25]
    expected = [knn_reference(X[train], Y[train], X[row], k, temperature) for row in rows]
    assert result.predictions[:25].tolist() == expected


def test_uniform_votes_by_distance_are_those_of_scikit_learn() -> None:
    result = knn_probe(X, Y, SPLIT, 7, metric="l2")
    model = KNeighborsClassifier(7, algorithm="brute").fit(X[np.sort(SPLIT.train)], Y[np.sort(SPLIT.train)])
    assert (result.predictions == model.predict(X[SPLIT.test])).all()


def test_one_neighbour_is_top_one_retrieval() -> None:
    result = knn_probe(X, Y, SPLIT, 1)
    train = np.sort(SPLIT.train)
    ranking = rank_by_label(search(X[SPLIT.test], X[train], 1).ids, Y[SPLIT.test], Y[train])
    assert result.accuracy == cmc_at_k(ranking, 1)
    assert result.accuracy == knn_probe(X, Y, SPLIT, 1, weights="uniform").accuracy


def test_equal_votes_go_to_the_smallest_label() -> None:
    points = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for labels, winner in (([7, 3, 3], 3), ([2, 9, 2], 2)):
        result = knn_probe(points, np.array(labels), Split(np.array([0, 1]), np.zeros(0, int), np.array([2])), 2)
        assert result.predictions.tolist() == [winner]


def test_votes_that_differ_by_rounding_alone_are_equal() -> None:
    # The cosine of (1, 1, 1, 1) does not see the order of the coordinates; its rounding does.
    query = np.ones((1, 4))
    turned = np.array(list(permutations([0.1, 0.2, 0.3, 0.7])))
    scores = np.array([search(query, row[None], 1).scores[0, 0] for row in turned])
    larger, smaller = turned[scores.argmax()], turned[scores.argmin()]
    assert 0 < scores.max() - scores.min() < 1e-15
    points = np.stack([larger, smaller, query[0]])
    split = Split(np.arange(2), np.zeros(0, int), np.array([2]))
    assert knn_probe(points, np.array([1, 0, 0]), split, 2).predictions.tolist() == [0]


def test_the_weights_fall_with_the_temperature() -> None:
    points = np.array([[1.0, 0.01], [0.8, 0.6], [0.8, -0.6], [1.0, 0.0]])
    labels, split = np.array([5, 1, 1, 5]), Split(np.arange(3), np.zeros(0, int), np.array([3]))
    assert knn_probe(points, labels, split, 3, temperature=0.07).predictions.tolist() == [5]
    assert knn_probe(points, labels, split, 3, temperature=10.0).predictions.tolist() == [1]
    assert knn_probe(points, labels, split, 3, weights="uniform").predictions.tolist() == [1]
    scores = knn_probe(points, labels, split, 3, temperature=1e-4).scores
    assert np.isfinite(scores).all()


def test_the_number_of_neighbours_is_chosen_on_the_validation_rows() -> None:
    result = knn_probe(X, Y, SPLIT, (1, 3, 200), weights="uniform")
    accuracies = {
        k: knn_probe(X, Y, Split(SPLIT.train, np.zeros(0, int), SPLIT.val), k, weights="uniform").accuracy
        for k in (1, 3, 200)
    }
    best = max(accuracies.values())
    assert result.chosen["k"] == min(k for k, value in accuracies.items() if value == best)
    assert result.selection_score == best


def test_the_order_of_the_rows_and_the_chunk_do_not_matter() -> None:
    rows = np.concatenate([X[:100], X[:100]])
    labels = np.concatenate([Y[:100], (Y[:100] + 1) % 10])
    split = Split(np.arange(150), np.zeros(0, int), np.arange(150, 200))
    expected = knn_probe(rows, labels, split, 5)
    shuffled = Split(np.random.default_rng(0).permutation(150), split.val, split.test)
    for other in (knn_probe(rows, labels, shuffled, 5), knn_probe(rows, labels, split, 5, chunk=13)):
        assert (other.predictions == expected.predictions).all()
        np.testing.assert_allclose(other.scores, expected.scores)


def test_random_features_give_chance() -> None:
    noise, labels = np.random.default_rng(0).normal(size=(1500, 10)), np.arange(1500) % 3
    split = Split.random(labels, seed=0)
    bound = 3 * np.sqrt(2 / 9 / len(split.test))
    assert abs(knn_probe(noise, labels, split).accuracy - 1 / 3) < bound


def test_an_absent_class_counts_as_an_error() -> None:
    split = Split(SPLIT.train[Y[SPLIT.train] != 0], np.zeros(0, int), SPLIT.test)
    with pytest.warns(UserWarning, match=r"\[0\] are absent"):
        result = knn_probe(X, Y, split, 5)
    assert result.absent == (0,)
    assert (result.predictions != 0).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"k": len(SPLIT.train) + 1}, rf"k must be in \[1, {len(SPLIT.train)}\]"),
        ({"k": 0}, "k must be in"),
        ({"metric": "l2", "weights": "exp"}, "weights='exp' needs metric='cosine'"),
        ({"weights": "rank"}, "weights must be one of"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"k": (1, 2), "split": Split(np.arange(10), np.zeros(0, int), np.array([11]))}, "validation rows to choose k"),
        ({"X": np.where(np.arange(400)[:, None] == SPLIT.train[3], 0.0, X)}, "zero vector"),
    ],
)
def test_bad_arguments_are_named(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        knn_probe(**{"X": X, "y": Y, "split": SPLIT, "k": 5, **changes})
