from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import ortho_group

from headgate.evaluate.geometry import (
    alignment,
    coding_rate,
    dead_units,
    feature_std,
    rate_reduction,
    uniformity,
)
from headgate.evaluate.geometry_reference import (
    alignment_reference,
    coding_rate_reference,
    feature_std_reference,
    rate_reduction_reference,
    uniformity_reference,
)


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_feature_std_equals_its_definition_and_is_one_over_root_d_when_healthy() -> None:
    z = gaussian(0, 50, 6) + 1
    assert feature_std(z) == pytest.approx(feature_std_reference(z))
    assert feature_std(gaussian(1, 5000, 16)) == pytest.approx(np.full(16, 0.25), rel=0.05)
    assert feature_std(np.outer(np.arange(1.0, 9), [1.0, 2.0])) == pytest.approx([0, 0], abs=1e-12)


def test_feature_std_does_not_depend_on_scale_of_items_order_or_chunk() -> None:
    z = gaussian(2, 41, 5)
    base = feature_std(z)
    assert feature_std(z * np.linspace(0.1, 9, 41)[:, None]) == pytest.approx(base)
    assert feature_std(z[::-1]) == pytest.approx(base)
    for chunk in (1, 10, 41):
        assert feature_std(z, chunk=chunk) == pytest.approx(base, rel=1e-12)


def test_feature_std_names_the_zero_row_or_ignores_it() -> None:
    z = gaussian(3, 20, 3)
    z[13] = 0
    with pytest.raises(ValueError, match="row 13"):
        feature_std(z, chunk=5)
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-300)
    assert feature_std(z, zero="ignore") == pytest.approx(unit.std(axis=0))


def test_dead_units_counts_dimensions_without_variation() -> None:
    z = gaussian(4, 1001, 4)
    z[:, 1] = 0.1
    z[:, 3] = 1e6
    assert dead_units(z) == 0.5
    z[:, 2] *= 1e-7
    assert dead_units(z) == 0.75
    assert dead_units(z, threshold=1e-9) == 0.5
    assert dead_units(z, chunk=7) == 0.75
    assert dead_units(torch.from_numpy(z)) == 0.75
    with pytest.raises(ValueError, match="threshold must be positive"):
        dead_units(z, 0.0)


def test_coding_rate_of_a_hand_computed_case() -> None:
    # ZᵀZ = diag(4, 9), d/(N ε²) = 2/(2 · 0.25) = 4: ½ (log 17 + log 37)
    z = np.array([[2.0, 0.0], [0.0, 3.0]])
    assert coding_rate(z, 0.5) == pytest.approx(0.5 * np.log(17 * 37))
    assert coding_rate(z, 0.5, normalize=True) == pytest.approx(np.log(5))


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (7, 7), (1, 4)])
@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
def test_coding_rate_equals_its_definition_on_either_side(shape: tuple[int, int], eps: float) -> None:
    z = gaussian(5, *shape)
    assert coding_rate(z, eps) == pytest.approx(coding_rate_reference(z, eps), rel=1e-10)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    assert coding_rate(z, eps, normalize=True) == pytest.approx(coding_rate_reference(unit, eps), rel=1e-10)


def test_coding_rate_agrees_with_the_golden_measurement(shared_dir: Path) -> None:
    path = shared_dir / "golden" / "crate" / "coding_rate_and_ista"
    eps_squared = json.loads(path.with_suffix(".json").read_text())["config"]["eps"]
    stored = load_file(path.with_suffix(".safetensors"))
    per_sample = [
        sum(coding_rate(head, eps_squared**0.5, normalize=True) for head in sample) for sample in stored["in/z"]
    ]
    assert np.mean(per_sample) == pytest.approx(float(stored["out/mean"]), rel=1e-4)
    assert np.std(per_sample, ddof=1) == pytest.approx(float(stored["out/std"]), rel=1e-3)


def test_coding_rate_is_unchanged_by_rotation_order_and_chunk_and_grows_with_scale() -> None:
    z = gaussian(6, 60, 8)
    base = coding_rate(z)
    assert coding_rate(z @ ortho_group.rvs(8, random_state=0)) == pytest.approx(base)
    assert coding_rate(z[::-1]) == pytest.approx(base)
    for chunk in (1, 13, 60):
        assert coding_rate(z, chunk=chunk) == pytest.approx(base, rel=1e-12)
        assert coding_rate(z.T, chunk=chunk) == pytest.approx(coding_rate(z.T), rel=1e-12)
    assert coding_rate(10 * z, 1.0) == pytest.approx(base)
    assert coding_rate(2 * z) > base > coding_rate(z, 0.2)
    assert coding_rate(np.zeros((5, 3))) == 0.0


def test_rate_reduction_equals_its_definition() -> None:
    z, y = gaussian(7, 50, 5), np.random.default_rng(7).integers(0, 4, 50)
    found = rate_reduction(z, y, 0.5)
    assert found.reduction == pytest.approx(rate_reduction_reference(z, y, 0.5))
    assert found.whole == pytest.approx(coding_rate(z, 0.5))
    assert found.classes.tolist() == [0, 1, 2, 3]
    assert found.class_rates == pytest.approx([coding_rate(z[y == c], 0.5) for c in range(4)])
    assert found.within == pytest.approx(np.average(found.class_rates, weights=np.bincount(y)))
    assert found.reduction >= 0


