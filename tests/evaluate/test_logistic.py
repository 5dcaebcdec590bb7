from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from headgate.evaluate.logistic import fit_logistic, fit_logistic_torch
from headgate.evaluate.probe_data import Scaler
from headgate.evaluate.probes_reference import logistic_objective_reference

DIGITS, LABELS = load_digits(return_X_y=True)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_both_solvers_find_the_same_minimum(classes: int, C: float) -> None:
    labels = LABELS % classes
    train, test = np.arange(0, 1797, 3), np.arange(1, 1797, 3)
    scaler = Scaler.fit(DIGITS, train, "standardize")
    ours = fit_logistic_torch(DIGITS, labels, train, scaler, C, chunk=100)
    theirs = fit_logistic(scaler(DIGITS[train]), labels[train], C)
    assert ours.converged
    assert theirs.converged
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=0.02 * np.abs(theirs.weights).max())
    accuracy = [(model.decide(scaler(DIGITS[test])).argmax(axis=1) == labels[test]).mean() for model in (ours, theirs)]
    assert abs(accuracy[0] - accuracy[1]) <= 0.002


def test_the_minimum_is_one_of_the_stated_objective() -> None:
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(40, 3)), generator.integers(0, 3, 40)
    for model in (
        fit_logistic(X, y, 0.5, tol=1e-10),
        fit_logistic_torch(X, y, np.arange(40), Scaler.fit(X, np.arange(40), "none"), 0.5, tol=1e-10),
    ):
        best = logistic_objective_reference(X, y, model.weights, model.bias, 0.5)
        for _ in range(50):
            step = 1e-3 * generator.normal(size=(3, 4))
            moved = logistic_objective_reference(X, y, model.weights + step[:, :3], model.bias + step[:, 3], 0.5)
            assert moved > best


def test_two_classes_share_one_weight_vector() -> None:
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(30, 4)), generator.integers(0, 2, 30) * 5
    for model in (fit_logistic(X, y, 1.0), fit_logistic_torch(X, y, np.arange(30), Scaler.fit(X, y, "none"), 1.0)):
        assert model.classes.tolist() == [0, 5]
        assert (model.weights[0] == 0).all()
        assert model.bias[0] == 0


def test_the_chunk_does_not_change_the_solution() -> None:
    train = np.arange(300)
    scaler = Scaler.fit(DIGITS, train, "standardize")
    whole, parts = (fit_logistic_torch(DIGITS, LABELS, train, scaler, 1.0, chunk=chunk) for chunk in (1000, 37))
    np.testing.assert_allclose(whole.weights, parts.weights, atol=1e-4)


def test_a_solver_that_runs_out_of_iterations_says_so() -> None:
    train = np.arange(300)
    scaler = Scaler.fit(DIGITS, train, "standardize")
    assert not fit_logistic_torch(DIGITS, LABELS, train, scaler, 1.0, max_iter=2).converged
    assert not fit_logistic(scaler(DIGITS[train]), LABELS[train], 1.0, max_iter=2).converged


def test_scaling_uses_the_given_rows_and_leaves_constant_columns_alone() -> None:
    X = np.array([[1.0, 5.0, 0.1], [3.0, 5.0, 0.1], [100.0, 7.0, 0.1]])
    scaler = Scaler.fit(X, np.array([0, 1]), "standardize")
    np.testing.assert_allclose(scaler(X), [[-1, 0, 0], [1, 0, 0], [98, 2, 0]], atol=1e-12)
    assert (Scaler.fit(X, np.array([0]), "none")(X) == X).all()
    np.testing.assert_allclose(np.linalg.norm(Scaler.fit(X, np.array([0]), "l2")(X), axis=1), 1)
    with pytest.raises(ValueError, match="no zero vector for scaling='l2', got one in row 1"):
        Scaler.fit(np.array([[1.0], [0.0]]), np.array([0]), "l2")
    with pytest.raises(ValueError, match="scaling must be one of"):
        Scaler.fit(X, np.array([0]), "whiten")
