"""Probes: is the information in frozen features, linearly or otherwise?

A probe is fitted on ``split.train``, its settings are chosen on ``split.val`` (or by folds inside ``split.train`` where
that is empty), and it is scored once on ``split.test``. Scaling uses statistics of the rows that it is fitted on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import r2_score
from sklearn.neural_network import MLPClassifier
from sklearn.svm import LinearSVC

from headgate.evaluate.checks import (
    Array,
    as_features,
    as_seed,
    check_choice,
    check_count,
    check_finite,
    check_matrix,
    to_numpy,
)
from headgate.evaluate.features import Split
from headgate.evaluate.logistic import fit_logistic, fit_logistic_torch
from headgate.evaluate.probe_data import (
    ProbeResult,
    Scaler,
    Scaling,
    as_probe_data,
    choose,
    folds_of,
    score_predictions,
)

__all__ = [
    "C_GRID",
    "MLPProbeResult",
    "RidgeResult",
    "linear_probe",
    "mlp_probe",
    "ridge_classifier_probe",
    "ridge_probe",
    "svm_probe",
]

C_GRID = tuple(float(C) for C in np.logspace(-4, 4, 9))
"""Inverse strengths of the regularisation to choose from."""


class RidgeResult(NamedTuple):
    """How well a linear map predicts the targets, on the test rows.

    Attributes:
        r2: mean coefficient of determination over the targets that vary in the test rows; nan where none does.
        r2_per_target: ``(T,)``, nan for a target that is constant there.
        alpha: the chosen strength of the regularisation.
        predictions: ``(n_test, T)``.
    """

    r2: float
    r2_per_target: Float[np.ndarray, " targets"]
    alpha: float
    predictions: Float[np.ndarray, "test targets"]


@dataclass(frozen=True)
class MLPProbeResult:
    """A non-linear probe beside the linear one: the gap is the information that is there, but not linearly.

    Attributes:
        mlp: the network's result.
        linear: the linear probe's result on the same rows.
    """

    mlp: ProbeResult
    linear: ProbeResult

    @property
    def gain(self) -> float:
        """Accuracy of the network minus that of the linear probe."""
        return self.mlp.accuracy - self.linear.accuracy


def linear_probe(
    X: Float[Array, "n dim"],
    y: Int[Array, " n"],
    split: Split,
    *,
    C: float | Sequence[float] = C_GRID,
    scaling: Scaling = "standardize",
    max_iter: int = 1000,
    folds: int = 5,
    seed: int = 0,
    torch_above: int = 400_000_000,
    device: str | torch.device = "cpu",
) -> ProbeResult:
    """Fit multinomial logistic regression with an L2 penalty (lbfgs).

    Args:
        X: ``(N, d)``, finite; may be memory-mapped.
        y: ``(N,)`` integer labels.
        split: rows to fit, to choose and to test on.
        C: inverse strength of the regularisation; from several, the one with the best accuracy on the validation rows
            or folds is chosen, the smallest of equals.
        scaling: ``"standardize"`` (by training statistics), ``"l2"`` (unit rows; state it) or ``"none"``.
        max_iter: iterations after which the solver gives up; ``result.converged`` tells.
        folds: number of folds where the split has no validation rows.
        seed: of the folds.
        torch_above: training values (rows times d) above which L-BFGS in torch takes the place of scikit-learn, with
            the same objective, reading ``X`` in blocks; the default is 200,000 rows of 2,000 features.
        device: of that solver.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, a ``C`` that is not positive, or fewer than two training classes.
    """
    features, labels = as_probe_data(X, y, split)
    candidates = _candidates("C", C)
    large = len(split.train) * features.shape[1] > torch_above

    def fit(rows: Int[np.ndarray, " m"]) -> tuple[Scaler, Callable[[float], Any]]:
        scaler = Scaler.fit(features, rows, scaling)
        if large:
            return scaler, lambda value: fit_logistic_torch(
                features, labels, rows, scaler, value, max_iter=max_iter, device=device
            )
        scaled = scaler(features[rows])
        return scaler, lambda value: fit_logistic(scaled, labels[rows], value, max_iter=max_iter)

    chosen, selection = _choose_by_accuracy(
        candidates, features, labels, split, fit, check_count("folds", folds, low=2), seed
    )
    scaler, solve = fit(split.train)
    model = solve(chosen)
    scores = model.decide(scaler(features[split.test]))
    return _result(labels, split, model.classes, scores, {"C": chosen}, selection, model.converged)


def svm_probe(
    X: Float[Array, "n *views dim"],
    y: Int[Array, " n"],
    split: Split,
    *,
    C: float | Sequence[float] = C_GRID,
    scaling: Scaling = "l2",
    loss: Literal["hinge", "squared_hinge"] = "squared_hinge",
    max_iter: int = 10_000,
    folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Fit one linear support vector machine per class; with several views per item, sum their decision values.

    Args:
        X: ``(N, d)``, or ``(N, V, d)`` with V views of every item (crops, flips): all views train with the item's
            label, and an item's score is the sum of the decision values of its views.
        y: ``(N,)`` integer labels.
        split: rows to fit, to choose and to test on.
        C: inverse strength of the regularisation, chosen as in :func:`linear_probe`.
        scaling: as in :func:`linear_probe`, for every view by itself.
        loss: ``"hinge"`` is the classical machine, ``"squared_hinge"`` scikit-learn's default.
        max_iter: iterations after which the solver gives up.
        folds: number of folds where the split has no validation rows.
        seed: of the folds and the solver.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, a ``C`` that is not positive, or fewer than two training classes.
    """
    check_choice("loss", loss, ("hinge", "squared_hinge"))
    views = to_numpy("X", X)
    if views.ndim == 2:
        views = views[:, None]
    if views.ndim != 3 or 0 in views.shape:
        raise ValueError(f"X must have shape (n, dim) or (n, views, dim), none of them 0, got {views.shape}")
    num_views = views.shape[1]
    # Row i of the items is rows i V … i V + V - 1 of the matrix of views.
    flat = views.reshape(-1, views.shape[2])
    _, labels = as_probe_data(views.reshape(len(views), -1), y, split)
    candidates = _candidates("C", C)

    def fit(rows: Int[np.ndarray, " m"]) -> tuple[Scaler, Callable[[float], Any]]:
        view_rows = (rows[:, None] * num_views + np.arange(num_views)).ravel()
        scaler = Scaler.fit(flat, view_rows, scaling)
        scaled, repeated = scaler(flat[view_rows]), np.repeat(labels[rows], num_views)
        return scaler, lambda value: _SummedSVM(scaled, repeated, value, loss, max_iter, as_seed("seed", seed))

    chosen, selection = _choose_by_accuracy(
        candidates, views, labels, split, fit, check_count("folds", folds, low=2), seed
    )
    scaler, solve = fit(split.train)
    model = solve(chosen)
    scores = model.decide(scaler(views[split.test]))
    return _result(labels, split, model.classes, scores, {"C": chosen}, selection, model.converged)


