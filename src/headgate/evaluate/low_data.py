"""Few labels: accuracy per number of shots, and the number of labels that a score needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate.checks import Array, as_scores, as_seed, check_count
from headgate.evaluate.features import Split
from headgate.evaluate.logistic import fit_logistic
from headgate.evaluate.probe_data import Scaler, Scaling, absent_classes, as_probe_data, choose
from headgate.evaluate.probes import C_GRID
from headgate.evaluate.statistics import Summary, summarize

__all__ = ["FewShotResult", "few_shot", "sample_efficiency"]


@dataclass(frozen=True)
class FewShotResult:
    """Accuracy with few labels.

    Attributes:
        summary: shots per class → mean, std and interval over the draws.
        accuracies: ``(S, R)`` accuracy per number of shots and draw.
        C: the regularisation, one for all.
        absent: test classes that training never saw; their rows count as errors.
    """

    summary: dict[int, Summary]
    accuracies: Float[np.ndarray, "shots repeats"]
    C: float
    absent: tuple[int, ...]


def few_shot(
    X: Float[Array, "n dim"],
    y: Int[Array, " n"],
    split: Split,
    shots: Sequence[int] = (1, 5, 10, 25),
    repeats: int = 20,
    *,
    C: Sequence[float] = C_GRID,
    scaling: Scaling = "standardize",
    max_iter: int = 1000,
    seed: int = 0,
) -> FewShotResult:
    """Fit a linear probe on class-balanced draws of a few training rows per class.

    C is chosen once, by the mean accuracy on ``split.val`` over the draws of the largest number of shots, and held for
    all: a choice per number of shots would need labels that few-shot learning does not have. The draws are nested: a
    draw's 5 shots contain its 1 shot.

    Args:
        X: ``(N, d)``, finite.
        y: ``(N,)`` integer labels.
        split: rows to draw from, to choose C on (needed where there are several C), and to test on.
        shots: training rows per class, each at most the size of the smallest training class.
        repeats: number of draws.
        C: inverse strengths of the regularisation to choose from.
        scaling: as in :func:`headgate.evaluate.linear_probe`, by the statistics of the drawn rows.
        max_iter: iterations after which the solver gives up.
        seed: of the draws.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, a class too small (it is named), or no validation rows.
    """
    features, labels = as_probe_data(X, y, split)
    seed, repeats = as_seed("seed", seed), check_count("repeats", repeats)
    sizes = [check_count("shots", size) for size in shots]
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"shots must hold different numbers, at least one, got {list(shots)}")
    if len(C) == 0 or not all(0 < value < np.inf for value in C):
        raise ValueError(f"C must be positive, one number or several, got {list(C)}")
    if len(C) > 1 and len(split.val) == 0:
        raise ValueError("split must have validation rows to choose C on, got none")
    classes, counts = np.unique(labels[split.train], return_counts=True)
    if counts.min() < max(sizes):
        label = int(classes[counts.argmin()])
        raise ValueError(
            f"shots must not exceed the smallest class, got {max(sizes)} > {counts.min()} of class {label}"
        )
    members = [np.sort(split.train[labels[split.train] == label]) for label in classes]
    draws = [_draw(members, max(sizes), seed, repeat) for repeat in range(repeats)]

    def predictions(rows: Int[np.ndarray, " m"], value: float, wanted: Int[np.ndarray, " q"]) -> Int[np.ndarray, " q"]:
        scaler = Scaler.fit(features, rows, scaling)
        model = fit_logistic(scaler(features[rows]), labels[rows], value, max_iter=max_iter)
        return model.classes[model.decide(scaler(features[wanted])).argmax(axis=1)]

    chosen = float(C[0])
    if len(C) > 1:
        chosen, _ = choose(
            sorted(C),
            lambda value: float(
                np.mean([predictions(draw.ravel(), value, split.val) == labels[split.val] for draw in draws])
            ),
        )
    accuracies = np.empty((len(sizes), repeats))
    for column, draw in enumerate(draws):
        for row, size in enumerate(sizes):
            found = predictions(draw[:, :size].ravel(), chosen, split.test)
            accuracies[row, column] = (found == labels[split.test]).mean()
    summary = {size: summarize(accuracies[row]) for row, size in enumerate(sizes)}
    return FewShotResult(summary, accuracies, chosen, absent_classes(labels[split.test], classes))


def sample_efficiency(samples: Float[Array, " s"], scores: Float[Array, " s"], target: float) -> float:
    """Return how many samples a score needs, by interpolation that is linear in the logarithm of the number.

    Args:
        samples: ``(S,)`` rising, positive numbers of samples.
        scores: ``(S,)`` the score with each.
        target: the score to reach.

    Returns:
        The smallest number of samples at which the line through the points reaches ``target``; ``samples[0]`` where
        the first point does already (fewer may suffice), infinity where none does.

    Raises:
        ValueError: bad shapes or values.
    """
    sizes = as_scores("samples", samples, shape=(None,), axes="size")
    values = as_scores("scores", scores, shape=sizes.shape, axes="size")
    if sizes[0] <= 0 or (sizes[1:] <= sizes[:-1]).any():
        raise ValueError(f"samples must be positive and rise, got {sizes.tolist()}")
    if not math.isfinite(target):
        raise ValueError(f"target must be finite, got {target}")
    reached = np.flatnonzero(values >= target)
    if len(reached) == 0:
        return math.inf
    after = int(reached[0])
    if after == 0:
        return float(sizes[0])
    share = (target - values[after - 1]) / (values[after] - values[after - 1])
    return float(np.exp(np.log(sizes[after - 1]) + share * np.log(sizes[after] / sizes[after - 1])))


def _draw(
    members: Sequence[Int[np.ndarray, " m"]], size: int, seed: int, repeat: int
) -> Int[np.ndarray, "classes size"]:
    generator = np.random.default_rng([seed, repeat])
    return np.stack([generator.permutation(rows)[:size] for rows in members])
