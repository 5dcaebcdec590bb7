"""HyperDrop: drop the least useful edges of every graph, and no node (Jo et al. 2021, section 3.3).

Scores come from one convolution on the dual hypergraph, s = tanh(HConv(e)). Of each graph's m edges the ceil(ρ m) with the
largest scores stay. Their scores, clamped to [0, 1], weigh the edges in the node convolution that follows, and that is the way on
which the scores learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.methods.graph.edge_hypergraph.checks import check_batch, check_edges, check_ratio, check_rows
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.ops import segment_top_k

__all__ = ["DroppedEdges", "HyperDrop"]

Nonlinearity = Literal["tanh", "sigmoid", "identity"]

_NONLINEARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda score: score,
}


class DroppedEdges(NamedTuple):
    """A graph with fewer edges, in the order of PyTorch Geometric's pooling layers.

    Attributes:
        edge_index: (2, kept); graph by graph, in each the largest score first.
        edge_attr: (kept, channels).
        edge_weight: (kept,), the scores clamped.
        batch: (n,), the graph of every node, as it came.
        perm: (kept,), which of the edges that came these are.
        score: (kept,), their scores.
    """

    edge_index: Int64[Tensor, "2 kept"]
    edge_attr: Float[Tensor, "kept channels"]
    edge_weight: Float[Tensor, " kept"]
    batch: Int64[Tensor, " nodes"] | None
    perm: Int64[Tensor, " kept"]
    score: Float[Tensor, " kept"]


class HyperDrop(nn.Module):
    """Keep the share of edges with the largest scores.

    An edge that is kept with a score below the lower clamp has that weight and gives its score no gradient; with the
    published (0, 1) this is common where much is kept, with (1e-4, 1) such an edge is at least not cut off.

    Args:
        channels: of the features of edges.
        ratio: ρ, share of every graph's edges that stays, in (0, 1].
        nonlinearity: of the score: ``"tanh"``, ``"sigmoid"`` or ``"identity"``.
        clamp: least and largest weight of an edge.

    Raises:
        ValueError: a number lies outside its range, or an unknown nonlinearity.
    """

    def __init__(
        self,
        channels: int,
        ratio: float = 0.8,
        nonlinearity: Nonlinearity = "tanh",
        clamp: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        check_ratio(ratio=ratio)
        if nonlinearity not in _NONLINEARITIES:
            raise ValueError(f"nonlinearity must be one of {', '.join(_NONLINEARITIES)}, got {nonlinearity!r}")
        if not clamp[0] < clamp[1]:
            raise ValueError(f"clamp must rise, got {clamp}")
        self.channels, self.ratio, self.nonlinearity = channels, ratio, nonlinearity
        self.clamp = (float(clamp[0]), float(clamp[1]))
        self.score_conv = EdgeHypergraphConv(channels, 1)

    def reset_parameters(self) -> None:
        """Draw the weights of the scores anew."""
        self.score_conv.reset_parameters()

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.channels}, ratio={self.ratio}, nonlinearity={self.nonlinearity!r}, clamp={self.clamp}"

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"],
        batch: Int64[Tensor, " nodes"] | None = None,
    ) -> DroppedEdges:
        """Drop edges.

        Args:
            x: (n, features), of which the number of nodes alone is read.
            edge_index: (2, m).
            edge_attr: (m, channels).
            batch: (n,), the graph of every node; default: there is one.

        Returns:
            The kept edges. A graph without edges has none before and none after.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a number outside its range.
        """
        check_rows("x", x, (None, None), "nodes, channels", self.score_conv.weight.dtype)
        if batch is not None:
            check_batch(batch, len(x))
        score = self.score(edge_index, edge_attr, len(x))
        edge_index = edge_index.long()
        edge_batch = None if batch is None else batch.long()[edge_index[0]]
        perm = self.select(score, edge_batch)
        kept = score[perm]
        return DroppedEdges(edge_index[:, perm], edge_attr[perm], self.weigh(kept), batch, perm, kept)

    def score(
        self, edge_index: Int64[Tensor, "2 edges"], edge_attr: Float[Tensor, "edges channels"], num_nodes: int
    ) -> Float[Tensor, " edges"]:
        """The score of every edge, (m,); arguments as of :meth:`forward`."""
        check_edges(edge_index, num_nodes)
        return _NONLINEARITIES[self.nonlinearity](self.score_conv(edge_attr, edge_index, num_nodes).squeeze(-1))

    def select(
        self, score: Float[Tensor, " edges"], edge_batch: Int64[Tensor, " edges"] | None = None
    ) -> Int64[Tensor, " kept"]:
        """Which edges stay, from their scores (m,) and the graph of each (m,)."""
        return segment_top_k(score, edge_batch, self.ratio)

    def weigh(self, score: Float[Tensor, " edges"]) -> Float[Tensor, " edges"]:
        """Weights of edges from their scores."""
        return score.clamp(*self.clamp)
