"""Where in a network the information is: linear probe, nearest neighbours and effective rank, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float, Int

from headgate.evaluate.checks import Array, to_numpy
from headgate.evaluate.features import Features, Split
from headgate.evaluate.knn import knn_probe
from headgate.evaluate.probes import linear_probe
from headgate.evaluate.rank import effective_rank

__all__ = ["LayerScores", "LayerTable", "layerwise_probe"]


class LayerScores(NamedTuple):
    """One row of the table.

    Attributes:
        linear: accuracy of the linear probe on the test rows.
        knn: accuracy of the nearest neighbours on the test rows.
        rank: effective rank of the training rows' features.
        dim: width of the layer.
        selection: accuracy of the linear probe on the validation rows (or folds), for choosing a layer.
    """

    linear: float
    knn: float
    rank: float
    dim: int
    selection: float


@dataclass(frozen=True)
class LayerTable:
    """Layer → scores, in the order in which the layers came."""

    rows: dict[str, LayerScores]

    @property
    def best(self) -> str:
        """The layer with the best linear probe on the validation rows, the first of equals; the test is not asked."""
        return max(self.rows, key=lambda name: self.rows[name].selection)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        lines = ["| layer | dim | linear | kNN | rank |", "|---|---:|---:|---:|---:|"]
        lines += [
            f"| {name} | {row.dim} | {row.linear:.4f} | {row.knn:.4f} | {row.rank:.2f} |"
            for name, row in self.rows.items()
        ]
        return "\n".join(lines) + "\n"


def layerwise_probe(
    layers: Mapping[str, Features] | Mapping[str, Float[Array, "n dim"]],
    y: Int[Array, " n"],
    split: Split,
    *,
    k: int = 20,
    **probe: Any,
) -> LayerTable:
    """Probe every layer with the same rows and the same choices.

    Args:
        layers: name → features, as :func:`headgate.evaluate.extract_layers` returns them, or ``(N, d)`` arrays.
        y: ``(N,)`` integer labels.
        split: rows to fit, to choose and to test on.
        k: neighbours of the nearest-neighbour probe.
        **probe: further keywords of :func:`headgate.evaluate.linear_probe`; several ``C`` are needed for
            :attr:`LayerTable.best`.

    Raises:
        ValueError: no layer, or as in the probes.
    """
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    rows = {}
    for name, layer in layers.items():
        features = layer.X if isinstance(layer, Features) else to_numpy(name, layer)
        linear = linear_probe(features, y, split, **probe)
        neighbors = knn_probe(features, y, split, k)
        rank = effective_rank(features[split.train])
        rows[name] = LayerScores(linear.accuracy, neighbors.accuracy, rank, features.shape[1], linear.selection_score)
    return LayerTable(rows)
