r"""The two problems that JEI-DNN solves in turn (paper, Section 4.3): gates with the heads fixed, heads with the gates fixed.

Gates, with targets t of :func:`~headgate.methods.routing.jei_dnn.exit_rule.optimal_exit_targets` and weights w:

.. math:: L_G = \frac{1}{BG} \sum_{b,l} \mathrm{BCE}_{w_l}(\mathrm{gate}_{b,l}, t_{b,l})

Heads, weighted by the probability P of each exit, which gets no gradient:

.. math:: L_I = \frac1B \sum_{b,l \le G} P_{b,l}\,\mathrm{CE}_{b,l}

The official code multiplies every row by :math:`r_b = \sum_l \mathrm{CE}_{b,l} / \sum_l P_{b,l} \mathrm{CE}_{b,l}` without
detaching it. Then the weights cancel, in value and in gradient: what is left is the plain mean of all cross-entropies.
Detached, the weights stay, but the gradient of a row is that of a logarithm,

.. math:: r_b \, \nabla \sum_l P_{b,l}\,\mathrm{CE}_{b,l} = \sum_l \mathrm{CE}_{b,l} \; \nabla \log \sum_l P_{b,l}\,\mathrm{CE}_{b,l},

which does not fade where an answer is right already: heads become over-confident at large learning rates.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.costs import check_costs
from headgate.methods.routing.jei_dnn.exit_rule import conditional_exits, optimal_exit_targets, reached_exits
from headgate.validate import check_floating, check_integer, check_positive, check_shape

__all__ = [
    "CountRule",
    "GateLoss",
    "GateObjective",
    "HeadLoss",
    "HeadWeighting",
    "exit_cross_entropy",
    "exit_objective",
    "positive_weights",
    "warmup_weights",
]

GateObjective: TypeAlias = Literal["ce", "prob", "correct"]
HeadWeighting: TypeAlias = Literal["exit_prob", "uniform", "raw", "hard"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
CountRule: TypeAlias = Literal["optimal", "target"]


class GateLoss(nn.Module):
    """Train the gates towards the exit with the least ``objective + λ · cost`` (L_G above).

    Args:
        costs: ``(G + 1,)`` rising costs of the exits; divided by the last where that is not 1.
        lam: λ ≥ 0, what a full computation is worth in units of the objective.
        objective: ``"ce"``, the cross-entropy of each exit; ``"prob"``, minus its greatest probability where it is
            right, else 0; ``"correct"``, −1 where it is right, else 0.
        reduction: ``"mean"`` over inputs and gates, ``"sum"``, or ``"none"`` for ``(batch, G)``.

    Raises:
        ValueError: bad costs, a negative λ, or an unknown name.
    """

    costs: Tensor

    def __init__(
        self,
        costs: tuple[float, ...] | list[float] | Tensor,
        lam: float,
        *,
        objective: GateObjective = "ce",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if not lam >= 0:
            raise ValueError(f"lam must not be negative, got {lam}")
        _check_name("objective", objective, get_args(GateObjective))
        _check_name("reduction", reduction, get_args(Reduction))
        values = check_costs(costs, len(costs))
        if len(values) < 2:
            raise ValueError(f"costs must be those of two exits or more, got {len(values)}")
        self.lam = lam
        self.objective: GateObjective = objective
        self.reduction: Reduction = reduction
        self.register_buffer("costs", torch.tensor(values))

    def forward(
        self,
        gate_logits: Float[Tensor, "batch gates"],
        logits: Float[Tensor, "exits batch classes"],
        target: Int[Tensor, " batch"],
        pos_weight: Float[Tensor, " gates"] | None = None,
    ) -> Float[Tensor, "..."]:
        """Compute the loss, in float32 or wider; it has a gradient with respect to ``gate_logits`` alone.

        Args:
            gate_logits: ``(batch, G)``.
            logits: ``(G + 1, batch, classes)`` of all exits, the final one last.
            target: ``(batch,)`` classes.
            pos_weight: ``(G,)`` w_l, the weight of an input that should leave; default 1.

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes do not fit.
        """
        gates = len(self.costs) - 1
        check_shape("gate_logits", gate_logits, (None, gates), "batch, gates")
        check_floating("gate_logits", gate_logits)
        check_shape("logits", logits, (gates + 1, gate_logits.shape[0], None), "exits, batch, classes")
        check_floating("logits", logits)
        wide = torch.promote_types(gate_logits.dtype, torch.float32)
        objective = exit_objective(logits.detach().to(wide), target, self.objective)
        wanted = optimal_exit_targets(objective, self.costs, self.lam)
        if pos_weight is not None:
            check_shape("pos_weight", pos_weight, (gates,), "gates")
            pos_weight = pos_weight.to(wide)
        return F.binary_cross_entropy_with_logits(
            gate_logits.to(wide), wanted, pos_weight=pos_weight, reduction=self.reduction
        )


class HeadLoss(nn.Module):
    """Train the heads on the inputs that leave through them (L_I above).

    Args:
        weighting: ``"exit_prob"``, P_l · CE_l with every row scaled by the detached ratio r, so that the size of the loss
            is that of the plain mean and the gates still say where it matters (mind the learning rate, see above); ``"uniform"``, the plain mean over exits,
            which the official code computes; ``"raw"``, L_I without the ratio; ``"hard"``, the cross-entropy at the
            exit that is taken (the official mode ``single``).
        reduction: ``"mean"`` over inputs, ``"sum"``, or ``"none"`` for ``(batch,)``.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, weighting: HeadWeighting = "exit_prob", *, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_name("weighting", weighting, get_args(HeadWeighting))
        _check_name("reduction", reduction, get_args(Reduction))
        self.weighting: HeadWeighting = weighting
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "exits batch classes"],
        exit_prob: Float[Tensor, "batch exits"],
        target: Int[Tensor, " batch"],
    ) -> Float[Tensor, "..."]:
        """Compute the loss, in float32 or wider; no gradient reaches ``exit_prob``.

        Args:
            logits: ``(G + 1, batch, classes)`` of all exits. The final ones matter to ``"hard"`` alone.
            exit_prob: ``(batch, G + 1)``.
            target: ``(batch,)`` classes.

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes do not fit.
        """
        check_shape("exit_prob", exit_prob, (None, None), "batch, exits")
        check_floating("exit_prob", exit_prob)
        exits = exit_prob.shape[1]
        if exits < 2:
            raise ValueError(f"exit_prob must have at least two exits, got {tuple(exit_prob.shape)}")
        check_shape("logits", logits, (exits, exit_prob.shape[0], None), "exits, batch, classes")
        check_floating("logits", logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        ce = exit_cross_entropy(logits.to(wide), target)
        rows = _WEIGHTINGS[self.weighting](ce, exit_prob.detach().to(wide))
        if self.reduction == "none":
            return rows
        return rows.mean() if self.reduction == "mean" else rows.sum()


def exit_cross_entropy(
    logits: Float[Tensor, "exits batch classes"], target: Int[Tensor, " batch"]
) -> Float[Tensor, "batch exits"]:
    """The cross-entropy of every exit's answer, ``(batch, G + 1)``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: another rank, or not one target per input.
    """
    check_shape("logits", logits, (None, None, None), "exits, batch, classes")
    check_floating("logits", logits)
    check_shape("target", target, (logits.shape[1],), "batch")
    check_integer("target", target)
    log_probability = logits.log_softmax(dim=2)
    chosen = target.long()[None, :, None].expand(logits.shape[0], -1, 1)
    return -log_probability.gather(2, chosen).squeeze(2).T


def exit_objective(
    logits: Float[Tensor, "exits batch classes"], target: Int[Tensor, " batch"], objective: GateObjective = "ce"
) -> Float[Tensor, "batch exits"]:
    """What is bad about every exit's answer, ``(batch, G + 1)``; see :class:`GateLoss`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: another rank, not one target per input, or an unknown objective.
    """
    _check_name("objective", objective, get_args(GateObjective))
    if objective == "ce":
        return exit_cross_entropy(logits, target)
    check_shape("logits", logits, (None, None, None), "exits, batch, classes")
    check_floating("logits", logits)
    check_shape("target", target, (logits.shape[1],), "batch")
    check_integer("target", target)
    confidence, answer = logits.softmax(dim=2).max(dim=2)
    worth = confidence if objective == "prob" else torch.ones_like(confidence)
    return -torch.where(answer == target, worth, 0).T


def positive_weights(
    best: Int[Tensor, " batch"], gates: int, *, max_weight: float = 5.0, rule: CountRule = "optimal"
) -> Float[Tensor, " gates"]:
    """The weights w_l of inputs that should leave, from the optimal exits of validation inputs: ``(N − n_l) / n_l``.

    Args:
        best: ``(N,)`` optimal exits, in [0, G].
        gates: G.
        max_weight: greatest weight.
        rule: what n_l counts: ``"optimal"``, inputs whose best exit is exactly l, as the official code does;
            ``"target"``, inputs that gate l should let go (best exit l or earlier), the ratio of negatives to positives
            that the loss meets.

    Returns:
        ``(G,)`` float32, at least 0; n_l below 0.1 counts as 0.1.

    Raises:
        TypeError: not integers.
        ValueError: no input, ``gates`` or ``max_weight`` not positive, or an unknown rule.
    """
    check_shape("best", best, (None,), "batch")
    check_integer("best", best)
    check_positive(gates=gates, max_weight=max_weight)
    _check_name("rule", rule, get_args(CountRule))
    if len(best) == 0:
        raise ValueError("best must hold at least one input, got none")
    counts = torch.bincount(best.long(), minlength=gates + 1)[:gates].float()
    if rule == "target":
        counts = counts.cumsum(dim=0)
    return ((len(best) - counts) / counts.clamp_min(0.1)).clamp(0, max_weight)


def warmup_weights(gates: int) -> tuple[float, ...]:
    """Weights of the heads' cross-entropies while they warm up, G + 1 for the first down to 2 for the last early one."""
    check_positive(gates=gates)
    return tuple(float(gates + 1 - exit) for exit in range(gates))


def _by_exit_prob(ce: Tensor, exit_prob: Tensor) -> Tensor:
    early, weighted = ce[:, :-1], exit_prob[:, :-1] * ce[:, :-1]
    total = weighted.sum(dim=1)
    # A row that no gate would let go has nothing to scale.
    ratio = torch.where(total > 0, early.sum(dim=1) / torch.where(total > 0, total, 1), 0).detach()
    return ratio * total / early.shape[1]


def _uniform(ce: Tensor, exit_prob: Tensor) -> Tensor:
    return ce[:, :-1].mean(dim=1)


def _raw(ce: Tensor, exit_prob: Tensor) -> Tensor:
    return (exit_prob[:, :-1] * ce[:, :-1]).sum(dim=1)


def _hard(ce: Tensor, exit_prob: Tensor) -> Tensor:
    taken = reached_exits(conditional_exits(exit_prob))
    return ce.gather(1, taken[:, None]).squeeze(1)


_WEIGHTINGS = {"exit_prob": _by_exit_prob, "uniform": _uniform, "raw": _raw, "hard": _hard}


def _check_name(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}")