def ridge_probe(
    X: Float[Array, "n dim"],
    targets: Float[Array, n * targets],
    split: Split,
    *,
    alphas: Sequence[float] = C_GRID,
    scaling: Scaling = "standardize",
) -> RidgeResult:
    """Fit ridge regression to real targets and report R² per target and on average.

    Args:
        X: ``(N, d)``, finite.
        targets: ``(N,)`` or ``(N, T)``, finite.
        split: rows to fit and to test on; the strength is chosen by the closed-form leave-one-out error over
            ``split.train``, which leaves ``split.val`` unused.
        alphas: strengths of the regularisation to choose from.
        scaling: as in :func:`linear_probe`.

    Raises:
        ValueError: bad shapes or values, or an alpha that is not positive.
    """
    num_rows, _ = check_matrix("X", X)
    features = to_numpy("X", X)
    check_finite("X", features)
    wanted = to_numpy("targets", targets)
    wanted = as_features("targets", wanted[:, None] if wanted.ndim == 1 else wanted, dtype=np.float64)
    if len(wanted) != num_rows:
        raise ValueError(f"targets must have one entry per row: expected {num_rows}, got {len(wanted)}")
    split.check(num_rows)
    scaler = Scaler.fit(features, split.train, scaling)
    model = RidgeCV(alphas=_candidates("alphas", alphas)).fit(scaler(features[split.train]), wanted[split.train])
    predictions = model.predict(scaler(features[split.test])).reshape(len(split.test), -1)
    truth = wanted[split.test]
    varies = truth.max(axis=0) > truth.min(axis=0)
    per_target = np.full(truth.shape[1], np.nan)
    if varies.any():
        per_target[varies] = r2_score(truth[:, varies], predictions[:, varies], multioutput="raw_values")
    mean = float(per_target[varies].mean()) if varies.any() else float("nan")
    return RidgeResult(mean, per_target, float(model.alpha_), predictions)


def ridge_classifier_probe(
    X: Float[Array, "n dim"],
    y: Int[Array, " n"],
    split: Split,
    *,
    alphas: Sequence[float] = C_GRID,
    scaling: Scaling = "standardize",
) -> ProbeResult:
    """Fit ridge regression to one-against-rest targets: a linear classifier in closed form, fast for many rows.

    Args:
        X: ``(N, d)``, finite.
        y: ``(N,)`` integer labels.
        split: rows to fit and to test on; the strength is chosen as in :func:`ridge_probe`.
        alphas: strengths of the regularisation to choose from.
        scaling: as in :func:`linear_probe`.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, an alpha that is not positive, or fewer than two training classes.
    """
    features, labels = as_probe_data(X, y, split)
    scaler = Scaler.fit(features, split.train, scaling)
    model = RidgeClassifierCV(alphas=_candidates("alphas", alphas))
    model.fit(scaler(features[split.train]), labels[split.train])
    scores = _one_column_per_class(model.decision_function(scaler(features[split.test])))
    return _result(labels, split, model.classes_, scores, {"alpha": float(model.alpha_)}, float("nan"), True)


