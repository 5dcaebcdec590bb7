"""The parts that JEI-DNN adds to a backbone: a head (the paper's inference module) and a gate at every early exit.

They work on the backbone's pooled features alone, so a frozen backbone has to run once: its features can be kept and
heads and gates trained on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.exit_rule import exit_probabilities
from headgate.methods.routing.jei_dnn.uncertainty import NUM_UNCERTAINTIES, uncertainty_features
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["ExitHeads", "ExitOutputs", "UncertaintyGate"]

Head = Callable[[int, int], nn.Module]


class ExitOutputs(NamedTuple):
    """What all exits say.

    Attributes:
        logits: ``(G + 1, batch, classes)``, the final exit last.
        gate_logits: ``(batch, G)``.
        exit_prob: ``(batch, G + 1)`` the probability of each exit, P.
        features: ``(batch, G, dim)`` what the heads read, z.
    """

    logits: Float[Tensor, "exits batch classes"]
    gate_logits: Float[Tensor, "batch gates"]
    exit_prob: Float[Tensor, "batch exits"]
    features: Float[Tensor, "batch gates dim"]


class UncertaintyGate(nn.Module):
    """A linear gate on how unsure a prediction is: five parameters, no gradient to the prediction.

    Args:
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_UNCERTAINTIES, 1, device=device, dtype=dtype)

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
        """Compute the gate's logit from a head's ``logits`` ``(batch, classes)``; positive says leave.

        Raises:
            TypeError: ``logits`` is not of the module's floating dtype.
            ValueError: another rank, fewer than two classes, or a value that is not finite.
        """
        check_floating("logits", logits, like=self.linear.weight.dtype)
        return self.weigh(uncertainty_features(logits))

    def weigh(self, uncertainties: Float[Tensor, "batch 4"]) -> Float[Tensor, " batch"]:
        """Compute the gate's logit from :func:`uncertainty_features` that are known already."""
        return self.linear(uncertainties).squeeze(1)


class ExitHeads(nn.Module, HubModel):
    """Heads and gates of G early exits.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` keep what was trained without the backbone: put it back by
    ``model.exits = ExitHeads.from_pretrained(...)``. Heads and gates of your own kind cannot be kept so.

    Args:
        dim: D, size of the pooled features.
        num_classes: C, at least 2.
        num_gates: G, at least 1.
        gate: a module from logits ``(batch, C)`` to gate logits ``(batch,)`` or ``(batch, 1)``, copied for every exit,
            which sees detached logits; default :class:`UncertaintyGate`.
        head: ``head(dim, num_classes)`` builds one head. Linear layers start from a normal of deviation 0.02 cut at ±2,
            biases at 0.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_gates: int,
        *,
        gate: nn.Module | None = None,
        head: Head = nn.Linear,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, num_gates=num_gates)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (the margin needs two), got {num_classes}")
        self.dim = dim
        self.num_classes = num_classes
        self.num_gates = num_gates
        self._own_kind = gate is not None or head is not nn.Linear
        self.heads = nn.ModuleList(head(dim, num_classes) for _ in range(num_gates))
        self.gates = nn.ModuleList(UncertaintyGate() if gate is None else copy.deepcopy(gate) for _ in range(num_gates))
        for module in self.heads.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, features: Float[Tensor, "batch gates dim"], final_logits: Float[Tensor, "batch classes"]
    ) -> ExitOutputs:
        """Ask every exit.

        Args:
            features: ``(batch, G, dim)`` pooled features at the early exits.
            final_logits: ``(batch, C)`` of the backbone's own head.

        Raises:
            TypeError: a wrong dtype.
            ValueError: shapes do not fit, or a logit is not finite.
        """
        check_shape("features", features, (None, self.num_gates, self.dim), "batch, gates, dim")
        check_floating("features", features, like=next(self.heads.parameters()).dtype)
        check_shape("final_logits", final_logits, (features.shape[0], self.num_classes), "batch, classes")
        check_floating("final_logits", final_logits)
        early = torch.stack([head(z) for head, z in zip(self.heads, features.unbind(dim=1), strict=True)])
        gate_logits = self._ask_gates(early.detach())
        logits = torch.cat([early, final_logits.to(early.dtype)[None]])
        return ExitOutputs(logits, gate_logits, exit_probabilities(gate_logits), features)

    def step(
        self, exit: int, z: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, " batch"]]:
        """Ask one exit: its head's logits ``(batch, C)`` and its gate's logit ``(batch,)``.

        Args:
            exit: which, in [0, G).
            z: pooled features ``(batch, dim)``.
        """
        logits = self.heads[exit](z)
        gate_logit = self.gates[exit](logits.detach())
        return logits, gate_logit.reshape(z.shape[0])

    def _save_pretrained(self, save_directory: Path) -> None:
        if self._own_kind:
            raise ValueError("ExitHeads with a gate or head of one's own cannot be saved so: save their state_dict")
        super()._save_pretrained(save_directory)

    def _ask_gates(self, logits: Float[Tensor, "gates batch classes"]) -> Float[Tensor, "batch gates"]:
        gates = list(self.gates)
        if not all(isinstance(gate, UncertaintyGate) for gate in gates):
            return torch.stack(
                [gate(answer).reshape(len(answer)) for gate, answer in zip(gates, logits, strict=True)], dim=1
            )
        # All uncertainties at once: the statistics are the same at every exit, and cost more calls than products.
        known = uncertainty_features(logits.flatten(0, 1)).unflatten(0, logits.shape[:2])
        weighed = [cast(UncertaintyGate, gate).weigh(part) for gate, part in zip(gates, known, strict=True)]
        return torch.stack(weighed, dim=1)