def test_rate_reduction_is_large_for_orthogonal_classes_and_zero_for_one_class() -> None:
    y = np.repeat([3, 8], 50)
    axes = np.zeros((100, 4))
    axes[np.arange(100), (y == 8) * 2 + np.arange(100) % 2] = 1
    mixed = axes[np.random.default_rng(0).permutation(100)]
    assert rate_reduction(axes, y).reduction > rate_reduction(mixed, y).reduction + 1
    assert rate_reduction(axes, np.zeros(100, dtype=int)).reduction == pytest.approx(0, abs=1e-12)


def test_rate_reduction_normalizes_and_names_bad_rows() -> None:
    z, y = gaussian(8, 30, 4), np.arange(30) % 3
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    assert rate_reduction(z, y, normalize=True).reduction == pytest.approx(rate_reduction(unit, y).reduction)
    z[17] = 0
    with pytest.raises(ValueError, match="row 17"):
        rate_reduction(z, y, normalize=True, chunk=4)
    assert rate_reduction(z, y, normalize=True, zero="ignore").reduction > 0
    with pytest.raises(ValueError, match="y must have one entry per row: expected 30, got 29"):
        rate_reduction(z, y[:29])
    with pytest.raises(TypeError, match="y must hold integers"):
        rate_reduction(z, y.astype(float))
    with pytest.raises(ValueError, match="eps must be positive"):
        rate_reduction(z, y, 0.0)
    with pytest.raises(ValueError, match="eps must be positive"):
        coding_rate(z, -1.0)


def test_alignment_equals_its_definition_and_its_limits() -> None:
    x, y = gaussian(9, 30, 5), gaussian(10, 30, 5)
    assert alignment(x, y) == pytest.approx(alignment_reference(x, y))
    assert alignment(x, 7 * x) == pytest.approx(0, abs=1e-15)
    assert alignment(x, -x) == pytest.approx(4)
    assert alignment(np.eye(2), np.eye(2)[::-1]) == pytest.approx(2)
    rotation = ortho_group.rvs(5, random_state=1)
    assert alignment(x @ rotation, 3 * y @ rotation) == pytest.approx(alignment(x, y))
    assert alignment(x, y, chunk=7) == pytest.approx(alignment(x, y), rel=1e-12)
    assert alignment(x[::-1], y[::-1]) == pytest.approx(alignment(x, y))


def test_alignment_refuses_bad_pairs() -> None:
    x = gaussian(11, 10, 3)
    with pytest.raises(ValueError, match="same length, got X=10, Y=9"):
        alignment(x, x[:9])
    with pytest.raises(ValueError, match="same dim, got X=3, Y=2"):
        alignment(x, x[:, :2])
    y = x.copy()
    y[6] = 0
    with pytest.raises(ValueError, match=r"Y must .* row 6"):
        alignment(x, y, chunk=4)
    assert alignment(x, y, zero="ignore") == pytest.approx(0.1)


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_uniformity_equals_its_definition(t: float) -> None:
    z = gaussian(12, 40, 4)
    assert uniformity(z, t) == pytest.approx(uniformity_reference(z, t), rel=1e-12)


def test_uniformity_of_limits() -> None:
    assert uniformity(np.array([[1.0, 0], [2.0, 0]])) == pytest.approx(0, abs=1e-14)
    assert uniformity(np.array([[1.0, 0], [-2.0, 0]])) == pytest.approx(-8)
    # three pairs at distance² 2, 2 and 4
    z = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert uniformity(z) == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3))
    assert uniformity(gaussian(13, 500, 64)) < uniformity(gaussian(13, 500, 64) + 1) < 0


def test_uniformity_does_not_underflow() -> None:
    assert uniformity(np.eye(4), t=1000.0) == pytest.approx(-2000)


def test_uniformity_is_unchanged_by_rotation_scale_order_and_chunk() -> None:
    z = gaussian(14, 53, 6)
    base = uniformity(z)
    assert uniformity(5 * z @ ortho_group.rvs(6, random_state=2)) == pytest.approx(base)
    assert uniformity(z[::-1]) == pytest.approx(base)
    for chunk in (1, 10, 52, 53):
        assert uniformity(z, chunk=chunk) == pytest.approx(base, rel=1e-12)


def test_uniformity_samples_many_items_by_seed() -> None:
    z = gaussian(15, 300, 3)
    first = uniformity(z, max_items=50, seed=1)
    assert first == uniformity(z, max_items=50, seed=1)
    assert first != uniformity(z, max_items=50, seed=2)
    assert first == pytest.approx(uniformity(z), abs=0.3)
    assert uniformity(z, max_items=300, seed=1) == uniformity(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 0.0}, "t must be positive"),
        ({"max_items": 1}, "max_items must be at least 2"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"seed": -1, "max_items": 5}, "seed must be at least 0"),
    ],
)
def test_uniformity_refuses_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uniformity(gaussian(16, 10, 3), **options)


def test_uniformity_needs_two_items() -> None:
    with pytest.raises(ValueError, match="at least 2 rows"):
        uniformity(np.ones((1, 3)))
