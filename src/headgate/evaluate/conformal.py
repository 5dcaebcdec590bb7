r"""Conformal sets of classes, also for networks that answer at several exits.

With held-out items of which the true class is known, :math:`s_i = 1 - p_{i, y_i}` says how strange the truth looked. A new
item's set holds every class that looks no stranger than most truths did,

.. math:: \{ c : p_c \ge 1 - \hat q \}, \qquad \hat q = \text{the } \lceil (n + 1)(1 - \alpha) \rceil / n \text{ quantile of } s,

and contains the true class with probability at least 1 − α, as long as held-out and new items are exchangeable (Vovk et al.,
"Algorithmic Learning in a Random World", 2005). An early exit decides by itself which items it sees, so each exit has a
quantile of its own (Regol, Chataoui and Coates, "JEI-DNN", ICLR 2024, Section 5).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from headgate.evaluate.checks import Array, as_labels, as_probabilities, as_scores, check_count, to_numpy

__all__ = ["ConformalScore", "ExitConformal", "as_exits", "conformal_quantile", "conformal_score", "conformal_sets"]


class ConformalScore(NamedTuple):
    """What sets of classes are worth.

    Attributes:
        coverage: share of items whose set holds the true class.
        size: mean number of classes in a set, the inefficiency.
    """

    coverage: float
    size: float


def conformal_quantile(scores: Float[Array, " n"], alpha: float, *, capped: bool = False) -> float:
    """Return the quantile of held-out scores that a new score exceeds with probability at most ``alpha``.

    Args:
        scores: ``(n,)`` strangeness of the truth on held-out items.
        alpha: error rate in (0, 1).
        capped: where n is too small for ``alpha``, that is n < 1/α − 1, take the greatest score in place of infinity. So
            does published code; the error rate is then 1/(n + 1).

    Returns:
        The quantile by the rule "higher"; infinity where no score will do.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: no score, one that is not finite, or ``alpha`` outside (0, 1).
    """
    _check_alpha(alpha)
    values = as_scores("scores", scores, shape=(None,), axes="item")
    # Rounding must not lift a whole number over the next one.
    level = math.ceil((len(values) + 1) * (1 - alpha) - 1e-9) / len(values)
    if level > 1 and not capped:
        return math.inf
    return float(np.quantile(values, min(level, 1.0), method="higher"))


def conformal_sets(probabilities: Float[Array, "n c"], quantile: float | Array) -> Bool[np.ndarray, "n c"]:
    """Return the classes of each item that look no stranger than the quantile.

    Args:
        probabilities: ``(N, C)`` in [0, 1].
        quantile: from :func:`conformal_quantile`, one for all items or ``(N,)``; infinity makes a set of all classes.

    Raises:
        TypeError: not an array of real numbers.
        ValueError: bad shapes or values.
    """
    table = as_probabilities("probabilities", probabilities, shape=(None, None), axes="item, class")
    limits = np.asarray(quantile if isinstance(quantile, float | int) else to_numpy("quantile", quantile))
    if limits.shape not in ((), (len(table),)) or np.isnan(limits).any():
        raise ValueError(f"quantile must be a number, or one for each of {len(table)} items, got {limits.shape}")
    return table >= 1 - np.broadcast_to(limits, len(table))[:, None]


def conformal_score(sets: Bool[Array, "n c"], target: Int[Array, " n"]) -> ConformalScore:
    """Return coverage and mean size of sets of classes.

    Args:
        sets: ``(N, C)`` booleans.
        target: ``(N,)`` true classes.

    Raises:
        TypeError: ``sets`` are no booleans, or ``target`` no integers.
        ValueError: bad shapes, or a class outside [0, C).
    """
    table = to_numpy("sets", sets)
    if table.dtype != np.bool_:
        raise TypeError(f"sets must hold booleans, got {table.dtype}")
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"sets must have shape (item, class), none of them 0, got {table.shape}")
    truth = _as_target(target, *table.shape)
    return ConformalScore(float(table[np.arange(len(truth)), truth].mean()), float(table.sum(axis=1).mean()))


class ExitConformal:
    """Conformal sets for a network with exits, with one quantile for each exit.

    The quantile of an exit comes from the held-out items that left there; where they are too few, from all held-out items
    as that exit sees them.

    Args:
        alpha: error rate in (0, 1).
        min_items: an exit where no more than this many held-out items left takes them all.
        capped: as in :func:`conformal_quantile`.

    Attributes:
        quantiles: ``(E,)`` one per exit, after :meth:`calibrate`.

    Raises:
        ValueError: ``alpha`` outside (0, 1), or ``min_items`` negative.
    """

    quantiles: Float[np.ndarray, " e"]

    def __init__(self, alpha: float, *, min_items: int = 20, capped: bool = False) -> None:
        _check_alpha(alpha)
        self.alpha = alpha
        self.min_items = check_count("min_items", min_items, low=0)
        self.capped = capped

    def calibrate(
        self, probabilities: Float[Array, "e n c"], exit_index: Int[Array, " n"], target: Int[Array, " n"]
    ) -> Self:
        """Take the quantiles from held-out items.

        Args:
            probabilities: ``(E, N, C)`` class probabilities at every exit.
            exit_index: ``(N,)`` the exit at which each item left, in [0, E).
            target: ``(N,)`` true classes.

        Raises:
            TypeError: not arrays of numbers.
            ValueError: no item, bad shapes or bad values.
        """
        table = as_probabilities("probabilities", probabilities, shape=(None, None, None), axes="exit, item, class")
        exits, items, classes = table.shape
        truth = _as_target(target, items, classes)
        left = as_exits(exit_index, items, exits)
        scores = 1 - table[:, np.arange(items), truth]
        chosen = [
            scores[exit][left == exit] if (left == exit).sum() > self.min_items else scores[exit]
            for exit in range(exits)
        ]
        self.quantiles = np.array([conformal_quantile(part, self.alpha, capped=self.capped) for part in chosen])
        return self

    def predict_sets(self, probabilities: Float[Array, "n c"], exit_index: Int[Array, " n"]) -> Bool[np.ndarray, "n c"]:
        """Return the set of classes of each new item.

        Args:
            probabilities: ``(N, C)`` at the exit where each item left.
            exit_index: ``(N,)`` that exit.

        Raises:
            RuntimeError: :meth:`calibrate` was not called.
            TypeError: not arrays of numbers.
            ValueError: bad shapes or values, or an exit that was not there at calibration.
        """
        if not hasattr(self, "quantiles"):
            raise RuntimeError("calibrate must be called before sets can be predicted")
        left = as_exits(exit_index, len(probabilities), len(self.quantiles))
        return conformal_sets(probabilities, self.quantiles[left])


def as_exits(exit_index: Array, items: int, exits: int) -> Int[np.ndarray, " n"]:
    """Check the exits at which items left, and hand them on as int64 NumPy.

    Args:
        exit_index: ``(N,)``.
        items: N.
        exits: E.

    Raises:
        TypeError: not integers.
        ValueError: another length, or an exit outside [0, E).
    """
    left = as_labels("exit_index", exit_index, length=items)
    if left.min() < 0 or left.max() >= exits:
        raise ValueError(f"exit_index must lie in [0, {exits}), got {left.min()} to {left.max()}")
    return left


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")


def _as_target(target: Array, items: int, classes: int) -> Int[np.ndarray, " n"]:
    truth = as_labels("target", target, length=items)
    if truth.min() < 0 or truth.max() >= classes:
        raise ValueError(f"target must lie in [0, {classes}), got {truth.min()} to {truth.max()}")
    return truth
