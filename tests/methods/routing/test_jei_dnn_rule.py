"""What a gate reads, and how gates become exits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headgate.methods.routing.jei_dnn import (
    conditional_exits,
    exit_index,
    exit_probabilities,
    optimal_exit_targets,
    optimal_exits,
    uncertainty_features,
)
from headgate.methods.routing.jei_dnn.costs import check_costs, gate_multiply_adds
from headgate.methods.routing.jei_dnn.exit_rule import exit_step, first_state, reached_exits


def rule_by_hand(gate_logits: list[float]) -> tuple[list[float], list[float], int]:
    """Probabilities, conditional probabilities and exit of one input, in plain numbers."""
    spent, left, taken = 0.0, 1.0, None
    probabilities, conditionals = [], []
    for exit, logit in enumerate(gate_logits):
        gate = 1 / (1 + math.exp(-logit))
        probability = max(0.0, min(gate, 1 - spent))
        conditional = min(1.0, max(0.0, probability / left)) if left > 0 else 0.0
        if taken is None and conditional >= 0.5:
            taken = exit
        spent, left = spent + gate, left * (1 - conditional)
        probabilities.append(probability)
        conditionals.append(conditional)
    return [*probabilities, 1 - sum(probabilities)], conditionals, len(gate_logits) if taken is None else taken


def test_uncertainties_of_a_hand_made_prediction() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    q = torch.tensor([0.25, 0.09, 0.04], dtype=torch.float64) / 0.38
    expected = [0.5, -(p * p.log()).sum().item(), 0.2, -(q * q.log()).sum().item()]
    torch.testing.assert_close(uncertainty_features(p.log() + 7), torch.tensor([expected], dtype=torch.float64))


def test_a_certain_prediction_has_no_entropy_and_no_nan() -> None:
    features = uncertainty_features(torch.tensor([[1e4, 0.0, 0.0], [3.0, 3.0, 3.0]]))
    third = math.log(3)
    torch.testing.assert_close(features, torch.tensor([[1.0, 0.0, 1.0, 0.0], [1 / 3, third, 0.0, third]]))


def test_uncertainties_give_no_gradient_to_the_prediction() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    assert not uncertainty_features(logits).requires_grad


@pytest.mark.parametrize(
    ("logits", "error", "match"),
    [
        (torch.zeros(3, 1), ValueError, "at least two classes"),
        (torch.zeros(3), ValueError, "logits must have shape"),
        (torch.tensor([[0.0, math.nan]]), ValueError, "logits must be finite, got 1 of 2"),
        (torch.tensor([[0.0, math.inf]]), ValueError, "logits must be finite"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "floating point"),
    ],
)
def test_bad_predictions_are_refused(logits: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        uncertainty_features(logits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-6, 6), min_size=4, max_size=4), min_size=1, max_size=5))
def test_exits_equal_their_definition(rows: list[list[float]]) -> None:
    gate_logits = torch.tensor(rows, dtype=torch.float64)
    exit_prob = exit_probabilities(gate_logits)
    conditional = conditional_exits(exit_prob)
    for row, (probabilities, conditionals, _) in enumerate(map(rule_by_hand, rows)):
        torch.testing.assert_close(exit_prob[row], torch.tensor(probabilities, dtype=torch.float64), rtol=0, atol=1e-9)
        expected = torch.tensor(conditionals, dtype=torch.float64)
        # Behind an exit with almost nothing left the quotient of two roundings is anything.
        held = (1 - expected).cumprod(dim=0) > 1e-6
        seen = torch.cat([torch.ones(1, dtype=torch.bool), held[:-1]])
        torch.testing.assert_close(conditional[row][seen], expected[seen], rtol=0, atol=1e-6)
    assert (exit_prob >= 0).all()
    torch.testing.assert_close(exit_prob.sum(dim=1), torch.ones(len(rows), dtype=torch.float64))


def test_the_first_conditional_above_one_half_is_taken_and_the_last_exit_otherwise() -> None:
    gates = torch.tensor([[0.6, 0.9, 0.1], [0.3, 0.4, 0.9], [0.1, 0.1, 0.1]], dtype=torch.float64)
    exit_prob = exit_probabilities(gates.logit())
    # Row 1: 0.3, then 0.4 / 0.7 = 0.571.
    torch.testing.assert_close(conditional_exits(exit_prob)[1, 1].item(), 0.4 / 0.7)
    assert exit_index(exit_prob).tolist() == [0, 1, 3]
    assert exit_index(exit_prob, threshold=0.6).tolist() == [0, 2, 3]
    assert exit_index(exit_prob, threshold=0.0).tolist() == [0, 0, 0]


def test_nothing_left_counts_as_no_probability() -> None:
    # A gate that is sure leaves 0/0 behind it.
    conditional = conditional_exits(torch.tensor([[1.0, 0.0, 0.0]]))
    assert conditional.tolist() == [[1.0, 0.0]]


def test_passing_the_exits_one_by_one_equals_all_at_once() -> None:
    gate_logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    state, steps = first_state(gate_logits[:, 0]), []
    for gate_logit in gate_logits.unbind(dim=1):
        probability, conditional, state = exit_step(gate_logit, state)
        steps.append((probability, conditional))
    exit_prob = exit_probabilities(gate_logits)
    torch.testing.assert_close(torch.stack([step[0] for step in steps], dim=1), exit_prob[:, :-1])
    taken = reached_exits(torch.stack([step[1] for step in steps], dim=1))
    assert torch.equal(taken, exit_index(exit_prob))


def test_a_high_lambda_makes_the_first_exit_optimal_and_none_the_best_one() -> None:
    ce = torch.tensor([[0.9, 0.4, 0.3], [0.2, 0.5, 0.5]])
    cost = torch.tensor([0.2, 0.6, 1.0])
    assert optimal_exits(ce, cost, 0.0).tolist() == [2, 0]
    assert optimal_exits(ce, cost, 0.5).tolist() == [1, 0]
    assert optimal_exits(ce, cost, 9.0).tolist() == [0, 0]


def test_gates_behind_the_optimum_should_fire_too() -> None:
    ce = torch.tensor([[0.9, 0.1, 0.9, 0.9], [0.9, 0.9, 0.9, 0.1], [0.1, 0.9, 0.9, 0.9]])
    targets = optimal_exit_targets(ce, torch.tensor([0.25, 0.5, 0.75, 1.0]), 0.1)
    assert targets.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 1]]


def test_bad_arguments_of_the_rule_are_refused() -> None:
    ce, cost = torch.rand(3, 3), torch.tensor([0.2, 0.6, 1.0])
    with pytest.raises(ValueError, match="lam must not be negative, got -1"):
        optimal_exits(ce, cost, -1.0)
    with pytest.raises(ValueError, match="cost must have exits=3"):
        optimal_exits(ce, cost[:2], 0.1)
    with pytest.raises(ValueError, match="at least one gate"):
        exit_probabilities(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="at least two exits"):
        exit_index(torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\]"):
        exit_index(torch.ones(2, 2) / 2, threshold=1.5)


def test_costs_must_rise_and_are_divided_by_the_last() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_costs([0.25, 0.5, 1.0], 3) == (0.25, 0.5, 1.0)
    with pytest.warns(UserWarning, match="divided by the last, 8"):
        assert check_costs(torch.tensor([2.0, 4.0, 8.0]), 3) == (0.25, 0.5, 1.0)
    for costs in ([0.5, 0.5, 1.0], [0.6, 0.5, 1.0], [0.0, 0.5, 1.0], [0.2, 0.5, math.inf], [0.2, math.nan, 1.0]):
        with pytest.raises(ValueError, match="positive, finite and rise"):
            check_costs(costs, 3)
    with pytest.raises(ValueError, match="each of the 3 exits, got 2"):
        check_costs([0.5, 1.0], 3)


def test_a_gate_is_counted_as_in_the_official_code() -> None:
    assert gate_multiply_adds(10) == 96
