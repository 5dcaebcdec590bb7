r"""Lion, an optimizer of signs (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675).

Algorithm 2, with g the gradient, m its running average, η the learning rate and λ the decoupled weight decay:

.. math:: θ \leftarrow θ - η\,(\operatorname{sign}(β_1 m + (1 - β_1) g) + λ θ), \qquad
          m \leftarrow β_2 m + (1 - β_2) g.

All entries move by η, whatever the size of the gradient: learning rates are 3 to 10 times smaller than AdamW's, weight
decays as much larger. It keeps one number per parameter, AdamW two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from headgate.validate import check_positive

__all__ = ["Lion"]


class Lion(torch.optim.Optimizer):
    """Lion.

    Args:
        params: parameters, or groups of them.
        lr: η, positive.
        betas: β₁ of the step and β₂ of the running average, each in [0, 1).
        weight_decay: λ, at least 0.

    Raises:
        ValueError: a number lies outside its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_positive(lr=lr)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update.

        Args:
            closure: computes the loss and its gradients anew; most loops have done so already.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            of_step, of_average = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                direction = torch.lerp(parameter.grad, average, of_step).sign_()
                parameter.mul_(1 - rate * decay).add_(direction, alpha=-rate)
                average.lerp_(parameter.grad, 1 - of_average)
        return loss
