from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score

from headgate.evaluate.clustering import (
    ari,
    clustering_accuracy,
    foreground_ari,
    mean_best_overlap,
    nmi,
    silhouette,
)
from headgate.evaluate.clustering_reference import (
    ari_reference,
    clustering_accuracy_reference,
    mean_best_overlap_reference,
    nmi_reference,
    silhouette_reference,
)


def labellings(seed: int, n: int = 40, classes: int = 3, clusters: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return y, np.where(rng.random(n) < 0.6, y, rng.integers(0, clusters, n))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("classes", "clusters"), [(3, 5), (5, 3), (4, 4)])
def test_scores_equal_their_definitions(seed: int, classes: int, clusters: int) -> None:
    y, ids = labellings(seed, classes=classes, clusters=clusters)
    assert nmi(y, ids) == pytest.approx(nmi_reference(y, ids))
    assert ari(y, ids) == pytest.approx(ari_reference(y, ids))
    assert clustering_accuracy(y, ids) == pytest.approx(clustering_accuracy_reference(y, ids))
    assert nmi(y, ids) == pytest.approx(normalized_mutual_info_score(y, ids))
    assert ari(y, ids) == pytest.approx(adjusted_rand_score(y, ids))


def test_scores_of_a_hand_computed_case() -> None:
    y, ids = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    # pairs together: 1 of 2 and 3; E = 2 · 3 / 6 = 1
    assert ari(y, ids) == pytest.approx((1 - 1) / (2.5 - 1))
    assert clustering_accuracy(y, ids) == 0.75
    information = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    entropies = np.log(2) - 0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert nmi(y, ids) == pytest.approx(2 * information / entropies)


@pytest.mark.parametrize("score", [nmi, ari, clustering_accuracy])
def test_scores_do_not_depend_on_names_or_order(score: Any) -> None:
    y, ids = labellings(7)
    base = score(y, ids)
    order = np.random.default_rng(0).permutation(len(y))
    assert score(y[order], ids[order]) == pytest.approx(base)
    assert score(100 - 7 * y, np.array([40, -3, 8, 11, 2])[ids]) == pytest.approx(base)
    assert score(torch.from_numpy(y), torch.from_numpy(ids).int()) == pytest.approx(base)
    assert score(y, 5 + y) == pytest.approx(1.0)


def test_random_clusters_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    y, ids = rng.integers(0, 4, 4000), rng.integers(0, 4, 4000)
    assert ari(y, ids) == pytest.approx(0, abs=0.005)
    assert nmi(y, ids) == pytest.approx(0, abs=0.005)
    assert clustering_accuracy(y, ids) == pytest.approx(0.25, abs=0.03)


def test_degenerate_partitions() -> None:
    one, each = np.zeros(6, dtype=int), np.arange(6)
    y = np.array([0, 0, 0, 1, 1, 1])
    assert ari(one, one) == nmi(one, one) == clustering_accuracy(one, one) == 1.0
    assert ari(y, one) == pytest.approx(0)
    assert nmi(y, one) == pytest.approx(0)
    assert clustering_accuracy(y, one) == 0.5
    assert ari(y, each) == pytest.approx(0)
    assert clustering_accuracy(y, each) == pytest.approx(2 / 6)


@pytest.mark.parametrize("score", [nmi, ari, clustering_accuracy])
def test_scores_refuse_bad_input(score: Any) -> None:
    y = np.arange(4)
    with pytest.raises(ValueError, match="clusters must have one entry per row: expected 4, got 3"):
        score(y, y[:3])
    with pytest.raises(TypeError, match="clusters must hold integers"):
        score(y, y.astype(float))
    with pytest.raises(ValueError, match="y must have shape"):
        score(y[:0], y[:0])
    with pytest.raises(ValueError, match="y must have shape"):
        score(y.reshape(2, 2), y)


def test_silhouette_equals_its_definition_and_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    z, ids = rng.standard_normal((40, 4)), np.concatenate([[9], rng.integers(0, 3, 39)])
    z += ids[:, None]
    assert silhouette(z, ids) == pytest.approx(silhouette_reference(z, ids))
    assert silhouette(z, ids, "cosine") == pytest.approx(silhouette_score(z, ids, metric="cosine"))


def test_silhouette_is_unchanged_by_rotation_scale_offset_order_and_memory() -> None:
    rng = np.random.default_rng(2)
    z, ids = rng.standard_normal((300, 4)), rng.integers(0, 3, 300)
    z += ids[:, None]
    base = silhouette(z, ids)
    order = rng.permutation(300)
    assert silhouette(3 * z @ ortho_group.rvs(4, random_state=0) + 9, ids + 5) == pytest.approx(base)
    assert silhouette(z[order], ids[order]) == pytest.approx(base)
    assert silhouette(z, ids, memory_mib=0.01) == pytest.approx(base, rel=1e-12)


def test_silhouette_limits_and_sampling() -> None:
    z = np.array([[0.0], [0.1], [100], [100.1]])
    assert silhouette(z, np.array([0, 0, 1, 1])) == pytest.approx(1, abs=0.01)
    assert silhouette(z, np.array([0, 1, 0, 1])) < 0
    rng = np.random.default_rng(3)
    many, ids = rng.standard_normal((500, 2)), rng.integers(0, 2, 500)
    first = silhouette(many, ids, max_items=50, seed=4)
    assert first == silhouette(many, ids, max_items=50, seed=4)
    assert first != silhouette(many, ids, max_items=50, seed=5)
    assert silhouette(many, ids, max_items=500) == silhouette(many, ids)


