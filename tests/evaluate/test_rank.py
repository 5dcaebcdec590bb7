from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from headgate.evaluate.rank import (
    effective_rank,
    numerical_rank,
    participation_ratio,
    rank_report,
    rankme,
    spectrum,
    srank,
    stable_rank,
)
from headgate.evaluate.rank_reference import rank_reference

MEASURES: dict[str, Any] = {
    "effective_rank": effective_rank,
    "rankme": rankme,
    "participation_ratio": participation_ratio,
    "stable_rank": stable_rank,
    "srank": srank,
    "numerical_rank": numerical_rank,
}


def with_spectrum(sigma: list[float], n: int = 200, seed: int = 0) -> np.ndarray:
    """Features whose centred singular values are ``sigma``."""
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((n, len(sigma)))
    left = np.linalg.qr(raw - raw.mean(axis=0))[0]
    return left * np.array(sigma) @ ortho_group.rvs(len(sigma), random_state=seed)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(60, 12), (48, 12), (200, 3)])
def test_measures_equal_their_definitions(name: str, center: bool, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    z = rng.standard_normal(shape) * np.linspace(0.1, 3, shape[1]) + 2
    expected = rank_reference(z, center)[name]
    assert MEASURES[name](z, center=center) == pytest.approx(expected, rel=1e-10)


def test_measures_of_a_hand_computed_spectrum() -> None:
    z = with_spectrum([2.0, 1.0, 1.0])
    # p = 1/2, 1/4, 1/4: entropy 1.5 log 2
    assert effective_rank(z) == pytest.approx(2**1.5)
    assert participation_ratio(z) == pytest.approx(36 / 18)
    assert stable_rank(z) == pytest.approx(6 / 4)
    assert srank(z) == 3
    assert srank(z, 0.25) == 2
    assert srank(z, 0.5) == 1
    assert numerical_rank(z) == 3
    p = np.array([0.5, 0.25, 0.25]) + 1e-7
    assert rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_equal_directions_have_full_rank_and_one_direction_has_rank_one(name: str) -> None:
    measure = MEASURES[name]
    assert measure(with_spectrum([3.0] * 5)) == pytest.approx(5, rel=1e-5)
    line = np.random.default_rng(0).standard_normal((100, 1)) * np.array([[1.0, -2.0, 0.5]])
    # rankme's 1e-7 per direction leaves a trace
    assert measure(line) == pytest.approx(1, rel=1e-5)


def test_srank_decides_exact_ties_by_the_definition() -> None:
    assert srank(with_spectrum([1.0] * 100, n=400)) == 99
    assert srank(with_spectrum([1.0] * 10), delta=0.3) == 7


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("center", [True, False])
def test_all_zero_features_have_rank_zero(name: str, center: bool) -> None:
    assert MEASURES[name](np.zeros((20, 4)), center=center) == 0


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("value", [0.1, 1e6, -3.3e-5])
def test_constant_features_have_rank_zero_when_centred_and_one_when_not(name: str, value: float) -> None:
    z = np.full((1003, 5), value)
    assert MEASURES[name](z, center=True) == 0
    assert MEASURES[name](z, center=False) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_unchanged_by_rotation_scale_offset_and_order(name: str) -> None:
    rng = np.random.default_rng(2)
    z = rng.standard_normal((80, 10)) * np.linspace(0.01, 2, 10)
    measure = MEASURES[name]
    base = measure(z, center=True)
    moved = 300 * z @ ortho_group.rvs(10, random_state=5) + 40
    assert measure(moved, center=True) == pytest.approx(base, rel=1e-9)
    assert measure(1e-9 * z[rng.permutation(80)], center=True) == pytest.approx(base, rel=1e-9)


def test_an_offset_hides_the_rank_of_uncentred_features() -> None:
    z = np.random.default_rng(3).standard_normal((100, 8)) + 50
    assert effective_rank(z) > 7
    assert rankme(z) < effective_rank(z, center=False) + 1e-3 < 3
    assert rankme(z, center=True) == pytest.approx(effective_rank(z), rel=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_do_not_depend_on_the_chunk(name: str) -> None:
    z = np.random.default_rng(4).standard_normal((101, 9))
    whole = MEASURES[name](z)
    for chunk in (1, 10, 100, 101, 5000):
        assert MEASURES[name](z, chunk=chunk) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_few_items_are_said_to_cap_the_measure(name: str) -> None:
    z = np.random.default_rng(5).standard_normal((11, 3))
    with pytest.warns(UserWarning, match=f"{name} is capped by N: N=11 items for d=3 dimensions, at least 4d=12"):
        MEASURES[name](z)
    wide = np.random.default_rng(5).standard_normal((6, 50))
    with pytest.warns(UserWarning, match="capped"):
        assert MEASURES[name](wide, center=True) <= 5 + 1e-4


def test_enough_items_raise_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    effective_rank(np.random.default_rng(6).standard_normal((12, 3)))
    assert not recwarn.list


def test_numerical_rank_ignores_the_rounding_of_the_dtype_that_came() -> None:
    rng = np.random.default_rng(7)
    exact = rng.standard_normal((100, 4)) @ rng.standard_normal((4, 10))
    assert numerical_rank(exact) == 4
    assert numerical_rank(exact.astype(np.float32)) == 4
    assert numerical_rank(torch.from_numpy(exact).float()) == 4
    assert numerical_rank(exact.astype(np.float32).astype(np.float64)) == 10
    assert numerical_rank(rng.integers(0, 9, (100, 4))) == 4
    full = torch.from_numpy(rng.standard_normal((2000, 4)))
    assert numerical_rank(full.bfloat16()) == numerical_rank(full.half()) == 4


def test_numerical_rank_takes_a_tolerance_on_the_singular_values() -> None:
    z = with_spectrum([4.0, 2.0, 1.0])
    assert [numerical_rank(z, tolerance=t) for t in (0.0, 0.9, 1.5, 3.0, 5.0)] == [3, 3, 2, 1, 0]
    # the value-network form, #{σ_i(Φ/√N) > ε}
    assert numerical_rank(z, center=False, tolerance=0.1 * np.sqrt(200)) == 2


def test_rank_report_holds_every_measure_and_says_whether_n_caps_them() -> None:
    z = np.random.default_rng(8).standard_normal((40, 6)) + 1
    report = rank_report(z)
    assert (report.n, report.dim, report.capped) == (40, 6, False)
    for name, measure in MEASURES.items():
        assert getattr(report, name) == measure(z)
    assert rank_report(z[:23]).capped
    assert not rank_report(z[:24]).capped


def test_spectrum_holds_sorted_log_eigenvalues() -> None:
    z = with_spectrum([1.0, 4.0, 2.0])
    found = spectrum(z)
    assert found.log_eigenvalues == pytest.approx(np.log([16.0, 4.0, 1.0]))
    slope = np.polyfit(np.log([1, 2, 3]), np.log([16.0, 4.0, 1.0]), 1)[0]
    assert found.decay_slope == pytest.approx(slope)


def test_spectrum_finds_the_exponent_of_a_power_law() -> None:
    index = np.arange(1, 21)
    assert spectrum(with_spectrum(list(index**-0.75))).decay_slope == pytest.approx(-1.5)
    assert spectrum(with_spectrum([1.0] * 10)).decay_slope == pytest.approx(0, abs=1e-9)


def test_spectrum_marks_vanishing_eigenvalues_and_leaves_them_out_of_the_slope() -> None:
    z = with_spectrum([4.0, 2.0, 1.0])
    padded = np.concatenate([z, z[:, :2]], axis=1)
    found = spectrum(padded)
    assert np.isneginf(found.log_eigenvalues).tolist() == [False] * 3 + [True] * 2
    kept = found.log_eigenvalues[:3]
    assert found.decay_slope == pytest.approx(np.polyfit(np.log([1, 2, 3]), kept, 1)[0])
    with pytest.warns(RuntimeWarning, match="decay slope of spectrum is undefined.*0 of the eigenvalues"):
        nothing = spectrum(np.zeros((20, 3)))
    assert np.isnan(nothing.decay_slope)
    assert np.isneginf(nothing.log_eigenvalues).all()


def test_measures_take_tensors_and_memory_maps(tmp_path: Path) -> None:
    z = np.random.default_rng(9).standard_normal((64, 5)).astype(np.float16)
    np.save(tmp_path / "z.npy", z)
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    base = effective_rank(z.astype(np.float64))
    assert effective_rank(mapped, chunk=10) == pytest.approx(base, rel=1e-12)
    assert effective_rank(torch.from_numpy(z).requires_grad_()) == pytest.approx(base, rel=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_refuse_bad_input(name: str) -> None:
    measure = MEASURES[name]
    z = np.ones((20, 3))
    z[4, 1] = np.nan
    with pytest.raises(ValueError, match="Z must be finite, got NaN in row 4"):
        measure(z)
    for shape in ((0, 3), (3, 0), (3,), (2, 2, 2)):
        with pytest.raises(ValueError, match="Z must have shape"):
            measure(np.ones(shape))
    with pytest.raises(TypeError, match="Z must be a NumPy array or a torch tensor, got list"):
        measure([[1.0]])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        measure(np.eye(4)[:, :1], chunk=0)


def test_options_out_of_range_are_refused() -> None:
    for delta in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="delta must lie in"):
            srank(np.ones((8, 2)), delta)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        numerical_rank(np.ones((8, 2)), tolerance=-1)