def mlp_probe(
    X: Float[Array, "n dim"],
    y: Int[Array, " n"],
    split: Split,
    *,
    hidden: int = 256,
    alpha: float | Sequence[float] = (1e-4, 1e-2, 1.0),
    scaling: Scaling = "standardize",
    max_iter: int = 300,
    folds: int = 3,
    seed: int = 0,
) -> MLPProbeResult:
    """Fit a network with one hidden layer, and the linear probe beside it, on the same rows.

    Args:
        X: ``(N, d)``, finite.
        y: ``(N,)`` integer labels.
        split: rows to fit, to choose and to test on.
        hidden: width of the hidden layer.
        alpha: strength of the L2 penalty, chosen by accuracy as in :func:`linear_probe`.
        scaling: as in :func:`linear_probe`.
        max_iter: epochs after which the solver (Adam) gives up.
        folds: number of folds where the split has no validation rows.
        seed: of the network's weights and the folds.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, an alpha that is not positive, or fewer than two training classes.
    """
    features, labels = as_probe_data(X, y, split)
    candidates = _candidates("alpha", alpha)
    hidden, max_iter = check_count("hidden", hidden), check_count("max_iter", max_iter)

    def fit(rows: Int[np.ndarray, " m"]) -> tuple[Scaler, Callable[[float], Any]]:
        scaler = Scaler.fit(features, rows, scaling)
        scaled = scaler(features[rows])
        return scaler, lambda value: _Network(scaled, labels[rows], hidden, value, max_iter, as_seed("seed", seed))

    chosen, selection = _choose_by_accuracy(
        candidates, features, labels, split, fit, check_count("folds", folds, low=2), seed
    )
    scaler, solve = fit(split.train)
    model = solve(chosen)
    scores = model.decide(scaler(features[split.test]))
    mlp = _result(labels, split, model.classes, scores, {"alpha": chosen}, selection, model.converged)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="test classes")  # said once already, for the network
        linear = linear_probe(X, y, split, scaling=scaling, folds=max(folds, 2), seed=seed)
    return MLPProbeResult(mlp, linear)


class _SummedSVM:
    def __init__(
        self,
        X: Float[np.ndarray, "n dim"],
        y: Int[np.ndarray, " n"],
        C: float,
        loss: str,
        max_iter: int,
        seed: int,
    ) -> None:
        # The hinge loss is solved in the dual alone; otherwise the smaller side is.
        self.model = LinearSVC(C=C, loss=loss, dual="auto", max_iter=max_iter, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(X, y)
        self.classes = self.model.classes_
        self.converged = bool(np.max(self.model.n_iter_) < max_iter)

    def decide(self, views: Float[np.ndarray, "n views dim"]) -> Float[np.ndarray, "n classes"]:
        values = self.model.decision_function(views.reshape(-1, views.shape[-1]))
        return _one_column_per_class(values).reshape(*views.shape[:2], -1).sum(axis=1)


class _Network:
    def __init__(
        self, X: Float[np.ndarray, "n dim"], y: Int[np.ndarray, " n"], hidden: int, alpha: float, epochs: int, seed: int
    ) -> None:
        self.model = MLPClassifier((hidden,), alpha=alpha, max_iter=epochs, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(X, y)
        self.classes = self.model.classes_
        self.converged = bool(self.model.n_iter_ < epochs)

    def decide(self, X: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n classes"]:
        return np.log(np.maximum(self.model.predict_proba(X), np.finfo(np.float64).tiny))


def _choose_by_accuracy(
    candidates: Sequence[float],
    features: Shaped[np.ndarray, n * dims],
    labels: Int[np.ndarray, " n"],
    split: Split,
    fit: Callable[[Int[np.ndarray, " m"]], tuple[Scaler, Callable[[float], Any]]],
    folds: int,
    seed: int,
) -> tuple[float, float]:
    if len(candidates) == 1:
        return candidates[0], float("nan")
    held_out = [(*fit(rows), held) for rows, held in folds_of(labels, split, folds, as_seed("seed", seed))]

    def accuracy(value: float) -> float:
        right = total = 0
        for scaler, solve, held in held_out:
            model = solve(value)
            predictions = model.classes[model.decide(scaler(features[held])).argmax(axis=1)]
            right += int((predictions == labels[held]).sum())
            total += len(held)
        return right / total

    return choose(candidates, accuracy)


def _candidates(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    candidates = (
        tuple(sorted(float(value) for value in values))
        if isinstance(values, Sequence | np.ndarray)
        else (float(values),)
    )
    if not candidates or not all(0 < value < np.inf for value in candidates):
        raise ValueError(f"{name} must be positive, one number or several, got {values}")
    return candidates


def _one_column_per_class(scores: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "n classes"]:
    return np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores


def _result(
    labels: Int[np.ndarray, " n"],
    split: Split,
    classes: Int[np.ndarray, " classes"],
    scores: Float[np.ndarray, "test classes"],
    chosen: dict[str, float],
    selection: float,
    converged: bool,
) -> ProbeResult:
    predictions = classes[scores.argmax(axis=1)]
    accuracy, mean_per_class, absent = score_predictions(labels[split.test], predictions, classes)
    return ProbeResult(accuracy, mean_per_class, predictions, classes, scores, chosen, selection, converged, absent)
