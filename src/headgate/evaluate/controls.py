"""What a probe's number must be held against: raw input, a random network, shuffled labels, and the worst group."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate.checks import Array, as_groups, as_labels, as_seed, check_count, check_same_length
from headgate.evaluate.features import Split
from headgate.evaluate.probe_data import ProbeResult, as_probe_data
from headgate.evaluate.probes import linear_probe

__all__ = ["ControlReport", "WorstGroup", "probe_controls", "worst_group"]


@dataclass(frozen=True)
class ControlReport:
    """A probe beside its controls.

    Attributes:
        features: the probe on the features in question.
        raw: the same probe on the raw input, if it was given.
        random_init: the same probe on the features of an untrained network, if they were given.
        shuffled: accuracy with shuffled labels, mean over shuffles.
        chance: the accuracy that predictions with these frequencies have by chance, ``Σ_c P(ŷ = c) P(y = c)``.
        standard_error: of ``shuffled``: the binomial one of the test rows or, where the rows of a cluster err
            together, the larger one seen over the shuffles.
        shuffled_at_chance: whether ``shuffled`` lies within two standard errors of ``chance``. If not, the test labels
            leak into the probe.
    """

    features: ProbeResult
    raw: ProbeResult | None
    random_init: ProbeResult | None
    shuffled: float
    chance: float
    standard_error: float
    shuffled_at_chance: bool


@dataclass(frozen=True)
class WorstGroup:
    """Accuracy per group.

    Attributes:
        worst: the smallest accuracy of a group.
        group: the group that has it, the smallest of equals.
        average: accuracy over all items.
        accuracies: group → accuracy.
        counts: group → number of items.
        small: groups with so few items that their accuracy means little.
    """

    worst: float
    group: int
    average: float
    accuracies: dict[int, float]
    counts: dict[int, int]
    small: tuple[int, ...]


def probe_controls(
    X: Float[Array, "n dim"],
    y: Int[Array, " n"],
    split: Split,
    *,
    probe: Callable[[Array, Array, Split], ProbeResult] = linear_probe,
    raw: Float[Array, "n raw"] | None = None,
    random_init: Float[Array, "n random"] | None = None,
    shuffles: int = 5,
    seed: int = 0,
) -> ControlReport:
    """Run a probe on the features and on the control arms.

    Args:
        X: ``(N, d)``, finite.
        y: ``(N,)`` integer labels.
        split: rows to fit, to choose and to test on.
        probe: what to run, e.g. :func:`headgate.evaluate.knn_probe` or a ``functools.partial``.
        raw: ``(N, d_raw)`` the flattened inputs themselves.
        random_init: ``(N, d)`` features of the same network before training.
        shuffles: how often the labels are shuffled, among the training rows and among the validation rows.
        seed: of the shuffles.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values.
    """
    _, labels = as_probe_data(X, y, split)
    generator = np.random.default_rng(as_seed("seed", seed))
    accuracies, chances = [], []
    for _ in range(check_count("shuffles", shuffles)):
        mixed = labels.copy()
        for rows in (split.train, split.val):
            mixed[rows] = generator.permutation(labels[rows])
        result = probe(X, mixed, split)
        accuracies.append(result.accuracy)
        chances.append(_chance(labels[split.test], result.predictions))
    chance = float(np.mean(chances))
    binomial = math.sqrt(chance * (1 - chance) / (len(split.test) * shuffles))
    seen = float(np.std(accuracies, ddof=1)) / math.sqrt(shuffles) if shuffles > 1 else 0.0
    error, shuffled = max(binomial, seen), float(np.mean(accuracies))
    return ControlReport(
        features=probe(X, labels, split),
        raw=None if raw is None else probe(raw, labels, split),
        random_init=None if random_init is None else probe(random_init, labels, split),
        shuffled=shuffled,
        chance=chance,
        standard_error=error,
        shuffled_at_chance=abs(shuffled - chance) <= 2 * error,
    )


def worst_group(
    y_true: Int[Array, " n"], y_pred: Int[Array, " n"], group: Int[Array, " n"], *, min_count: int = 10
) -> WorstGroup:
    """Return the smallest accuracy over groups, beside the average and the counts.

    Args:
        y_true: ``(N,)`` integer labels.
        y_pred: ``(N,)`` predicted labels.
        group: ``(N,)`` integers or booleans.
        min_count: groups with fewer items are listed as small; they count all the same.

    Raises:
        TypeError: labels or groups are not integers.
        ValueError: lengths differ, or no item.
    """
    truth, found = as_labels("y_true", y_true), as_labels("y_pred", y_pred)
    groups = as_groups("group", group)
    check_same_length(y_true=truth, y_pred=found, group=groups)
    names, member = np.unique(groups, return_inverse=True)
    counts = np.bincount(member)
    accuracy = np.bincount(member, weights=truth == found) / counts
    return WorstGroup(
        worst=float(accuracy.min()),
        group=int(names[accuracy.argmin()]),
        average=float((truth == found).mean()),
        accuracies={int(name): float(value) for name, value in zip(names, accuracy, strict=True)},
        counts={int(name): int(count) for name, count in zip(names, counts, strict=True)},
        small=tuple(int(name) for name in names[counts < min_count]),
    )


def _chance(truth: Int[np.ndarray, " test"], predictions: Int[np.ndarray, " test"]) -> float:
    classes = np.union1d(truth, predictions)
    return float(sum((truth == label).mean() * (predictions == label).mean() for label in classes))
