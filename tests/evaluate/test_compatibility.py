from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from headgate.evaluate import (
    compatibility_matrix,
    compatibility_report,
    pairwise_compatibility,
    retrieval_report,
)

LABELS = np.repeat(np.arange(6), 10)


def embeddings(spread: float, dim: int, seed: int, rotation: int = 0) -> np.ndarray:
    """Clusters of one shape, seen with noise ``spread``, in a space that ``rotation`` turns."""
    centres = np.random.default_rng(50).normal(size=(6, dim))
    rows = centres[LABELS] + spread * np.random.default_rng(seed).normal(size=(60, dim))
    turn = np.linalg.qr(np.random.default_rng(rotation).normal(size=(dim, dim)))[0] if rotation else np.eye(dim)
    return rows @ turn


OLD = embeddings(1.4, 8, 1)
BETTER = embeddings(0.8, 8, 2)
STRANGER = embeddings(0.8, 8, 3, rotation=9)
SELF: dict[str, Any] = {"exclude": "self", "query_ids": np.arange(60), "gallery_ids": np.arange(60)}


def test_the_figures_are_those_of_four_retrievals() -> None:
    new = np.concatenate([BETTER, 0.1 * np.random.default_rng(4).normal(size=(60, 2))], axis=1)
    report = compatibility_report(new, new, OLD, OLD, STRANGER, STRANGER, LABELS, **SELF)
    assert report.compatible_dim == 8
    for name in ("cmc@1", "map_full"):
        score = report.scores[name]

        def measure(queries: np.ndarray, gallery: np.ndarray, name: str = name) -> float:
            return retrieval_report(queries, gallery, LABELS, LABELS, (name,), **SELF).values[name]

        assert score.old_old == measure(OLD, OLD)
        assert score.new_old == measure(new[:, :8], OLD)
        assert score.new_new == measure(new, new)
        assert score.independent == measure(STRANGER, STRANGER)
        assert score.gain.mean == pytest.approx(score.new_old - score.old_old)
        assert score.p_comp == pytest.approx((score.new_old - score.old_old) / (score.independent - score.old_old))
        assert score.p_up == pytest.approx((score.new_new - score.independent) / score.independent)
        assert score.reasons == ()


def test_a_better_model_in_the_same_space_is_compatible_and_a_turned_one_is_not() -> None:
    same = compatibility_report(BETTER, BETTER, OLD, OLD, STRANGER, STRANGER, LABELS, **SELF).scores["map_full"]
    assert same.compatible
    assert same.gain.p_value < 0.01
    assert same.gain.low > 0
    turned = compatibility_report(STRANGER, STRANGER, OLD, OLD, STRANGER, STRANGER, LABELS, **SELF).scores["map_full"]
    assert not turned.compatible
    assert turned.gain.p_value > 0.99
    assert turned.p_comp < 0
    assert turned.p_up == 0


def test_a_model_that_did_not_change_gains_nothing_and_is_not_called_compatible() -> None:
    score = compatibility_report(OLD, OLD, OLD, OLD, BETTER, BETTER, LABELS, **SELF).scores["cmc@1"]
    assert not score.compatible
    assert score.gain.mean == 0
    assert score.p_comp == 0


def test_ratios_without_a_denominator_are_nan_with_a_reason() -> None:
    score = compatibility_report(BETTER, BETTER, BETTER, BETTER, OLD, OLD, LABELS, **SELF).scores["map_full"]
    assert math.isnan(score.p_comp)
    assert "p_comp: the independent model" in score.reasons[0]
    assert not math.isnan(score.p_up)
    # The independent queries lie in the cluster of the other class.
    rows, labels = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 1])
    lost = compatibility_report(rows, rows, rows, rows, rows, rows[::-1].copy(), labels, metrics=("cmc@1",)).scores[
        "cmc@1"
    ]
    assert math.isnan(lost.p_up)
    assert "p_up: the independent model scores 0" in lost.reasons[1]


