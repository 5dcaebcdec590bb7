r"""How well clicks are ranked above non-clicks, user by user: GAUC, and RelaImpr.

The AUC over all impressions rewards a model for knowing which users click at all; a shop ranks items within one user's
visit. GAUC (Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017; Zhou et al., "Deep Interest
Network", KDD 2018, Section 6) is the mean of the users' AUCs, weighted by their impressions::

    GAUC = Σ_i w_i AUC_i / Σ_i w_i          over users i with a click and a non-click

RelaImpr compares two such numbers above the 0.5 of chance: ``((AUC - 0.5) / (AUC_base - 0.5) - 1) · 100 %``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from headgate.evaluate.checks import Array, as_groups, as_scores, check_choice, check_same_length

__all__ = ["gauc", "rela_impr"]


def gauc(
    labels: Shaped[Array, " n"],
    scores: Float[Array, " n"],
    groups: Int[Array, " n"],
    *,
    weight: Literal["impressions", "clicks"] = "impressions",
) -> float:
    """Average the AUC of every user's impressions.

    A user without a click, or with clicks alone, has no AUC and does not count. Equal scores count half. Where every user
    has one click and one non-click, this is the share of users whose click ranks first.

    Args:
        labels: ``(N,)``, 1 or True for a click, 0 or False for none.
        scores: ``(N,)``, finite; higher means more likely a click. Any increasing function of them gives the same.
        groups: ``(N,)`` integers, the user (or visit) of each impression; in any order.
        weight: w_i, a user's number of impressions, or of clicks.

    Returns:
        In [0, 1]; 0.5 is chance.

    Raises:
        TypeError: labels or scores are no real numbers, or groups no integers.
        ValueError: lengths differ, a label is neither 0 nor 1, a score is not finite, an unknown ``weight``, or no user has
            both a click and a non-click.
    """
    check_choice("weight", weight, ("impressions", "clicks"))
    clicked = as_scores("labels", labels, shape=(None,), axes="n")
    values = as_scores("scores", scores, shape=(None,), axes="n")
    users = as_groups("groups", groups)
    check_same_length(labels=clicked, scores=values, groups=users)
    wrong = (clicked != 0) & (clicked != 1)
    if wrong.any():
        raise ValueError(f"labels must be 0 or 1, got {clicked[wrong][0]:g} in row {int(wrong.argmax())}")
    order = np.lexsort((values, users))
    clicked, values, users = clicked[order], values[order], users[order]
    first = np.concatenate([[True], users[1:] != users[:-1]])
    user = np.cumsum(first) - 1
    shown = np.bincount(user)
    clicks = np.bincount(user, weights=clicked)
    # Mann and Whitney: AUC = (Σ ranks of the clicks - P (P + 1) / 2) / (P N); equal scores share their mean rank.
    starts = np.flatnonzero(first)
    new_score = first | np.concatenate([[True], values[1:] != values[:-1]])
    run = np.cumsum(new_score) - 1
    run_starts = np.flatnonzero(new_score)
    mean_place = run_starts + (np.diff(np.append(run_starts, len(values))) - 1) / 2
    rank = mean_place[run] - starts[user] + 1
    pairs = clicks * (shown - clicks)
    mixed = pairs > 0
    if not mixed.any():
        raise ValueError("labels must hold a click and a non-click of one user at least, got no user with both")
    wins = np.bincount(user, weights=rank * clicked) - clicks * (clicks + 1) / 2
    auc = wins[mixed] / pairs[mixed]
    return float(np.average(auc, weights=(shown if weight == "impressions" else clicks)[mixed]))


def rela_impr(auc: float, base: float) -> float:
    """Compare two AUCs above chance.

    Args:
        auc: of the model.
        base: of the model that it is compared with, above 0.5.

    Returns:
        The relative improvement in percent; 0 where the two are equal.

    Raises:
        ValueError: an AUC outside [0, 1], or ``base`` at or below chance, above which nothing can be relative.
    """
    for name, value in (("auc", auc), ("base", base)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if base <= 0.5:
        raise ValueError(f"base must be above 0.5, got {base}")
    return ((auc - 0.5) / (base - 0.5) - 1) * 100
