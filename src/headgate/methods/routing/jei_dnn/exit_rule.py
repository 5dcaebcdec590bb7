r"""From gates to exits (paper, Section 3 and Equation 8): a probability for every exit, and the exit that is taken.

Each gate says :math:`g_l = \sigma(\mathrm{logit}_l)`; the exits share what the earlier gates have left over:

.. math:: P_l = \max\bigl(0, \min(g_l, 1 - \textstyle\sum_{j<l} g_j)\bigr), \qquad P_{G+1} = 1 - \textstyle\sum_{l \le G} P_l

An input leaves at the first exit whose conditional probability reaches one half, else at the last:

.. math:: c_l = \mathrm{clip}\bigl(P_l / \textstyle\prod_{j<l} (1 - c_j),\, 0,\, 1\bigr) \ge \tfrac12

where 0/0 counts as 0. Everything runs along the exits, so a forward pass that stops early needs :func:`exit_step` alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.validate import check_floating, check_probability, check_shape

__all__ = [
    "ExitState",
    "conditional_exits",
    "exit_index",
    "exit_probabilities",
    "exit_step",
    "first_state",
    "optimal_exit_targets",
    "optimal_exits",
    "reached_exits",
]


class ExitState(NamedTuple):
    """What the exits passed so far leave to the next one; float32 or wider.

    Attributes:
        spent: ``(batch,)`` sum of the earlier gates, Σ g_j.
        left: ``(batch,)`` probability that no earlier exit was taken, Π (1 − c_j).
    """

    spent: Float[Tensor, " batch"]
    left: Float[Tensor, " batch"]


def first_state(gate_logit: Float[Tensor, " batch"]) -> ExitState:
    """The state before the first exit."""
    zeros = torch.zeros_like(gate_logit, dtype=torch.promote_types(gate_logit.dtype, torch.float32))
    return ExitState(zeros, torch.ones_like(zeros))


def exit_step(
    gate_logit: Float[Tensor, " batch"], state: ExitState
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"], ExitState]:
    """Pass one exit.

    Args:
        gate_logit: ``(batch,)`` of this exit's gate.
        state: what the earlier exits left.

    Returns:
        P_l ``(batch,)``, c_l ``(batch,)`` and the state for the next exit.
    """
    gate = gate_logit.to(state.spent.dtype).sigmoid()
    probability = torch.minimum(gate, 1 - state.spent).clamp_min(0)
    conditional = _conditional(probability, state.left)
    return probability, conditional, ExitState(state.spent + gate, state.left * (1 - conditional))


def exit_probabilities(gate_logits: Float[Tensor, "batch gates"]) -> Float[Tensor, "batch exits"]:
    """How probable every exit is.

    Args:
        gate_logits: ``(batch, G)``, G ≥ 1.

    Returns:
        ``(batch, G + 1)``, not negative, each row with sum one; the last entry is the final exit.

    Raises:
        TypeError: not floating point.
        ValueError: another rank, or no gate.
    """
    check_shape("gate_logits", gate_logits, (None, None), "batch, gates")
    check_floating("gate_logits", gate_logits)
    if gate_logits.shape[1] < 1:
        raise ValueError(f"gate_logits must have at least one gate, got {tuple(gate_logits.shape)}")
    gates = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32)).sigmoid()
    spent = F.pad(gates.cumsum(dim=1)[:, :-1], (1, 0))
    early = torch.minimum(gates, 1 - spent).clamp_min(0)
    # Rounding can bring the sum a hair above one.
    last = (1 - early.sum(dim=1, keepdim=True)).clamp_min(0)
    return torch.cat([early, last], dim=1).to(gate_logits.dtype)


def conditional_exits(exit_prob: Float[Tensor, "batch exits"]) -> Float[Tensor, "batch gates"]:
    """How probable each exit but the last is for an input that has come so far, c_l.

    Args:
        exit_prob: ``(batch, G + 1)`` from :func:`exit_probabilities`.

    Returns:
        ``(batch, G)`` in [0, 1].

    Raises:
        TypeError: not floating point.
        ValueError: another rank, or fewer than two exits.
    """
    _check_exit_prob(exit_prob)
    early = exit_prob[:, :-1].to(torch.promote_types(exit_prob.dtype, torch.float32))
    left = torch.ones_like(early[:, 0])
    columns = []
    for probability in early.unbind(dim=1):
        conditional = _conditional(probability, left)
        columns.append(conditional)
        left = left * (1 - conditional)
    return torch.stack(columns, dim=1).to(exit_prob.dtype)


def exit_index(exit_prob: Float[Tensor, "batch exits"], threshold: float = 0.5) -> Int[Tensor, " batch"]:
    """Where each input leaves.

    Args:
        exit_prob: ``(batch, G + 1)`` from :func:`exit_probabilities`.
        threshold: what c_l must reach, in [0, 1]; the method's is one half. A lower one exits earlier.

    Returns:
        ``(batch,)`` int64: 0 is the first exit, G the final one.

    Raises:
        TypeError: not floating point.
        ValueError: another rank, fewer than two exits, or a threshold outside [0, 1].
    """
    return reached_exits(conditional_exits(exit_prob), threshold)


def reached_exits(conditional: Float[Tensor, "batch gates"], threshold: float = 0.5) -> Int[Tensor, " batch"]:
    """The first exit whose conditional probability reaches ``threshold``; G where none does.

    Args:
        conditional: ``(batch, G)`` from :func:`conditional_exits`.
        threshold: in [0, 1].

    Raises:
        ValueError: another rank, or a threshold outside [0, 1].
    """
    check_shape("conditional", conditional, (None, None), "batch, gates")
    check_probability(threshold=threshold)
    takes: Bool[Tensor, "batch gates"] = conditional >= threshold
    final = torch.ones_like(takes[:, :1])
    return torch.cat([takes, final], dim=1).to(torch.uint8).argmax(dim=1)


def optimal_exits(
    objective: Float[Tensor, "batch exits"], cost: Float[Tensor, " exits"], lam: float
) -> Int[Tensor, " batch"]:
    """The exit that each input should take, :math:`l^* = \\arg\\min_l\\,(\\mathrm{CE}_l + λ\\,\\mathrm{IC}_l)`.

    Args:
        objective: ``(batch, G + 1)`` what is bad about each exit's answer, such as its cross-entropy.
        cost: ``(G + 1,)`` IC, each exit's share of the full cost.
        lam: λ ≥ 0, what a full computation is worth in units of the objective.

    Returns:
        ``(batch,)`` int64; the earliest of equally good exits.

    Raises:
        TypeError: not floating point.
        ValueError: shapes do not fit, or λ is negative.
    """
    check_shape("objective", objective, (None, None), "batch, exits")
    check_floating("objective", objective)
    check_shape("cost", cost, (objective.shape[1],), "exits")
    if not lam >= 0:
        raise ValueError(f"lam must not be negative, got {lam}")
    return (objective + lam * cost.to(objective.dtype)).argmin(dim=1)


def optimal_exit_targets(
    objective: Float[Tensor, "batch exits"], cost: Float[Tensor, " exits"], lam: float
) -> Float[Tensor, "batch gates"]:
    """What the gates are trained to say: t_l = 1 from the optimal exit on, 0 before it.

    An input that has missed its optimum should leave at once, so the gates behind it fire, too.

    Args:
        objective: as in :func:`optimal_exits`.
        cost: as there.
        lam: as there.

    Returns:
        ``(batch, G)`` zeros and ones of the dtype of ``objective``; all zero where the final exit is best.

    Raises:
        TypeError: not floating point.
        ValueError: shapes do not fit, or λ is negative.
    """
    best = optimal_exits(objective, cost, lam)
    gates = torch.arange(objective.shape[1] - 1, device=objective.device)
    return (gates >= best[:, None]).to(objective.dtype)


def _conditional(probability: Tensor, left: Tensor) -> Tensor:
    possible = left > 0
    return torch.where(possible, probability / torch.where(possible, left, 1), 0).clamp(0, 1)


def _check_exit_prob(exit_prob: Tensor) -> None:
    check_shape("exit_prob", exit_prob, (None, None), "batch, exits")
    check_floating("exit_prob", exit_prob)
    if exit_prob.shape[1] < 2:
        raise ValueError(f"exit_prob must have at least two exits, got {tuple(exit_prob.shape)}")
