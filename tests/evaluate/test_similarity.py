from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group, spearmanr
from sklearn.cross_decomposition import CCA

from headgate.evaluate.similarity import cka, cka_minibatch, mutual_knn, neighbour_overlap, pwcca, rsa, svcca
from headgate.evaluate.similarity_reference import (
    cka_reference,
    mutual_knn_reference,
    pwcca_reference,
    rsa_reference,
    svcca_reference,
)


def related(seed: int, n: int, dim_x: int, dim_y: int) -> tuple[np.ndarray, np.ndarray]:
    """Two representations that share part of their variation."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((n, min(dim_x, dim_y)))
    x = shared @ rng.standard_normal((shared.shape[1], dim_x)) + 0.5 * rng.standard_normal((n, dim_x))
    y = shared @ rng.standard_normal((shared.shape[1], dim_y)) + 0.5 * rng.standard_normal((n, dim_y))
    return x, y


CKA_FORMS = [("linear", True), ("linear", False), ("rbf", True), ("rbf", False)]


@pytest.mark.parametrize(("kernel", "debiased"), CKA_FORMS)
@pytest.mark.parametrize(("n", "dim_x", "dim_y"), [(30, 7, 4), (12, 20, 5), (10, 15, 40), (4, 3, 3), (13, 13, 13)])
def test_cka_equals_its_definition_by_kernel_matrices(
    kernel: Any, debiased: bool, n: int, dim_x: int, dim_y: int
) -> None:
    x, y = related(0, n, dim_x, dim_y)
    assert cka(x, y, kernel, debiased) == pytest.approx(cka_reference(x, y, kernel, debiased), rel=1e-9)


def test_cka_of_a_hand_computed_case() -> None:
    # Centred: X = (-1, 0, 1), Y = (-1, 2, -1) / 3 · ..., so XᵀY = 0 and 1 with itself.
    x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[0.0], [1.0], [0.0]])
    assert cka(x, y, debiased=False) == pytest.approx(0.0, abs=1e-12)
    # Squared correlation of (−1.5, −.5, .5, 1.5) and (−.5, −.5, .5, .5): (2 / sqrt(5 · 1))² = 0.8
    assert cka(np.arange(4.0)[:, None], np.array([[0.0], [0], [1], [1]]), debiased=False) == pytest.approx(0.8)


def test_debiased_cka_of_a_hand_computed_case() -> None:
    # K without diagonal for the centred points ±1.5, ±.5: rows sum to -x²; L likewise for ±.5.
    a, b = np.array([2.25, 0.25, 0.25, 2.25]), np.full(4, 0.25)

    def hsic(full: float, p: np.ndarray, q: np.ndarray) -> float:
        return full - p @ q + p.sum() * q.sum() / 6 - p @ q

    expected = hsic(4, a, b) / np.sqrt(hsic(25, a, a) * hsic(1, b, b))
    assert cka(np.arange(4.0)[:, None], np.array([[0.0], [0], [1], [1]])) == pytest.approx(expected)


def test_cka_of_independent_gaussians_is_high_when_biased_and_near_zero_when_debiased() -> None:
    biased, debiased = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((50, 400)), rng.standard_normal((50, 400))
        biased.append(cka(x, y, debiased=False))
        debiased.append(cka(x, y))
    assert np.mean(biased) == pytest.approx(0.88, abs=0.01)
    assert np.min(biased) > 0.87
    assert debiased[0] == pytest.approx(0.03, abs=0.001)
    assert abs(np.mean(debiased)) < 0.02
    assert np.abs(debiased).max() < 0.08


@pytest.mark.parametrize(("kernel", "debiased"), CKA_FORMS)
@pytest.mark.parametrize("dim", [6, 40])
def test_cka_is_unchanged_by_rotation_scale_offset_and_order(kernel: Any, debiased: bool, dim: int) -> None:
    x, y = related(1, 25, dim, 9)
    base = cka(x, y, kernel, debiased)
    order = np.random.default_rng(3).permutation(25)
    rotation = ortho_group.rvs(dim, random_state=0)
    assert cka(x @ rotation, y, kernel, debiased) == pytest.approx(base, rel=1e-9)
    assert cka(1e6 * x, 1e-6 * y, kernel, debiased) == pytest.approx(base, rel=1e-9)
    assert cka(x + 100.0, y - 3.0, kernel, debiased) == pytest.approx(base, rel=1e-8)
    assert cka(x[order], y[order], kernel, debiased) == pytest.approx(base, rel=1e-9)
    assert cka(y, x, kernel, debiased) == pytest.approx(base, rel=1e-12)
    assert cka(x[order], y, kernel, debiased) < base - 0.1


@pytest.mark.parametrize(("kernel", "debiased"), CKA_FORMS)
def test_cka_of_a_representation_with_itself_is_one(kernel: Any, debiased: bool) -> None:
    x, _ = related(2, 20, 5, 5)
    assert cka(x, 3 * x + 1, kernel, debiased) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("kernel", "debiased"), CKA_FORMS)
def test_cka_does_not_depend_on_the_chunk(kernel: Any, debiased: bool) -> None:
    for dim in (5, 50):
        x, y = related(3, 37, dim, dim)
        whole = cka(x, y, kernel, debiased, chunk=1000)
        for chunk in (1, 7, 36, 37):
            assert cka(x, y, kernel, debiased, chunk=chunk) == pytest.approx(whole, rel=1e-12)


def test_cka_is_linear_when_the_rbf_kernel_is_wide() -> None:
    x, y = related(4, 30, 6, 6)
    assert cka(x, y, "rbf", bandwidth=1e4) == pytest.approx(cka(x, y), rel=1e-5)
    assert abs(cka(x, y, "rbf", bandwidth=0.3) - cka(x, y)) > 0.01


def test_rbf_bandwidth_leaves_out_the_distances_of_duplicates() -> None:
    x, y = related(5, 12, 3, 3)
    x, y = np.concatenate([x, x[:8], x[:8]]), np.concatenate([y, y[:8], y[:8]])
    squares = pdist(x) ** 2
    assert np.median(squares[squares > 0]) != pytest.approx(np.median(squares), rel=1e-3)
    assert cka(x, y, "rbf") == pytest.approx(cka_reference(x, y, "rbf"), rel=1e-9)


def test_cka_survives_the_range_of_float64() -> None:
    x, y = related(6, 15, 4, 20)
    assert cka(1e120 * x, 1e-120 * y) == pytest.approx(cka(x, y), rel=1e-9)


def test_cka_agrees_with_the_golden_values(shared_dir: Path) -> None:
    path = shared_dir / "golden" / "relative-representations" / "relative_projection"
    stored = json.loads(path.with_suffix(".json").read_text())["cka"]
    tensors = load_file(path.with_suffix(".safetensors"))
    x, y = tensors["x"], tensors["cka_other"]
    assert cka(x, y, debiased=False) == pytest.approx(stored["linear"], rel=1e-4)
    assert cka(x, y, "rbf", debiased=False) == pytest.approx(stored["rbf_median_sigma"], rel=1e-4)


def test_cka_takes_tensors_and_half_precision() -> None:
    x, y = related(7, 20, 5, 5)
    base = cka(x, y)
    assert cka(torch.from_numpy(x), torch.from_numpy(y).requires_grad_()) == base
    assert cka(x.astype(np.float16), torch.from_numpy(y).bfloat16()) == pytest.approx(base, abs=0.02)


def test_minibatch_cka_averages_the_terms_before_dividing() -> None:
    x, y = related(8, 60, 5, 7)
    parts = [(x[i : i + 12], y[i : i + 12]) for i in range(0, 60, 12)]

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        n, one = len(a), np.ones(len(a))
        K, L = a @ a.T, b @ b.T
        np.fill_diagonal(K, 0)
        np.fill_diagonal(L, 0)
        value = (K * L).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * one @ K @ L @ one / (n - 2)
        return value / (n * (n - 3))

    xy, xx, yy = (
        np.mean([hsic(a, b) for a, b in pairs])
        for pairs in (parts, [(a, a) for a, _ in parts], [(b, b) for _, b in parts])
    )
    assert cka_minibatch(parts) == pytest.approx(xy / np.sqrt(xx * yy), rel=1e-9)
    assert cka_minibatch(parts) != pytest.approx(np.mean([cka(a, b) for a, b in parts]), rel=1e-4)


@pytest.mark.parametrize(("kernel", "debiased"), CKA_FORMS)
def test_minibatch_cka_of_one_batch_is_cka(kernel: Any, debiased: bool) -> None:
    x, y = related(9, 25, 5, 30)
    assert cka_minibatch(iter([(x, y)]), kernel, debiased) == pytest.approx(cka(x, y, kernel, debiased), rel=1e-10)


def test_debiased_minibatch_cka_converges_to_the_whole() -> None:
    x, y = related(10, 3000, 6, 6)
    batches = [(x[i : i + 20], y[i : i + 20]) for i in range(0, 3000, 20)]
    assert cka_minibatch(batches) == pytest.approx(cka(x, y), abs=0.01)
    assert cka_minibatch(batches, debiased=False) > cka(x, y) + 0.02


def test_minibatch_cka_weighs_no_batch_by_its_own_scale() -> None:
    x, y = related(11, 40, 3, 3)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    scaled = [(x[:20], y[:20]), (10 * x[20:], y[20:])]
    assert cka_minibatch(scaled) != pytest.approx(cka_minibatch(batches), rel=1e-4)
    assert cka_minibatch([(5 * a, b + 1) for a, b in batches]) == pytest.approx(cka_minibatch(batches), rel=1e-9)


@pytest.mark.parametrize(("kernel", "debiased"), CKA_FORMS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e8])
def test_constant_features_give_nan_and_the_reason(kernel: Any, debiased: bool, value: float) -> None:
    x = np.full((1001, 3), value)
    y = np.random.default_rng(0).standard_normal((1001, 2))
    with pytest.warns(RuntimeWarning, match="cka is undefined.*X is constant"):
        assert np.isnan(cka(x, y, kernel, debiased))
    with pytest.warns(RuntimeWarning, match="Y is constant"):
        assert np.isnan(cka(y, x, kernel, debiased))


def test_equidistant_items_give_nan_when_debiased() -> None:
    with pytest.warns(RuntimeWarning, match="equally similar"):
        assert np.isnan(cka(np.eye(6), np.random.default_rng(0).standard_normal((6, 2))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((3, 2)), np.ones((3, 2))), "at least 4 rows for the debiased CKA, got 3"),
        ((np.zeros((5, 2)), np.ones((6, 2))), "same length, got X=5, Y=6"),
        ((np.zeros((5, 0)), np.ones((5, 2))), "X must have shape"),
        ((np.zeros((0, 2)), np.ones((0, 2))), "X must have shape"),
        ((np.zeros(5), np.ones((5, 2))), "X must have shape"),
        ((np.zeros((5, 2)), np.array([[0.0], [1], [np.nan], [0], [0]])), "Y must be finite, got NaN in row 2"),
        (
            (np.array([[0.0], [1], [0], [np.inf], [0]]), np.zeros((5, 2))),
            "X must be finite, got infinite value in row 3",
        ),
        ((np.zeros((5, 2)), np.zeros((5, 2)), "cosine"), "kernel must be one of 'linear', 'rbf', got 'cosine'"),
    ],
)
def test_cka_refuses_bad_input(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cka(*arguments)


def test_cka_refuses_bad_options() -> None:
    x = np.eye(5)
    with pytest.raises(ValueError, match="at least 2 rows for the biased CKA, got 1"):
        cka(x[:1], x[:1], debiased=False)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        cka(x, x, "rbf", bandwidth=0.0)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        cka(x, x, chunk=0)
    with pytest.raises(TypeError, match="X must be a NumPy array or a torch tensor, got list"):
        cka([[1.0]], x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches must hold at least one"):
        cka_minibatch([])
    with pytest.raises(ValueError, match="X of batch 1 and Y of batch 1 must have at least 4 rows"):
        cka_minibatch([(x, x), (x[:3], x[:3])])


@pytest.mark.parametrize(("dim_x", "dim_y"), [(4, 4), (6, 3), (2, 5)])
@pytest.mark.parametrize("variance", [0.99, 0.8, 1.0])
def test_svcca_and_pwcca_equal_their_definitions(dim_x: int, dim_y: int, variance: float) -> None:
    x, y = related(12, 80, dim_x, dim_y)
    assert svcca(x, y, variance) == pytest.approx(svcca_reference(x, y, variance), rel=1e-8)
    assert pwcca(x, y, variance) == pytest.approx(pwcca_reference(x, y, variance), rel=1e-8)


def test_svcca_with_all_variance_is_the_cca_of_scikit_learn() -> None:
    x, y = related(13, 300, 3, 3)
    a, b = CCA(3, max_iter=10_000, tol=1e-12).fit_transform(x, y)
    expected = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)])
    assert svcca(x, y, 1.0) == pytest.approx(expected, abs=1e-6)


def test_svcca_is_unchanged_by_rotation_scale_offset_and_order() -> None:
    x, y = related(14, 100, 6, 4)
    order = np.random.default_rng(0).permutation(100)
    base = svcca(x, y)
    moved = 7 * x @ ortho_group.rvs(6, random_state=1) + 5
    assert svcca(moved, y) == pytest.approx(base, rel=1e-9)
    assert svcca(y, moved) == pytest.approx(base, rel=1e-9)
    assert svcca(x[order], y[order]) == pytest.approx(base, rel=1e-9)


def test_svcca_and_pwcca_are_one_for_an_invertible_map_and_small_for_independence() -> None:
    rng = np.random.default_rng(15)
    x = rng.standard_normal((2000, 5))
    y = x @ rng.standard_normal((5, 5))
    assert svcca(x, y, 1.0) == pytest.approx(1.0, abs=1e-9)
    assert pwcca(x, y, 1.0) == pytest.approx(1.0, abs=1e-9)
    other = rng.standard_normal((2000, 5))
    assert svcca(x, other) < 0.1
    assert pwcca(x, other) < 0.1


def test_svcca_leaves_out_directions_of_little_variance() -> None:
    rng = np.random.default_rng(16)
    strong, noise = rng.standard_normal((200, 2)), rng.standard_normal((200, 4))
    x = np.concatenate([10 * strong, 0.1 * noise[:, :2]], axis=1)
    y = np.concatenate([10 * strong, 0.1 * noise[:, 2:]], axis=1)
    assert svcca(x, y, 0.99) == pytest.approx(1.0, abs=1e-3)
    assert svcca(x, y, 1.0) < 0.7


def test_pwcca_weighs_the_directions_that_x_uses() -> None:
    rng = np.random.default_rng(17)
    a, b, noise = rng.standard_normal((3, 500, 1))
    x = np.concatenate([10 * a, b], axis=1)
    assert pwcca(x, np.concatenate([a, noise], axis=1), 1.0) > 0.85
    assert pwcca(x, np.concatenate([b, noise], axis=1), 1.0) < 0.3
    y = np.concatenate([a, noise], axis=1)
    assert pwcca(x, y @ ortho_group.rvs(2, random_state=0) * 3 - 1, 1.0) == pytest.approx(pwcca(x, y, 1.0), rel=1e-9)


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_svcca_and_pwcca_ask_for_five_items_per_kept_dimension(measure: Any) -> None:
    rng = np.random.default_rng(18)
    x = rng.standard_normal((25, 5))
    with pytest.raises(ValueError, match="N=25 for the 5 components"):
        measure(x, x, 1.0)
    assert measure(x[:, :4], x[:, :4], 1.0) == pytest.approx(1.0)
    wide = x[:, :2] @ rng.standard_normal((2, 30))
    assert measure(wide, wide) == pytest.approx(1.0)


@pytest.mark.parametrize("measure", [svcca, pwcca])
def test_svcca_and_pwcca_refuse_bad_input(measure: Any) -> None:
    x = np.random.default_rng(0).standard_normal((30, 2))
    for variance in (0.0, 1.1, np.nan):
        with pytest.raises(ValueError, match="variance must lie in"):
            measure(x, x, variance)
    with pytest.raises(ValueError, match="same length"):
        measure(x, x[:20])
    with pytest.warns(RuntimeWarning, match="Y is constant"):
        assert np.isnan(measure(x, np.ones((30, 3))))


def test_rsa_equals_its_definition_and_scipy() -> None:
    x, y = related(19, 15, 4, 6)
    assert rsa(x, y) == pytest.approx(rsa_reference(x, y), rel=1e-9)
    for metric in ("cosine", "correlation"):
        expected = spearmanr(pdist(x, metric), pdist(y, metric)).statistic
        assert rsa(x, y, metric) == pytest.approx(expected, rel=1e-9)


def test_rsa_of_a_hand_computed_case() -> None:
    # distances of X: 1, 3, 2 (ranks 1, 3, 2); of Y: 2, 1, 1 (ranks 3, 1.5, 1.5); Pearson of the ranks -√3/2
    assert rsa(np.array([[0.0], [1], [3]]), np.array([[0.0], [2], [1]])) == pytest.approx(-np.sqrt(3) / 2)


def test_rsa_is_unchanged_by_rotation_scale_offset_and_order() -> None:
    rng = np.random.default_rng(20)
    x = rng.integers(0, 2, (30, 6)).astype(np.float64)  # many tied distances
    y = x + 0.5 * rng.standard_normal((30, 6))
    base = rsa(x, y)
    order = rng.permutation(30)
    assert rsa(0.3 * x @ ortho_group.rvs(6, random_state=2) + 9, y) == pytest.approx(base, abs=1e-12)
    assert rsa(x[order], y[order]) == pytest.approx(base, abs=1e-12)
    assert all(rsa(x, y, chunk=chunk) == pytest.approx(base, abs=1e-12) for chunk in (1, 7, 30))
    assert rsa(1e200 * x, 1e-200 * y) == pytest.approx(base, abs=1e-12)
    assert rsa(x, x) == pytest.approx(1.0)


def test_rsa_refuses_what_has_no_distances() -> None:
    x = np.random.default_rng(0).standard_normal((6, 3))
    with pytest.raises(ValueError, match="at least 3 rows"):
        rsa(x[:2], x[:2])
    with pytest.raises(ValueError, match="metric must be one of"):
        rsa(x, x, "l1")  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="all pairwise distances of Y are equal"):
        assert np.isnan(rsa(x, np.eye(6)))
    x[2] = 0
    with pytest.raises(ValueError, match=r"X must .* no zero vector.* one in row 2"):
        rsa(x, x, "cosine")
    assert rsa(x, x, "cosine", zero="ignore") == pytest.approx(1.0)
    x[2] = 4.0
    with pytest.raises(ValueError, match="row 2"):
        rsa(x, x, "correlation")


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_mutual_knn_equals_its_definition(metric: Any) -> None:
    x, y = related(21, 40, 5, 8)
    for k in (1, 5, 39):
        assert mutual_knn(x, y, k, metric) == pytest.approx(mutual_knn_reference(x, y, k, metric), abs=1e-12)


def test_mutual_knn_of_a_hand_computed_case() -> None:
    # nearest in X: 1, 0, 1, 2; in Y: 1, 0, 3, 2
    x, y = np.array([[0.0], [1], [3], [6]]), np.array([[0.0], [1], [5], [6]])
    assert mutual_knn(x, y, 1, "l2") == 0.75
    assert mutual_knn(x, y, 3, "l2") == 1.0


def test_mutual_knn_is_unchanged_by_rotation_scale_order_and_chunk() -> None:
    x, y = related(22, 60, 5, 5)
    rotation, order = ortho_group.rvs(5, random_state=3), np.random.default_rng(1).permutation(60)
    for metric in ("cosine", "l2"):
        base = mutual_knn(x, y, 7, metric)
        assert 0.2 < base < 1
        assert mutual_knn(4 * x @ rotation, y, 7, metric) == base
        assert mutual_knn(x[order], y[order], 7, metric) == base
        assert all(mutual_knn(x, y, 7, metric, chunk=chunk) == base for chunk in (7, 13, 60))
    assert mutual_knn(x + 50, y - 2, 7, "l2") == mutual_knn(x, y, 7, "l2")


def test_mutual_knn_gives_ties_to_the_first_items() -> None:
    x = np.zeros((6, 2))
    assert mutual_knn(x, x, 2, "l2") == 1.0
    y = np.arange(6.0)[:, None]
    # all of X tie, so its neighbours are the first two other items: {1,2} {0,2} {0,1} {0,1} {0,1} {0,1};
    # in Y: {1,2} {0,2} {1,3} {2,4} {3,5} {3,4}
    assert mutual_knn(x, y, 2, "l2") == pytest.approx((2 + 2 + 1 + 0 + 0 + 0) / 12)


def test_mutual_knn_of_independent_spaces_is_at_chance() -> None:
    rng = np.random.default_rng(23)
    value = mutual_knn(rng.standard_normal((500, 10)), rng.standard_normal((500, 10)), 10)
    # 500 items with 10 draws each: standard error about sqrt(.02 · .98 / 5000) = .002
    assert value == pytest.approx(10 / 499, abs=0.006)


def test_mutual_knn_refuses_bad_input() -> None:
    x = np.random.default_rng(0).standard_normal((8, 3))
    with pytest.raises(ValueError, match=r"k must be in \[1, 7\], got 8"):
        mutual_knn(x, x, 8)
    with pytest.raises(TypeError, match="k must be an integer"):
        mutual_knn(x, x, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same length"):
        mutual_knn(x, x[:7], 2)
    with pytest.raises(ValueError, match="metric must be one of"):
        mutual_knn(x, x, 2, "hamming")  # type: ignore[arg-type]
    y = x.copy()
    y[4] = 0
    with pytest.raises(ValueError, match=r"Y must .* no zero vector.* one in row 4"):
        mutual_knn(x, y, 2)
    assert 0 < mutual_knn(x, y, 2, zero="ignore") < 1


def test_neighbour_overlap_counts_shared_ids_in_any_order() -> None:
    first, second = np.array([[3, 1, 2], [0, 1, 2]]), np.array([[1, 2, 3], [5, 2, 7]])
    assert neighbour_overlap(first, second).tolist() == [3, 1]