def test_queries_and_gallery_may_be_different_sets_and_tensors() -> None:
    half = slice(0, 30)
    report = compatibility_report(
        *(torch.from_numpy(rows[part]) for rows in (BETTER, OLD, STRANGER) for part in (half, slice(30, 60))),
        LABELS[half] % 3,
        LABELS[30:] % 3,
        metrics=("recall@5",),
        k=5,
    )
    assert 0 < report.scores["recall@5"].old_old < 1


@pytest.mark.parametrize(
    ("new", "changes", "match"),
    [
        (
            BETTER[:, :5],
            {},
            "compatible_dim must be given where the new embedding is narrower than the old one, got 5 < 8",
        ),
        (BETTER, {"compatible_dim": 9}, r"compatible_dim must be in \[1, 8\]"),
        (BETTER[:59], {}, "q_new and q_old and q_independent must have the same length"),
        (BETTER, {"metrics": ("speed",)}, "metric must be one of"),
    ],
)
def test_bad_arguments_are_named(new: np.ndarray, changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compatibility_report(new, new, OLD, OLD, BETTER, BETTER, LABELS, **changes)


def test_a_narrower_model_is_compared_on_the_given_coordinates() -> None:
    narrow = BETTER[:, :5]
    report = compatibility_report(narrow, narrow, OLD, OLD, BETTER, BETTER, LABELS, compatible_dim=4, **SELF)
    expected = retrieval_report(narrow[:, :4], OLD[:, :4], LABELS, LABELS, ("map_full",), **SELF).values["map_full"]
    assert report.scores["map_full"].new_old == expected


def test_a_sequence_of_versions_fills_the_lower_triangle() -> None:
    best = np.concatenate([embeddings(0.4, 8, 5), np.ones((60, 1))], axis=1)
    versions = [(OLD, OLD), (BETTER, BETTER), (best, best)]
    result = compatibility_matrix(versions, LABELS, score="map_full", **SELF)
    assert np.isnan(result.values[np.triu_indices(3, 1)]).all()
    assert result.values[0, 0] == retrieval_report(OLD, OLD, LABELS, LABELS, **SELF).values["map_full"]
    assert result.values[2, 1] == retrieval_report(best[:, :8], BETTER, LABELS, LABELS, **SELF).values["map_full"]
    assert result.share == 1.0
    with_stranger = compatibility_matrix([(OLD, OLD), (BETTER, BETTER), (STRANGER, STRANGER)], LABELS, **SELF)
    assert with_stranger.share == pytest.approx(1 / 3)
    assert compatibility_matrix([(OLD, OLD), (OLD, OLD)], LABELS, **SELF).share == 0.0
    with pytest.raises(ValueError, match="at least two models"):
        compatibility_matrix([(OLD, OLD)], LABELS)


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_the_pairwise_shares_equal_a_count_over_all_pairs(metric: str) -> None:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        if metric == "l2":
            return float(np.linalg.norm(a - b))
        scale = np.linalg.norm(a) * np.linalg.norm(b) if metric == "cosine" else 1.0
        return -float(a @ b / scale)

    rows = slice(0, 60, 4)
    new, old, labels = BETTER[rows], OLD[rows], LABELS[rows]
    kept: dict[bool, list[bool]] = {True: [], False: []}
    for i in range(15):
        for j in range(15):
            if i == j:
                continue
            across, within = distance(new[i], old[j]), distance(old[i], old[j])
            same = bool(labels[i] == labels[j])
            kept[same].append(across <= within if same else across >= within)
    for chunk in (4, 2048):
        result = pairwise_compatibility(new, old, labels, metric=metric, chunk=chunk)
        assert result.same_class == pytest.approx(np.mean(kept[True]))
        assert result.different_class == pytest.approx(np.mean(kept[False]))


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_a_model_that_did_not_change_keeps_every_pair(metric: str) -> None:
    assert pairwise_compatibility(OLD, OLD.copy(), LABELS, metric=metric, chunk=7) == (1.0, 1.0)


def test_a_kind_of_pair_that_does_not_exist_is_nan_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match="no same-class pair"):
        result = pairwise_compatibility(OLD[:3], OLD[:3], np.array([0, 1, 2]))
    assert math.isnan(result.same_class)
    assert result.different_class == 1.0
