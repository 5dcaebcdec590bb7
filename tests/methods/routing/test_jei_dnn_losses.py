"""The losses of gates and heads against loops, and what their weights do to the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.methods.routing.jei_dnn import (
    GateLoss,
    HeadLoss,
    exit_cross_entropy,
    exit_index,
    exit_probabilities,
    positive_weights,
)
from headgate.methods.routing.jei_dnn.losses import exit_objective, warmup_weights

COSTS = (0.2, 0.5, 1.0)


def draw(batch: int = 12, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (3, batch, classes), gate logits (batch, 2) and classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, batch, classes, generator=generator, dtype=torch.float64)
    gate_logits = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    return logits, gate_logits, torch.randint(classes, (batch,), generator=generator)


def test_cross_entropies_are_those_of_torch() -> None:
    logits, _, target = draw()
    expected = torch.stack([F.cross_entropy(part, target, reduction="none") for part in logits], dim=1)
    torch.testing.assert_close(exit_cross_entropy(logits, target), expected)


def test_the_gate_loss_is_the_weighted_loop_over_inputs_and_gates() -> None:
    logits, gate_logits, target = draw()
    weight, lam = torch.tensor([3.0, 0.5]), 0.7
    total = 0.0
    for row in range(12):
        ce = [float(F.cross_entropy(logits[exit, row], target[row])) for exit in range(3)]
        best = min(range(3), key=lambda exit: ce[exit] + lam * COSTS[exit])
        for gate in range(2):
            g = float(gate_logits[row, gate].sigmoid())
            fires = gate >= best
            total -= float(weight[gate] * torch.tensor(g).log()) if fires else float(torch.tensor(1 - g).log())
    loss = GateLoss(COSTS, lam)(gate_logits, logits, target, weight)
    assert float(loss) == pytest.approx(total / 24, rel=1e-5)
    rows = GateLoss(COSTS, lam, reduction="none")(gate_logits, logits, target, weight)
    torch.testing.assert_close(rows.mean(), loss)
    torch.testing.assert_close(GateLoss(COSTS, lam, reduction="sum")(gate_logits, logits, target, weight), rows.sum())


def test_only_the_gates_learn_from_the_gate_loss() -> None:
    logits, gate_logits, target = draw()
    logits.requires_grad_()
    gate_logits.requires_grad_()
    GateLoss(COSTS, 0.5)(gate_logits, logits, target).backward()
    assert logits.grad is None
    assert gate_logits.grad is not None
    assert (gate_logits.grad != 0).all()


def test_objectives_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    target = torch.tensor([0])
    right = torch.sigmoid(torch.tensor(2.0))
    torch.testing.assert_close(exit_objective(logits, target, "prob"), torch.stack([-right, torch.tensor(0.0)])[None])
    assert exit_objective(logits, target, "correct").tolist() == [[-1.0, 0.0]]
    torch.testing.assert_close(exit_objective(logits, target, "ce"), exit_cross_entropy(logits, target))


def heads_gradient(weighting: Any, logits: Tensor, exit_prob: Tensor, target: Tensor) -> tuple[float, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = HeadLoss(weighting)(leaf, exit_prob, target)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def test_uniform_is_the_published_loss_in_value_and_gradient() -> None:
    # The published code multiplies by a ratio that is not detached, which cancels the weights.
    logits, gate_logits, target = draw()
    exit_prob = exit_probabilities(gate_logits)
    leaf = logits.clone().requires_grad_()
    ce = exit_cross_entropy(leaf, target)[:, :-1]
    weighted = exit_prob[:, :-1] * ce
    published = (weighted * (ce.sum(dim=1) / weighted.sum(dim=1))[:, None]).mean()
    published.backward()
    value, gradient = heads_gradient("uniform", logits, exit_prob, target)
    assert value == pytest.approx(published.item())
    torch.testing.assert_close(gradient, leaf.grad)


def test_exit_prob_has_the_value_of_the_plain_mean_but_weights_the_gradient() -> None:
    logits, gate_logits, target = draw()
    exit_prob = exit_probabilities(gate_logits)
    plain, plain_gradient = heads_gradient("uniform", logits, exit_prob, target)
    value, gradient = heads_gradient("exit_prob", logits, exit_prob, target)
    assert value == pytest.approx(plain)
    ce = exit_cross_entropy(logits, target)[:, :-1]
    ratio = ce.sum(dim=1) / (exit_prob[:, :-1] * ce).sum(dim=1)
    factor = (exit_prob[:, :-1] * ratio[:, None]).T
    torch.testing.assert_close(gradient[:-1], plain_gradient[:-1] * factor[:, :, None])
    assert (gradient[-1] == 0).all()


def test_raw_is_the_expected_cross_entropy_and_its_gradient_is_weighted_by_the_exits() -> None:
    logits, gate_logits, target = draw()
    exit_prob = exit_probabilities(gate_logits).requires_grad_()
    ce = exit_cross_entropy(logits, target)
    value, gradient = heads_gradient("raw", logits, exit_prob, target)
    assert value == pytest.approx(((exit_prob[:, :-1] * ce[:, :-1]).sum(dim=1).mean()).item())
    assert exit_prob.grad is None
    softmax_gradient = logits.softmax(dim=2) - F.one_hot(target, 4)
    torch.testing.assert_close(gradient[:-1], (exit_prob.T[:-1, :, None] * softmax_gradient[:-1] / 12).detach())


def test_hard_is_the_cross_entropy_of_the_answers_given() -> None:
    logits, gate_logits, target = draw()
    exit_prob = exit_probabilities(gate_logits)
    taken = exit_index(exit_prob)
    value, gradient = heads_gradient("hard", logits, exit_prob, target)
    assert value == pytest.approx(float(F.cross_entropy(logits[taken, torch.arange(12)], target)))
    learns = (gradient != 0).any(dim=2).T
    assert torch.equal(learns, F.one_hot(taken, 3).bool())


def test_a_row_that_no_gate_lets_go_weighs_nothing() -> None:
    logits, _, target = draw(batch=2)
    exit_prob = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    rows = HeadLoss("exit_prob", reduction="none")(logits, exit_prob, target)
    ce = exit_cross_entropy(logits, target)
    assert rows.tolist() == pytest.approx([0.0, float(ce[1, :-1].mean())])


def test_positive_weights_follow_the_counts_of_optimal_exits() -> None:
    best = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3])
    # (8 − 3)/3, (8 − 1)/1 cut to 5, nobody: 8/0.1 cut to 5.
    torch.testing.assert_close(positive_weights(best, 3), torch.tensor([5 / 3, 5.0, 5.0]))
    # The ratio of what each gate really meets: 3, 4 and 4 of 8.
    torch.testing.assert_close(positive_weights(best, 3, rule="target"), torch.tensor([5 / 3, 1.0, 1.0]))
    assert positive_weights(torch.zeros(4, dtype=torch.int64), 2, max_weight=2.0).tolist() == [0.0, 2.0]


def test_early_heads_weigh_more_in_the_warm_up() -> None:
    assert warmup_weights(4) == (5.0, 4.0, 3.0, 2.0)


def test_the_gate_loss_is_computed_in_float32_for_smaller_dtypes_only() -> None:
    logits, gate_logits, target = draw()
    half = GateLoss(COSTS, 0.5)(gate_logits.bfloat16(), logits.bfloat16(), target)
    assert half.dtype == torch.float32
    single = GateLoss(COSTS, 0.5)(gate_logits.float(), logits.float(), target, torch.ones(2, dtype=torch.float64))
    assert single.dtype == torch.float32


def test_bad_arguments_of_the_losses_are_refused() -> None:
    logits, gate_logits, target = draw()
    with pytest.raises(ValueError, match="lam must not be negative"):
        GateLoss(COSTS, -0.1)
    with pytest.raises(ValueError, match="objective must be one of 'ce', 'prob', 'correct', got 'mse'"):
        GateLoss(COSTS, 0.1, objective="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two exits or more"):
        GateLoss([1.0], 0.1)
    with pytest.raises(ValueError, match="weighting must be one of"):
        HeadLoss("soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits must have exits=3"):
        GateLoss(COSTS, 0.1)(gate_logits, logits[:2], target)
    with pytest.raises(ValueError, match="pos_weight must have gates=2"):
        GateLoss(COSTS, 0.1)(gate_logits, logits, target, torch.ones(3))
    with pytest.raises(ValueError, match="target must have batch=12"):
        exit_cross_entropy(logits, target[:5])
    with pytest.raises(TypeError, match="target must be int64"):
        exit_cross_entropy(logits, target.float())
    with pytest.raises(ValueError, match="best must hold at least one"):
        positive_weights(torch.zeros(0, dtype=torch.int64), 2)
