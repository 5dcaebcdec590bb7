"""The head of the paper's stitching experiments (Section 5; ``vision_stitching`` notebooks of lucmos/relreps)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations.norm import AcrossBatchNorm
from headgate.methods.contrastive.relative_representations.similarity import unit_vectors
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["StitchingHead"]


class StitchingHead(nn.Module, HubModel):
    """[scale to length 1] → LayerNorm(K) → Linear(K, hidden) → Tanh → normalise units → Linear(hidden, classes).

    Args:
        in_features: K, the size of what it reads.
        num_classes: outputs.
        hidden_dim: hidden units; ``None``: as many as ``in_features``.
        normalize: scale what it reads to length 1 first.
        unit_norm: how each hidden unit is normalised, without learned scale and shift: ``"batch"``, over the items that
            are seen together, in evaluation, too (the published head; its answers depend on what else is in the batch);
            ``"running"``, by the statistics of training (BatchNorm1d); ``None``, not at all.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a number that is not positive, or an unknown ``unit_norm``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        hidden_dim: int | None = None,
        normalize: bool = False,
        unit_norm: Literal["batch", "running"] | None = "running",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = in_features if hidden_dim is None else hidden_dim
        check_positive(in_features=in_features, num_classes=num_classes, hidden_dim=hidden)
        self.in_features, self.num_classes, self.normalize = in_features, num_classes, normalize
        self.norm = nn.LayerNorm(in_features, device=device, dtype=dtype)
        self.hidden = nn.Linear(in_features, hidden, device=device, dtype=dtype)
        self.unit_norm: nn.Module | None = None
        if unit_norm == "batch":
            self.unit_norm = AcrossBatchNorm(hidden, affine=False)
        elif unit_norm == "running":
            self.unit_norm = nn.BatchNorm1d(hidden, affine=False, device=device, dtype=dtype)
        elif unit_norm is not None:
            raise ValueError(f"unit_norm must be 'batch', 'running' or None, got {unit_norm!r}")
        self.out = nn.Linear(hidden, num_classes, device=device, dtype=dtype)

    def forward(self, r: Float[Tensor, "batch relative"]) -> Float[Tensor, "batch classes"]:
        """Class scores of relative representations ``(batch, in_features)``.

        Raises:
            TypeError: another dtype than the parameters'.
            ValueError: another shape, or a single item where units are normalised over the batch.
        """
        check_shape("r", r, (None, self.in_features), "batch, relative")
        check_floating("r", r, like=self.hidden.weight.dtype)
        hidden = torch.tanh(self.hidden(self.norm(unit_vectors(r) if self.normalize else r)))
        if self.unit_norm is not None:
            hidden = self.unit_norm(hidden)
        scores: Tensor = self.out(hidden)
        return scores
