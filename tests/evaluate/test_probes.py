from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from headgate.evaluate import (
    Split,
    linear_probe,
    mlp_probe,
    ridge_classifier_probe,
    ridge_probe,
    svm_probe,
)

DIGITS, LABELS = load_digits(return_X_y=True)
X, Y = DIGITS[:600], LABELS[:600]
SPLIT = Split.random(Y, seed=0)
FAST: dict[str, Any] = {"C": (0.01, 1.0)}


def no_validation(split: Split) -> Split:
    return Split(split.train, np.zeros(0, int), split.test)


def test_the_linear_probe_is_standardised_logistic_regression() -> None:
    result = linear_probe(X, Y, SPLIT, C=0.1)
    scaler = StandardScaler().fit(X[SPLIT.train])
    model = LogisticRegression(C=0.1, max_iter=1000, tol=1e-6).fit(scaler.transform(X[SPLIT.train]), Y[SPLIT.train])
    expected = model.predict(scaler.transform(X[SPLIT.test]))
    assert (result.predictions == expected).all()
    truth = Y[SPLIT.test]
    assert result.accuracy == (expected == truth).mean()
    assert result.mean_per_class == pytest.approx(
        np.mean([(expected[truth == label] == label).mean() for label in range(10)])
    )
    assert result.converged
    assert result.chosen == {"C": 0.1}
    assert np.isnan(result.selection_score)


def test_the_regularisation_is_chosen_on_the_validation_rows() -> None:
    result = linear_probe(X, Y, SPLIT)
    accuracies = {}
    for C in np.logspace(-4, 4, 9):
        on_validation = Split(SPLIT.train, np.zeros(0, int), SPLIT.val)
        accuracies[C] = linear_probe(X, Y, on_validation, C=C).accuracy
    best = max(accuracies.values())
    assert result.chosen["C"] == pytest.approx(min(C for C, value in accuracies.items() if value == best))
    assert result.selection_score == best


def test_without_validation_rows_it_is_chosen_by_folds() -> None:
    result = linear_probe(X, Y, no_validation(SPLIT), C=(1e-6, 0.1))
    assert result.chosen["C"] == 0.1
    assert 0.85 < result.selection_score < 1
    again = linear_probe(X, Y, no_validation(SPLIT), C=(1e-6, 0.1), seed=0)
    assert again.selection_score == result.selection_score


def test_the_test_rows_influence_nothing_but_the_score() -> None:
    poisoned, flipped = X.copy(), Y.copy()
    poisoned[SPLIT.test] *= 1e6
    flipped[SPLIT.test] = 9 - flipped[SPLIT.test]
    for split in (SPLIT, no_validation(SPLIT)):
        clean = linear_probe(X, Y, split, **FAST)
        other = linear_probe(poisoned, flipped, split, **FAST)
        assert other.chosen == clean.chosen
        assert other.selection_score == clean.selection_score
        assert (linear_probe(X, flipped, split, **FAST).predictions == clean.predictions).all()


def test_the_order_of_the_rows_and_the_kind_of_array_do_not_matter(tmp_path: Path) -> None:
    expected = linear_probe(X, Y, SPLIT, C=0.1)
    order = np.random.default_rng(0).permutation(600)
    inverse = np.argsort(order)
    moved = Split(inverse[SPLIT.train], inverse[SPLIT.val], inverse[SPLIT.test])
    np.save(tmp_path / "x.npy", X.astype(np.float16))
    for other in (
        linear_probe(X[order], Y[order], moved, C=0.1),
        linear_probe(torch.from_numpy(X), torch.from_numpy(Y), SPLIT, C=0.1),
        linear_probe(np.load(tmp_path / "x.npy", mmap_mode="r"), Y, SPLIT, C=0.1),
    ):
        assert other.accuracy == expected.accuracy
        assert (other.predictions == expected.predictions).all()


def test_standardising_makes_the_probe_blind_to_offset_and_scale_of_the_columns() -> None:
    scale = np.exp(np.random.default_rng(0).normal(size=64))
    moved = linear_probe(X * scale + 100, Y, SPLIT, C=0.1)
    assert (moved.predictions == linear_probe(X, Y, SPLIT, C=0.1).predictions).all()
    unit = linear_probe(X * np.exp(np.random.default_rng(1).normal(size=(600, 1))), Y, SPLIT, C=10.0, scaling="l2")
    assert (unit.predictions == linear_probe(X, Y, SPLIT, C=10.0, scaling="l2").predictions).all()


def test_large_data_take_the_torch_solver_and_agree_to_a_fifth_of_a_point() -> None:
    for labels in (LABELS, LABELS % 2):
        split = Split.random(labels, val=0.2, test=0.4, seed=1)
        small = linear_probe(DIGITS, labels, split, C=(0.01, 0.1))
        large = linear_probe(DIGITS, labels, split, C=(0.01, 0.1), torch_above=1000)
        assert small.chosen == large.chosen
        assert abs(small.accuracy - large.accuracy) <= 0.002
        assert large.converged


