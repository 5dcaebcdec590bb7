"""The dual hypergraph transformation: edges become nodes, nodes become hyperedges (Jo et al. 2021, section 3.1).

A graph (X, M, E) with incidence M in {0, 1}^(n × m) becomes the hypergraph (E, Mᵀ, X): m dual nodes, and for each node u
of the graph one hyperedge that holds the edges which meet in u. Nothing is lost, and it takes time linear in m, where a line
graph takes the sum of squared degrees. A graph too large for memory is sampled first (``NeighborLoader`` of PyTorch Geometric),
and each sample is transformed.

    graph     0 — 1 — 2,  1 — 3            edge_index  0 1 1
                                                       1 2 3
    dual      edges a, b, c                hyperedges  0: {a}   1: {a, b, c}   2: {b}   3: {c}

With loops, hyperedges of one member go, and each dual node gets a hyperedge of its own: 1: {a, b, c}, 4: {a}, 5: {b}, 6: {c}.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headgate.methods.graph.edge_hypergraph.checks import check_batch, check_edges
from headgate.ops import segment_mean
from headgate.validate import check_shape

__all__ = ["DualHypergraph"]


@dataclass(frozen=True)
class DualHypergraph:
    """The dual hypergraph of a graph, or of a batch of graphs; made by :meth:`from_edge_index`.

    Attributes:
        incidence: (2, 2 · dual), int64: dual nodes 0, 0, 1, 1, … above the nodes of the graph in which they end.
        hyperedge_index: (2, incidences), int64: what message passing reads; :attr:`incidence` with loops, where asked for.
        edge_batch: (dual,), int64: the graph of every dual node.
        num_nodes: nodes of the graph.
        num_hyperedges: hyperedges that :attr:`hyperedge_index` counts, empty ones included.
        dual_of_edge: (m,), int64: the dual node of every stored edge.
    """

    incidence: Int64[Tensor, "2 ends"]
    hyperedge_index: Int64[Tensor, "2 incidences"]
    edge_batch: Int64[Tensor, " dual"]
    num_nodes: int
    num_hyperedges: int
    dual_of_edge: Int64[Tensor, " edges"]

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Int64[Tensor, "2 edges"],
        batch: Int64[Tensor, " nodes"] | None = None,
        add_loops: bool = True,
        *,
        num_nodes: int | None = None,
        undirected: bool = False,
    ) -> Self:
        """Transform a graph.

        Args:
            edge_index: (2, m), ends of the edges. Every stored column is one dual node: an undirected graph that is stored
                in both directions has two dual nodes per edge.
            batch: (n,), the graph of every node; default: all are of graph 0.
            add_loops: give each dual node a hyperedge of its own, behind those of the nodes, and drop the incidences of
                hyperedges with one member.
            num_nodes: n; default: that of ``batch``, or one more than the largest number in ``edge_index``.
            undirected: the two directions of an edge, and repetitions, are one dual node.

        Raises:
            TypeError: a tensor does not hold integers.
            ValueError: a shape does not fit, or a number lies outside its range.
        """
        check_edges(edge_index, num_nodes)
        if num_nodes is None:
            num_nodes = len(batch) if batch is not None else _one_more(edge_index)
            check_edges(edge_index, num_nodes)
        if batch is not None:
            check_batch(batch, num_nodes)
        edge_index = edge_index.long()
        dual_of_edge = torch.arange(edge_index.shape[1], device=edge_index.device)
        if undirected:
            pairs = edge_index.sort(dim=0).values
            edge_index, dual_of_edge = pairs.unique(dim=1, return_inverse=True)
        count = edge_index.shape[1]
        duals = torch.arange(count, device=edge_index.device)
        incidence = torch.stack([duals.repeat_interleave(2), edge_index.T.reshape(-1)])
        edge_batch = torch.zeros_like(duals) if batch is None else batch.long()[edge_index[0]]
        hyperedges, num_hyperedges = incidence, num_nodes
        if add_loops:
            members = incidence[1].bincount(minlength=num_nodes)
            first = _one_more(incidence[1])
            loops = torch.stack([duals, duals + first])
            hyperedges = torch.cat([incidence[:, members[incidence[1]] != 1], loops], dim=1)
            num_hyperedges = max(num_nodes, first + count)
        return cls(incidence, hyperedges, edge_batch, num_nodes, num_hyperedges, dual_of_edge)

    @property
    def num_dual_nodes(self) -> int:
        """Dual nodes: edges of the graph."""
        return len(self.edge_batch)

    def inverse(self) -> Int64[Tensor, "2 dual"]:
        """The graph back: the ends of every dual node.

        Without ``undirected`` this is the ``edge_index`` that came, column by column; with it every edge stands once, its
        smaller end first.
        """
        return self.incidence[1].view(-1, 2).T.contiguous()

    def gather(self, edge_attr: Float[Tensor, "edges channels"]) -> Float[Tensor, "dual channels"]:
        """Features of the dual nodes from those of the stored edges; both directions of an undirected edge are averaged.

        Raises:
            ValueError: as many rows as there are stored edges are needed.
        """
        check_shape("edge_attr", edge_attr, (len(self.dual_of_edge), None), "edges, channels")
        return segment_mean(edge_attr, self.dual_of_edge, self.num_dual_nodes)

    def spread(self, dual_attr: Float[Tensor, "dual channels"]) -> Float[Tensor, "edges channels"]:
        """Features of the stored edges from those of the dual nodes.

        Raises:
            ValueError: as many rows as there are dual nodes are needed.
        """
        check_shape("dual_attr", dual_attr, (self.num_dual_nodes, None), "dual, channels")
        return dual_attr[self.dual_of_edge]


def _one_more(ids: Tensor) -> int:
    """One more than the largest number; 0 where there is none."""
    return int(ids.max()) + 1 if ids.numel() else 0
