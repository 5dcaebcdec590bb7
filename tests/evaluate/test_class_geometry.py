from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from headgate.evaluate.class_geometry import (
    centroid_cosine,
    class_relations,
    hierarchy_similarity,
    neural_collapse,
)
from headgate.evaluate.class_geometry_reference import (
    centroid_cosine_reference,
    class_relations_reference,
    neural_collapse_reference,
)


def clusters(seed: int = 0, n: int = 120, dim: int = 7, num_classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Features of unequally frequent classes with labels 10, 20, …"""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, n - num_classes)])
    return 2 * rng.standard_normal((num_classes, dim))[y] + rng.standard_normal((n, dim)) + 3, 10 * (y + 1)


def simplex(num_classes: int, copies: int = 3) -> tuple[np.ndarray, np.ndarray]:
    y = np.repeat(np.arange(num_classes), copies)
    return np.eye(num_classes)[y], y


@pytest.mark.parametrize("num_classes", [2, 4, 12])
def test_neural_collapse_equals_its_definition(num_classes: int) -> None:
    z, y = clusters(num_classes=num_classes)
    found = neural_collapse(z, y)
    for name, value in neural_collapse_reference(z, y).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-8, abs=1e-12), name


def test_neural_collapse_of_a_hand_computed_case() -> None:
    # classes at ±2 with deviations ±1: Σ_W = 1, Σ_B = 4, K = 2
    found = neural_collapse(np.array([[-3.0], [-1.0], [1.0], [3.0]]), np.array([0, 0, 1, 1]))
    assert found.within_between == pytest.approx(1 / 8)
    assert found.cosines == pytest.approx(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert found.mean_angle == pytest.approx(180)
    assert (found.cosine_std, found.simplex_gap, found.norm_variation) == pytest.approx((0, 0, 0), abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_a_collapsed_simplex_scores_zero_everywhere(num_classes: int) -> None:
    found = neural_collapse(*simplex(num_classes))
    scores = (found.within_between, found.cosine_std, found.simplex_gap, found.norm_variation)
    assert scores == pytest.approx((0, 0, 0, 0), abs=1e-12)
    assert found.mean_angle == pytest.approx(np.degrees(np.arccos(-1 / (num_classes - 1))))
    assert np.diag(found.angles) == pytest.approx(np.zeros(num_classes), abs=1e-5)


def test_variation_orthogonal_to_the_class_means_does_not_count() -> None:
    z, y = simplex(3, 40)
    extra = np.random.default_rng(0).standard_normal((120, 2))
    for label in range(3):
        extra[y == label] -= extra[y == label].mean(axis=0)
    assert neural_collapse(np.concatenate([z, extra], axis=1), y).within_between == pytest.approx(0, abs=1e-20)


def test_neural_collapse_is_unchanged_by_rotation_scale_offset_order_and_chunk() -> None:
    z, y = clusters(1)
    base = neural_collapse(z, y)
    order = np.random.default_rng(0).permutation(len(z))
    moved = 9 * z @ ortho_group.rvs(7, random_state=1) - 50
    for found in (neural_collapse(moved, y), neural_collapse(z[order], y[order]), neural_collapse(z, y, chunk=11)):
        assert found.within_between == pytest.approx(base.within_between)
        assert found.cosines == pytest.approx(base.cosines)
        assert found.norm_variation == pytest.approx(base.norm_variation)
    assert base.classes.tolist() == [10, 20, 30, 40]


def test_coinciding_class_means_give_nan_and_not_collapse() -> None:
    z = np.tile(np.random.default_rng(0).standard_normal((8, 3)), (2, 1)) + 0.1
    with pytest.warns(RuntimeWarning, match="all class means coincide"):
        found = neural_collapse(z, np.repeat([0, 1], 8))
    assert np.isnan([found.within_between, found.mean_angle, found.cosine_std, found.norm_variation]).all()
    assert np.isnan(found.cosines).all()


def test_a_class_mean_on_the_global_mean_has_no_angle() -> None:
    z, y = np.array([[1.0, 0], [-1.0, 0], [0, 0]]), np.arange(3)
    found = neural_collapse(z, y)
    assert np.isnan(found.cosines[2]).all()
    assert found.cosines[0, 1] == pytest.approx(-1)
    assert found.mean_angle == pytest.approx(180)
    assert found.norm_variation == pytest.approx(np.std([1, 1, 0]) / np.mean([1, 1, 0]))


def test_neural_collapse_refuses_bad_input() -> None:
    z = np.random.default_rng(0).standard_normal((6, 2))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        neural_collapse(z, np.zeros(6, dtype=int))
    with pytest.raises(ValueError, match="expected 6, got 5"):
        neural_collapse(z, np.arange(5))
    with pytest.raises(TypeError, match="y must hold integers, got dtype float64"):
        neural_collapse(z, np.zeros(6))
    with pytest.raises(ValueError, match="Z must be finite"):
        neural_collapse(np.full((6, 2), np.inf), np.arange(6))


@pytest.mark.parametrize("center", [True, False])
def test_centroid_cosine_equals_its_definition(center: bool) -> None:
    z, y = clusters(2)
    found = centroid_cosine(z, y, center)
    assert found == pytest.approx(centroid_cosine_reference(z, y, center))
    assert centroid_cosine(torch.from_numpy(z), torch.from_numpy(y), center, chunk=9) == pytest.approx(found)


def test_centroid_cosine_of_a_hand_computed_case() -> None:
    z, y = np.array([[2.0, 0], [4, 0], [0, 5], [3, 3]]), np.array([7, 7, 8, 9])
    half = np.sqrt(0.5)
    assert centroid_cosine(z, y, False) == pytest.approx(np.array([[1, 0, half], [0, 1, half], [half, half, 1]]))


def test_centring_removes_what_all_classes_share() -> None:
    z, y = clusters(3)
    shifted = z + 1000
    assert centroid_cosine(shifted, y, False).min() > 0.999
    assert centroid_cosine(shifted, y) == pytest.approx(centroid_cosine(z, y), abs=1e-9)


def test_a_zero_centroid_is_refused_or_ignored() -> None:
    z, y = np.array([[1.0, 0], [-1.0, 0], [0.1, 3], [-0.1, -3]]), np.array([0, 1, 2, 2])
    with pytest.raises(ValueError, match=r"centroids of the classes must .* row 2"):
        centroid_cosine(z, y)
    assert centroid_cosine(z, y, zero="ignore") == pytest.approx(np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 0]]))


def test_class_relations_equal_spearman_with_the_reference() -> None:
    z, y = clusters(4, num_classes=6)
    reference = np.random.default_rng(1).random((6, 6))
    reference = reference + reference.T
    found = class_relations(z, y, reference)
    assert found.spearman == pytest.approx(class_relations_reference(z, y, reference))
    assert found.matrix == pytest.approx(centroid_cosine(z, y))
    assert class_relations(z, y, -reference).spearman == pytest.approx(-found.spearman)
    assert class_relations(z, y, reference + np.diag(np.full(6, 99.0))).spearman == pytest.approx(found.spearman)
    assert class_relations(z, y, np.exp(reference)).spearman == pytest.approx(found.spearman)


def test_class_relations_find_a_planted_hierarchy() -> None:
    rng = np.random.default_rng(5)
    super_class = np.array([[0], [0], [0], [1], [1], [1]])
    gates = rng.standard_normal((2, 16))[super_class[:, 0]] + 0.3 * rng.standard_normal((6, 16))
    found = class_relations(gates, np.arange(6), hierarchy_similarity(super_class))
    assert found.spearman > 0.8
    shuffled = class_relations(gates[[0, 3, 1, 4, 2, 5]], np.arange(6), hierarchy_similarity(super_class))
    assert abs(shuffled.spearman) < 0.5


def test_class_relations_without_variation_are_nan_with_the_reason() -> None:
    z, y = clusters(6, num_classes=3)
    with pytest.warns(RuntimeWarning, match="the reference is the same for all pairs"):
        assert np.isnan(class_relations(z, y, np.ones((3, 3))).spearman)
    with pytest.warns(RuntimeWarning, match="the matrix of cosines is the same for all pairs"):
        assert np.isnan(
            class_relations(*simplex(4), np.arange(16.0).reshape(4, 4) + np.arange(16.0).reshape(4, 4).T).spearman
        )


def test_class_relations_refuse_a_reference_that_does_not_fit() -> None:
    z, y = clusters(7)
    with pytest.raises(ValueError, match=r"reference must have shape \(class, class\) of sizes \(4, 4\)"):
        class_relations(z, y, np.ones((3, 3)))
    with pytest.raises(ValueError, match="reference must be symmetric"):
        class_relations(z, y, np.arange(16.0).reshape(4, 4))
    with pytest.raises(ValueError, match="reference must be finite"):
        class_relations(z, y, np.full((4, 4), np.nan))


def test_hierarchy_similarity_counts_levels_down_to_the_first_that_differs() -> None:
    levels = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]])
    assert hierarchy_similarity(levels).tolist() == [[3, 2, 1, 0], [2, 3, 1, 0], [1, 1, 3, 0], [0, 0, 0, 3]]
    with pytest.raises(TypeError, match="levels must hold integers"):
        hierarchy_similarity(levels.astype(float))
    with pytest.raises(ValueError, match="levels must have shape"):
        hierarchy_similarity(np.zeros(3, dtype=int))