def test_a_solver_that_gives_up_is_flagged_without_noise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_probe(X, Y, SPLIT, C=1.0, max_iter=2).converged
        assert not svm_probe(X, Y, SPLIT, C=100.0, loss="hinge", max_iter=1).converged


def test_a_test_class_that_training_never_saw_is_warned_of_and_counts_as_an_error() -> None:
    train = SPLIT.train[Y[SPLIT.train] != 4]
    split = Split(train, SPLIT.val[Y[SPLIT.val] != 4], SPLIT.test)
    with pytest.warns(UserWarning, match=r"test classes \[4\] are absent from train; their rows .* count as errors"):
        result = linear_probe(X, Y, split, C=0.1)
    assert result.absent == (4,)
    truth = Y[SPLIT.test]
    assert (result.predictions[truth == 4] != 4).all()
    assert result.accuracy == (result.predictions == truth).mean()
    assert result.mean_per_class <= 0.9


def test_shuffled_labels_and_random_features_give_chance() -> None:
    generator = np.random.default_rng(0)
    noise, labels = generator.normal(size=(1200, 20)), np.arange(1200) % 4
    split = Split.random(labels, seed=0)
    bound = 3 * np.sqrt(0.25 * 0.75 / len(split.test))
    for probe in (linear_probe, svm_probe):
        assert abs(probe(noise, labels, split, C=0.1).accuracy - 0.25) < bound
    assert abs(ridge_classifier_probe(noise, labels, split).accuracy - 0.25) < bound
    mixed = Y.copy()
    mixed[SPLIT.train] = generator.permutation(Y[SPLIT.train])
    assert linear_probe(X, mixed, SPLIT, C=0.1).accuracy < 0.1 + 3 * np.sqrt(0.1 * 0.9 / len(SPLIT.test))


@pytest.mark.parametrize("probe", [linear_probe, svm_probe, ridge_classifier_probe, mlp_probe])
@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"X": np.where(np.arange(600)[:, None] == 17, np.nan, X)}, ValueError, "X must be finite, got NaN in row 17"),
        ({"X": X[:0]}, ValueError, "X must have shape|none of them 0"),
        ({"X": X[:599]}, ValueError, "y must have one entry per row: expected 599, got 600"),
        ({"y": Y.astype(float)}, TypeError, "y must hold integers"),
        ({"y": np.zeros(600, int)}, ValueError, r"at least two classes to train on, got \[0\]"),
        ({"split": Split(np.arange(5), np.zeros(0, int), np.array([600]))}, ValueError, "rows below n=600, got 600"),
        ({"scaling": "whiten"}, ValueError, "scaling must be one of"),
    ],
)
def test_bad_input_is_refused_by_every_probe(probe: Any, changes: dict, error: type[Exception], match: str) -> None:
    arguments = {"X": X, "y": Y, "split": SPLIT}
    with pytest.raises(error, match=match):
        probe(**{**arguments, **changes})


def test_bad_settings_are_refused() -> None:
    for C in (0.0, -1.0, (), (1.0, np.inf)):
        with pytest.raises(ValueError, match="C must be positive"):
            linear_probe(X, Y, SPLIT, C=C)
    with pytest.raises(ValueError, match="alphas must be positive"):
        ridge_probe(X, X, SPLIT, alphas=(0.0,))
    with pytest.raises(ValueError, match="loss must be one of"):
        svm_probe(X, Y, SPLIT, loss="log")
    one_each = Split(np.array([0, 1, 2]), np.zeros(0, int), np.array([3]))
    with pytest.raises(ValueError, match="validation rows, or two training rows of a class"):
        linear_probe(X, Y, one_each)


def test_the_svm_probe_is_one_machine_per_class_on_unit_rows() -> None:
    result = svm_probe(X, Y, SPLIT, C=1.0)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    model = LinearSVC(C=1.0, dual="auto", random_state=0).fit(unit[SPLIT.train], Y[SPLIT.train])
    assert (result.predictions == model.predict(unit[SPLIT.test])).mean() > 0.99
    np.testing.assert_allclose(result.scores, model.decision_function(unit[SPLIT.test]), atol=1e-3)
    assert result.converged


def test_decision_values_are_summed_over_views() -> None:
    views = np.stack([X, X[:, ::-1]], axis=1)
    result = svm_probe(views, Y, SPLIT, C=1.0)
    unit = views / np.linalg.norm(views, axis=2, keepdims=True)
    flat, repeated = unit[SPLIT.train].reshape(-1, 64), np.repeat(Y[SPLIT.train], 2)
    model = LinearSVC(C=1.0, dual="auto", random_state=0).fit(flat, repeated)
    summed = sum(model.decision_function(unit[SPLIT.test][:, view]) for view in range(2))
    np.testing.assert_allclose(result.scores, summed, atol=1e-3)
    # For a linear machine, summed decisions are those of the summed views.
    np.testing.assert_allclose(summed, 2 * model.decision_function(unit[SPLIT.test].mean(axis=1)), atol=1e-9)
    one = svm_probe(X[:, None], Y, SPLIT, C=1.0)
    assert (one.scores == svm_probe(X, Y, SPLIT, C=1.0).scores).all()


