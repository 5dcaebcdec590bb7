"""Quantisation of similarities and embeddings: equal bins with several gradients, or means of clusters.

With bins of width b::

    round           round(r / b)·b, the gradient of the identity (straight-through)
    round_gradient  round(r / b)·b, the gradient itself rounded to multiples of b
    smooth          r - b sin(2πr / b) / (2π): a staircase with slopes from 0 to 2
    cluster         the mean of the row's cluster, by agglomerative clustering of the rows at hand

The published code gives ``smooth`` steps of width 1 whatever b is, and its rounding of embeddings has the gradient zero
(it adds ``(a - a).detach()``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_positive

__all__ = ["QUANTIZATIONS", "Quantization", "RelativeQuantizer", "cluster_means"]

Quantization = Literal["round", "round_gradient", "smooth", "cluster"]

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
_WITH_BINS = ("round", "round_gradient")


@dataclass(frozen=True)
class RelativeQuantizer:
    """One way to quantise.

    Attributes:
        mode: one of :data:`QUANTIZATIONS`.
        bin_size: width b of the bins; required by the two roundings, 1 where ``smooth`` is given none.
        cluster_threshold: distance (Ward's) above which clusters are not merged; required by ``cluster`` alone.
        has_gradient: False gives ``round`` the gradient zero.

    Raises:
        ValueError: an unknown mode, a number that is missing, not positive, or not used by the mode.
    """

    mode: str
    bin_size: float | None = None
    cluster_threshold: float | None = None
    has_gradient: bool = True

    def __post_init__(self) -> None:
        if self.mode not in QUANTIZATIONS:
            raise ValueError(f"quantize must be None or one of {', '.join(QUANTIZATIONS)}, got {self.mode!r}")
        if self.mode in _WITH_BINS and self.bin_size is None:
            raise ValueError(f"bin_size must be given for quantize={self.mode!r}, got None")
        if self.mode == "cluster" and self.bin_size is not None:
            raise ValueError(f"bin_size is not used by quantize='cluster', got {self.bin_size}; see cluster_threshold")
        if (self.mode == "cluster") != (self.cluster_threshold is not None):
            raise ValueError(
                "cluster_threshold must be given for quantize='cluster' and for no other mode, got "
                f"cluster_threshold={self.cluster_threshold} with quantize={self.mode!r}"
            )
        if self.bin_size is not None:
            check_positive(bin_size=self.bin_size)
        if self.cluster_threshold is not None:
            check_positive(cluster_threshold=self.cluster_threshold)

    def __call__(self, values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Quantise; see the module's text."""
        if self.cluster_threshold is not None:
            return cluster_means(values, self.cluster_threshold)
        width = 1.0 if self.bin_size is None else self.bin_size
        if self.mode == "smooth":
            return values - width * torch.sin(values * (2 * math.pi / width)) / (2 * math.pi)
        if self.mode == "round_gradient":
            rounded: Tensor = _RoundBoth.apply(values, width)
            return rounded
        rounded = torch.round(values / width) * width
        return values + (rounded - values).detach() if self.has_gradient else rounded


def cluster_means(rows: Float[Tensor, "rows columns"], threshold: float) -> Float[Tensor, "rows columns"]:
    """Replace each row by the mean of its cluster (Ward's linkage, merged up to a distance of ``threshold``).

    The result of a row depends on the rows beside it; it takes O(N²) time and memory, on the CPU.
    """
    from sklearn.cluster import AgglomerativeClustering

    if len(rows) < 2:
        return rows
    table = rows.detach().to("cpu", torch.promote_types(rows.dtype, torch.float32)).numpy()
    found: np.ndarray = AgglomerativeClustering(n_clusters=None, distance_threshold=threshold).fit_predict(table)
    labels = torch.from_numpy(found.astype(np.int64)).to(rows.device)
    members = (labels == torch.arange(int(found.max()) + 1, device=rows.device)[:, None]).to(rows.dtype)
    centres = members @ rows / members.sum(dim=1, keepdim=True)
    return centres[labels]


class _RoundBoth(torch.autograd.Function):
    """Rounds the values on the way forward and the gradient on the way back."""

    @staticmethod
    def forward(values: Tensor, width: float) -> Tensor:
        return torch.round(values / width) * width

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.width = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.round(gradient / ctx.width) * ctx.width, None