def test_silhouette_refuses_bad_input() -> None:
    z = np.random.default_rng(0).standard_normal((6, 2))
    for ids in (np.zeros(6, dtype=int), np.arange(6)):
        with pytest.raises(ValueError, match="clusters must be 2 to N - 1 in number"):
            silhouette(z, ids)
    ids = np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="metric must be one of"):
        silhouette(z, ids, "l1")  # type: ignore[arg-type]
    z[2] = 0
    with pytest.raises(ValueError, match="row 2"):
        silhouette(z, ids, "cosine")
    assert -1 <= silhouette(z, ids, "cosine", zero="ignore") <= 1
    z[4, 0] = np.nan
    with pytest.raises(ValueError, match="Z must be finite, got NaN in row 4"):
        silhouette(z, ids)
    with pytest.raises(ValueError, match="memory_mib must be positive"):
        silhouette(z[:3], ids[:3], memory_mib=0)


def scenes(seed: int = 0, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 4, (batch, 6, 6))
    return true, np.where(rng.random(true.shape) < 0.6, true, rng.integers(0, 5, true.shape))


def test_foreground_ari_is_the_ari_of_object_pixels_per_scene() -> None:
    true, predicted = scenes()
    found = foreground_ari(true, predicted)
    expected = [ari_reference(t[t != 0], p[t != 0]) for t, p in zip(true, predicted, strict=True)]
    assert found.per_scene == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.skipped == 0


def test_foreground_ari_ignores_the_background_and_its_boundary() -> None:
    true, predicted = scenes(1)
    spilled = np.where(true == 0, np.random.default_rng(0).integers(0, 9, true.shape), predicted)
    assert foreground_ari(true, spilled).mean == foreground_ari(true, predicted).mean
    assert foreground_ari(true, true).mean == 1.0
    assert foreground_ari(true + 5, predicted, background=5).mean == foreground_ari(true, predicted).mean
    assert foreground_ari(true, predicted, background=99).per_scene == pytest.approx(
        [ari_reference(t.ravel(), p.ravel()) for t, p in zip(true, predicted, strict=True)]
    )


def test_a_single_object_found_whole_scores_one_and_split_scores_zero() -> None:
    true = np.array([[0, 1, 1, 1], [0, 1, 1, 1]])
    predicted = np.array([[3, 3, 3, 3], [0, 1, 2, 2]])
    assert foreground_ari(true, predicted).per_scene.tolist() == [1.0, 0.0]


def test_mean_best_overlap_equals_its_definition() -> None:
    true, predicted = scenes(2)
    found = mean_best_overlap(true, predicted)
    expected = [mean_best_overlap_reference(t.ravel(), p.ravel()) for t, p in zip(true, predicted, strict=True)]
    assert found.per_scene == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(expected))


def test_mean_best_overlap_of_a_hand_computed_case() -> None:
    # object 1: 2 of segment 5's 3 pixels; object 2: 1 of 2 pixels in common with either segment
    true = np.array([[1, 1, 2, 2, 0, 0]])
    predicted = np.array([[5, 5, 5, 6, 6, 6]])
    assert mean_best_overlap(true, predicted).mean == pytest.approx((2 / 3 + 1 / 4) / 2)


def test_mean_best_overlap_sees_the_boundary_that_foreground_ari_ignores() -> None:
    true = np.zeros((1, 4, 4), dtype=int)
    true[0, :2, :2] = 1
    true[0, 2:, 2:] = 2
    exact = true
    halves = np.repeat([[1, 1, 2, 2]], 4, axis=0)[None]
    assert foreground_ari(true, exact).mean == foreground_ari(true, halves).mean == 1.0
    assert mean_best_overlap(true, exact).mean == 1.0
    assert mean_best_overlap(true, halves).mean == 0.5


@pytest.mark.parametrize("score", [foreground_ari, mean_best_overlap])
def test_scenes_without_an_object_are_skipped_and_counted(score: Any) -> None:
    true, predicted = scenes(3)
    base = score(true, predicted)
    empty = np.concatenate([np.zeros_like(true[:2]), true])
    found = score(torch.from_numpy(empty), torch.from_numpy(np.concatenate([predicted[:2], predicted])))
    assert found.skipped == 2
    assert np.isnan(found.per_scene[:2]).all()
    assert found.mean == pytest.approx(base.mean)
    with pytest.warns(RuntimeWarning, match=f"{score.__name__} is undefined .*no scene holds an object"):
        nothing = score(np.zeros((3, 4), dtype=int), np.ones((3, 4), dtype=int))
    assert np.isnan(nothing.mean)
    assert nothing.skipped == 3


@pytest.mark.parametrize("score", [foreground_ari, mean_best_overlap])
def test_scene_scores_do_not_depend_on_names_or_the_order_of_pixels(score: Any) -> None:
    true, predicted = scenes(4)
    order = np.random.default_rng(0).permutation(36)
    moved = score(true.reshape(4, -1)[:, order], 50 - predicted.reshape(4, -1)[:, order])
    assert moved.per_scene == pytest.approx(score(true, predicted).per_scene)


@pytest.mark.parametrize("score", [foreground_ari, mean_best_overlap])
def test_scene_scores_refuse_bad_input(score: Any) -> None:
    true, predicted = scenes(5)
    with pytest.raises(ValueError, match="masks and predicted must have one shape"):
        score(true, predicted[:, :3])
    with pytest.raises(ValueError, match="masks and predicted must have one shape"):
        score(true[:0], predicted[:0])
    with pytest.raises(ValueError, match="masks and predicted must have one shape"):
        score(true.ravel(), predicted.ravel())
    with pytest.raises(TypeError, match="predicted must hold integer ids, got dtype float64"):
        score(true, predicted.astype(float))
