"""Time of message passing among the edges of a star: on the dual hypergraph, and on the line graph.

The m edges of a star all meet: its dual hypergraph has one hyperedge of m members, its line graph m (m - 1) edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.graph_conv import GraphConv
from headgate.train import seeded

__all__ = ["line_graph", "star_step"]


def line_graph(edge_index: Int64[Tensor, "2 edges"], num_nodes: int) -> Int64[Tensor, "2 pairs"]:
    """Pairs of edges that meet, in both directions; a pair that meets twice stands twice.

    Args:
        edge_index: (2, m).
        num_nodes: n.

    Returns:
        (2, Σ d (d - 1)) over the nodes, with d the edges that meet in a node.
    """
    ends = edge_index.T.flatten()
    edges = torch.arange(edge_index.shape[1]).repeat_interleave(2)[ends.argsort(stable=True)]
    degree = ends.bincount(minlength=num_nodes)
    starts = degree.cumsum(0) - degree
    # Each of a node's d edges is paired with all d of them.
    mates = degree.repeat_interleave(degree)
    first = edges.repeat_interleave(mates)
    block = starts.repeat_interleave(degree).repeat_interleave(mates)
    within = torch.arange(len(first)) - (mates.cumsum(0) - mates).repeat_interleave(mates)
    pairs = torch.stack([first, edges[block + within]])
    return pairs[:, pairs[0] != pairs[1]]


def star_step(arm: str, num_edges: int, channels: int) -> Callable[[], Tensor]:
    """One convolution among the edges of a star, whatever has to be made of the graph for it included.

    Args:
        arm: ``"dual"`` or ``"line_graph"``.
        num_edges: m.
        channels: of the edges, in and out.

    Returns:
        A function that does the work once.
    """
    edge_index = torch.stack([torch.zeros(num_edges, dtype=torch.int64), torch.arange(1, num_edges + 1)])
    with seeded(0):
        edge_attr = torch.randn(num_edges, channels)
        conv, node_conv = EdgeHypergraphConv(channels, channels), GraphConv(channels, channels)

    @torch.inference_mode()
    def step() -> Tensor:
        if arm == "dual":
            return conv(edge_attr, edge_index, num_edges + 1)
        return node_conv(edge_attr, line_graph(edge_index, num_edges + 1))

    return step
