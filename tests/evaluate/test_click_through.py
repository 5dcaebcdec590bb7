"""GAUC and RelaImpr against scikit-learn, user by user, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from headgate.evaluate import gauc, rela_impr


@pytest.mark.parametrize("weight", ["impressions", "clicks"])
@pytest.mark.parametrize("levels", [5, 1000])
def test_gauc_is_the_weighted_mean_of_the_users_aucs(weight: str, levels: int) -> None:
    rng = np.random.default_rng(levels)
    users = rng.integers(40, size=600)
    labels = (rng.random(600) < 0.3).astype(int)
    scores = rng.integers(levels, size=600) / 7  # few levels: many ties
    aucs, weights = [], []
    for user in range(40):
        own = users == user
        if 0 < labels[own].sum() < own.sum():
            aucs.append(roc_auc_score(labels[own], scores[own]))
            weights.append(own.sum() if weight == "impressions" else labels[own].sum())
    expected = np.average(aucs, weights=weights)
    assert gauc(labels, scores, users, weight=weight) == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]
    shuffled = rng.permutation(600)
    other = gauc(labels[shuffled], scores[shuffled], users[shuffled], weight=weight)  # type: ignore[arg-type]
    assert other == pytest.approx(expected, abs=1e-12)


def test_users_without_both_labels_do_not_count() -> None:
    labels, users = [1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2]
    scores = [0.9, 0.1, 0.0, 0.5, 0.7, 0.2]
    assert gauc(np.array(labels), np.array(scores), np.array(users)) == 1.0


def test_a_constant_score_is_chance_and_growing_functions_change_nothing() -> None:
    labels = torch.tensor([1, 0, 0, 1, 0, 1])
    users = torch.tensor([7, 7, 7, -2, -2, -2])
    scores = torch.tensor([0.3, 0.4, 0.1, -2.0, 5.0, 6.0])
    assert gauc(labels, torch.zeros(6), users) == 0.5
    assert gauc(labels, scores, users) == gauc(labels.bool(), torch.sigmoid(scores).double(), users) == 0.5


def test_with_a_pair_per_user_it_is_the_share_of_users_whose_click_ranks_first() -> None:
    scores = np.array([2.0, 1.0, 0.0, 1.0, 3.0, 3.0, 1.0, 0.5])
    assert gauc(np.array([1, 0] * 4), scores, np.repeat(np.arange(4), 2)) == pytest.approx((1 + 0 + 0.5 + 1) / 4)


@pytest.mark.parametrize(
    ("labels", "scores", "users", "error", "message"),
    [
        ([0, 2], [0.1, 0.2], [0, 0], ValueError, "labels must be 0 or 1, got 2 in row 1"),
        ([0, 1], [0.1, np.nan], [0, 0], ValueError, "scores must be finite"),
        ([0, 1], [0.1, 0.2], [0, 1], ValueError, "no user with both"),
        ([0, 1, 1], [0.1, 0.2], [0, 1], ValueError, "must have the same length"),
        ([0, 1], [0.1, 0.2], [0.0, 1.0], TypeError, "groups must hold integers"),
    ],
)
def test_bad_input_is_refused(labels: list, scores: list, users: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gauc(np.array(labels), np.array(scores), np.array(users))


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="weight must be one of 'impressions', 'clicks', got 'users'"):
        gauc(np.array([0, 1]), np.array([0.1, 0.2]), np.array([0, 0]), weight="users")  # type: ignore[arg-type]


def test_rela_impr_is_the_gain_above_chance_in_percent() -> None:
    # Table 3 of the paper, MovieLens: DIN beside the base model.
    assert rela_impr(0.7337, 0.7300) == pytest.approx(1.61, abs=0.005)
    assert rela_impr(0.7, 0.7) == 0
    with pytest.raises(ValueError, match=r"base must be above 0\.5, got 0\.5"):
        rela_impr(0.7, 0.5)
    with pytest.raises(ValueError, match="auc must lie in"):
        rela_impr(70.0, 0.6)
