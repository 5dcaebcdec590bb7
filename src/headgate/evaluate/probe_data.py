"""What all probes share: scaling by training statistics, choosing by validation or folds, and scoring predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped
from sklearn.model_selection import StratifiedKFold

from headgate.evaluate.checks import Array, as_labels, check_choice, check_finite, check_matrix, to_numpy
from headgate.evaluate.features import Split

__all__ = [
    "ProbeResult",
    "Scaler",
    "Scaling",
    "absent_classes",
    "as_probe_data",
    "choose",
    "folds_of",
    "score_predictions",
]

Scaling: TypeAlias = Literal["standardize", "l2", "none"]


@dataclass(frozen=True)
class ProbeResult:
    """How well a probe reads the labels from the features, on the test rows.

    Attributes:
        accuracy: top-1.
        mean_per_class: mean over the test classes of the accuracy within each.
        predictions: ``(n_test,)`` labels, in the order of ``split.test``.
        classes: ``(K,)`` labels seen in training, rising.
        scores: ``(n_test, K)`` decision values; equal ones go to the smallest label.
        chosen: what was chosen and for how much, e.g. ``{"C": 1.0}``.
        selection_score: accuracy of that choice on the validation rows or folds; nan where nothing was chosen.
        converged: whether the solver ended by itself.
        absent: test classes that training never saw; their rows count as errors.
    """

    accuracy: float
    mean_per_class: float
    predictions: Int[np.ndarray, " test"]
    classes: Int[np.ndarray, " classes"]
    scores: Float[np.ndarray, "test classes"]
    chosen: dict[str, float] = field(default_factory=dict)
    selection_score: float = float("nan")
    converged: bool = True
    absent: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scaler:
    """Shifts and scales features by the statistics of the training rows, or puts every row at unit length.

    Attributes:
        scaling: ``"standardize"``, ``"l2"`` or ``"none"``.
        mean: ``(d,)``.
        scale: ``(d,)`` standard deviation, 1 for a constant column.
    """

    scaling: Scaling
    mean: Float[np.ndarray, " dim"]
    scale: Float[np.ndarray, " dim"]

    @classmethod
    def fit(cls, X: Shaped[np.ndarray, "n dim"], rows: Int[np.ndarray, " m"], scaling: Scaling) -> Scaler:
        """Take mean and standard deviation of ``X[rows]``, block by block in float64.

        Raises:
            ValueError: an unknown scaling, or a zero row anywhere in ``X`` with ``"l2"``.
        """
        check_choice("scaling", scaling, ("standardize", "l2", "none"))
        dim = X.shape[1]
        if scaling == "l2":
            step = max(1, (1 << 22) // dim)
            for start in range(0, len(X), step):
                zero = ~X[start : start + step].any(axis=1)
                if zero.any():
                    raise ValueError(
                        f"X must hold no zero vector for scaling='l2', got one in row {start + zero.argmax()}"
                    )
        if scaling != "standardize":
            return cls(scaling, np.zeros(dim), np.ones(dim))
        blocks = np.array_split(rows, max(1, len(rows) * dim // (1 << 22)))
        mean = sum(X[block].astype(np.float64).sum(axis=0) for block in blocks) / len(rows)
        squares = sum(np.square(X[block].astype(np.float64) - mean).sum(axis=0) for block in blocks)
        scale = np.sqrt(squares / len(rows))
        # Rounding leaves a constant column a tiny deviation, which must not be blown up.
        constant = scale <= 1e-12 * np.maximum(1e-300, np.abs(mean))
        return cls(scaling, mean, np.where(constant | (scale == 0), 1.0, scale))

    def __call__(self, block: Shaped[np.ndarray, "*batch dim"]) -> Float[np.ndarray, "*batch dim"]:
        """Return ``block`` scaled, in float64."""
        values = block.astype(np.float64)
        if self.scaling == "l2":
            values = values / np.abs(values).max(axis=-1, keepdims=True)
            return values / np.linalg.norm(values, axis=-1, keepdims=True)
        return (values - self.mean) / self.scale


def as_probe_data(X: Array, y: Array, split: Split) -> tuple[Shaped[np.ndarray, "n dim"], Int[np.ndarray, " n"]]:
    """Check features, labels and split, and hand the first two on as NumPy, ``X`` uncopied in its own dtype.

    Raises:
        TypeError: not arrays, or labels that are not integers.
        ValueError: bad shapes or values, a split beyond the rows, or fewer than two classes to train on.
    """
    num_rows, _ = check_matrix("X", X)
    features = to_numpy("X", X)
    check_finite("X", features)
    labels = as_labels("y", y, length=num_rows)
    split.check(num_rows)
    if len(np.unique(labels[split.train])) < 2:
        raise ValueError(f"y must hold at least two classes to train on, got {np.unique(labels[split.train]).tolist()}")
    return features, labels


def folds_of(
    labels: Int[np.ndarray, " n"], split: Split, folds: int, seed: int
) -> list[tuple[Int[np.ndarray, " fit"], Int[np.ndarray, " held"]]]:
    """Return pairs (rows to fit, rows to score): the validation rows where there are some, else stratified folds.

    Raises:
        ValueError: no validation rows, and no class with two training rows.
    """
    if len(split.val):
        return [(split.train, split.val)]
    counts = np.unique(labels[split.train], return_counts=True)[1]
    folds = min(folds, int(counts.max()))
    if folds < 2:
        raise ValueError("split must have validation rows, or two training rows of a class for folds, got neither")
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = list(splitter.split(np.zeros(len(split.train)), labels[split.train]))
    return [(split.train[fit], split.train[held]) for fit, held in parts]


def choose(candidates: Sequence[float], score: Callable[[float], float]) -> tuple[float, float]:
    """Return the candidate with the greatest score, the first of equals, and that score."""
    scores = [score(candidate) for candidate in candidates]
    best = int(np.argmax(scores))
    return float(candidates[best]), float(scores[best])


def score_predictions(
    truth: Int[np.ndarray, " test"], predictions: Int[np.ndarray, " test"], train_classes: Int[np.ndarray, " classes"]
) -> tuple[float, float, tuple[int, ...]]:
    """Return top-1 accuracy, mean per-class accuracy, and the absent classes of :func:`absent_classes`."""
    right = predictions == truth
    _, group = np.unique(truth, return_inverse=True)
    per_class = np.bincount(group, weights=right) / np.bincount(group)
    return float(right.mean()), float(per_class.mean()), absent_classes(truth, train_classes)


def absent_classes(truth: Int[np.ndarray, " test"], train_classes: Int[np.ndarray, " classes"]) -> tuple[int, ...]:
    """Return the test classes that training never saw, and warn that their rows count as errors."""
    absent = tuple(int(label) for label in np.setdiff1d(truth, train_classes))
    if absent:
        warnings.warn(
            f"test classes {list(absent)} are absent from train; "
            f"their rows ({np.isin(truth, absent).mean():.1%}) count as errors",
            UserWarning,
            stacklevel=4,
        )
    return absent