def test_the_svm_probe_chooses_its_regularisation_and_handles_two_classes() -> None:
    result = svm_probe(X, Y % 2, SPLIT, C=(1e-6, 1.0), loss="hinge")
    assert result.chosen == {"C": 1.0}
    assert result.scores.shape == (len(SPLIT.test), 2)
    assert result.accuracy > 0.8
    with pytest.raises(ValueError, match=r"\(n, views, dim\)"):
        svm_probe(X[:, None, None], Y, SPLIT)


def test_the_ridge_probe_is_the_closed_form_with_the_leave_one_out_choice() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 10)) * 5 + 3
    targets = features @ generator.normal(size=(10, 3)) + generator.normal(size=(200, 3)) * [0.1, 5.0, 50.0]
    split = Split.random(np.zeros(200, int), seed=0)
    result = ridge_probe(features, targets, split)
    scaler = StandardScaler().fit(features[split.train])
    scaled = scaler.transform(features)
    errors = {}
    for alpha in np.logspace(-4, 4, 9):
        left_out = []
        for row in range(len(split.train)):
            rest = np.delete(split.train, row)
            model = Ridge(alpha).fit(scaled[rest], targets[rest])
            left_out.append(targets[split.train[row]] - model.predict(scaled[[split.train[row]]])[0])
        errors[alpha] = np.square(left_out).mean()
    assert result.alpha == pytest.approx(min(errors, key=errors.__getitem__))
    model = Ridge(result.alpha).fit(scaled[split.train], targets[split.train])
    np.testing.assert_allclose(result.predictions, model.predict(scaled[split.test]), rtol=1e-6, atol=1e-6)
    expected = r2_score(targets[split.test], result.predictions, multioutput="raw_values")
    np.testing.assert_allclose(result.r2_per_target, expected)
    assert result.r2 == pytest.approx(expected.mean())
    assert result.r2_per_target[0] > 0.99


def test_a_target_that_does_not_vary_in_the_test_rows_has_no_r2() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(50, 3))
    split = Split(np.arange(30), np.zeros(0, int), np.arange(30, 50))
    targets = np.stack([features[:, 0], np.where(np.arange(50) < 30, features[:, 1], 2.0)], axis=1)
    result = ridge_probe(features, targets, split)
    assert np.isnan(result.r2_per_target[1])
    assert result.r2 == result.r2_per_target[0] > 0.99
    assert np.isnan(ridge_probe(features, targets[:, 1], split).r2)
    with pytest.raises(ValueError, match="targets must have one entry per row"):
        ridge_probe(features, targets[:10], split)
    with pytest.raises(ValueError, match="targets must be finite"):
        ridge_probe(features, np.full(50, np.nan), split)


def test_random_features_explain_nothing() -> None:
    generator = np.random.default_rng(1)
    split = Split(np.arange(300), np.zeros(0, int), np.arange(300, 600))
    result = ridge_probe(generator.normal(size=(600, 5)), generator.normal(size=600), split)
    assert -0.1 < result.r2 < 0.05


def test_the_ridge_classifier_is_that_of_scikit_learn() -> None:
    result = ridge_classifier_probe(X, Y, SPLIT)
    scaler = StandardScaler().fit(X[SPLIT.train])
    model = RidgeClassifier(alpha=result.chosen["alpha"]).fit(scaler.transform(X[SPLIT.train]), Y[SPLIT.train])
    assert (result.predictions == model.predict(scaler.transform(X[SPLIT.test]))).all()
    assert result.accuracy > 0.85
    assert ridge_classifier_probe(X, Y % 2, SPLIT).scores.shape == (len(SPLIT.test), 2)


def test_the_network_reads_what_the_linear_probe_cannot() -> None:
    generator = np.random.default_rng(0)
    points = generator.normal(size=(600, 2))
    labels = (points[:, 0] * points[:, 1] > 0).astype(int)
    split = Split.random(labels, seed=0)
    result = mlp_probe(points, labels, split, alpha=1e-4, seed=0)
    assert result.linear.accuracy < 0.65
    assert result.mlp.accuracy > 0.9
    assert result.gain == result.mlp.accuracy - result.linear.accuracy
    again = mlp_probe(points, labels, split, alpha=1e-4, seed=0)
    assert (again.mlp.scores == result.mlp.scores).all()


def test_the_network_chooses_its_penalty_on_validation_rows() -> None:
    result = mlp_probe(X[:, :16], Y, SPLIT, hidden=32, alpha=(1e-2, 1e4), max_iter=60)
    assert result.mlp.chosen == {"alpha": 1e-2}
    assert result.mlp.selection_score > 0.3
