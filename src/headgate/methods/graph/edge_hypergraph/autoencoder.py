"""The edge auto-encoder: edges → clusters → edges (Jo et al. 2021, section 4.1).

Two convolutions on the dual hypergraph, HyperCluster, unpooling, two more convolutions and a last one to the classes of edges. All
that the decoder knows of the edges is the clusters, and how each edge is shared out among them.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.methods.graph.edge_hypergraph.checks import check_edges, check_rows
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.hypercluster import Clusters, HyperCluster
from headgate.train.hub import HubModel
from headgate.validate import check_positive

__all__ = ["EdgeAutoEncoder"]


class EdgeAutoEncoder(nn.Module, HubModel):
    """Reconstruct features of edges from a compressed graph.

    Args:
        edge_channels: features of the edges, d'.
        num_clusters: clusters of each graph; or instead:
        ratio: clusters as a share of the edges of an average graph, in (0, 1].
        avg_num_edges: edges of an average graph.
        hidden: channels.
        num_convs: convolutions before and behind the clusters, at least 1.
        out_channels: classes of edges; default: ``edge_channels``.
        layer_norm: normalise in the pooling.
        cluster: share each edge out among the clusters; without it each cluster is a mean over the edges.

    Raises:
        ValueError: a number lies outside its range.
    """

    def __init__(
        self,
        edge_channels: int,
        num_clusters: int | None = None,
        *,
        ratio: float | None = None,
        avg_num_edges: float | None = None,
        hidden: int = 32,
        num_convs: int = 2,
        out_channels: int | None = None,
        layer_norm: bool = False,
        cluster: bool = True,
    ) -> None:
        super().__init__()
        out_channels = edge_channels if out_channels is None else out_channels
        check_positive(edge_channels=edge_channels, out_channels=out_channels, hidden=hidden, num_convs=num_convs)
        self.edge_channels = edge_channels
        widths = [edge_channels, *[hidden] * num_convs]
        self.convs = nn.ModuleList(EdgeHypergraphConv(before, behind) for before, behind in itertools.pairwise(widths))
        self.pool = HyperCluster(
            hidden, num_clusters, ratio=ratio, avg_num_edges=avg_num_edges, layer_norm=layer_norm, cluster=cluster
        )
        self.unconvs = nn.ModuleList(EdgeHypergraphConv(hidden, hidden) for _ in range(num_convs))
        self.last = EdgeHypergraphConv(hidden, out_channels)

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"],
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> Float[Tensor, "edges classes"]:
        """Compress and reconstruct.

        Args:
            x: (n, features), of which the number of nodes alone is read.
            edge_index: (2, m), the edges of a graph one behind the other, as in a batch of PyTorch Geometric.
            edge_attr: (m, edge_channels), such as one-hot classes.
            batch: (n,), the graph of every node; default: there is one.
            num_graphs: B; default: one more than the largest number in ``batch``.

        Returns:
            Logits (m, out_channels), for ``torch.nn.functional.cross_entropy``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, a number outside its range, or edges of different graphs that are mixed.
        """
        clusters = self.encode(x, edge_index, edge_attr, batch, num_graphs)
        edges = self.pool.unpool(*clusters, self.pool.edge_mask(edge_index, batch, len(x), num_graphs))
        for conv in self.unconvs:
            edges = torch.relu(conv(edges, edge_index, len(x)))
        return self.last(edges, edge_index, len(x))

    def encode(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"],
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> Clusters:
        """Compress; arguments as of :meth:`forward`."""
        dtype = self.last.weight.dtype
        check_rows("x", x, (None, None), "nodes, channels", dtype)
        check_edges(edge_index, len(x))
        check_rows("edge_attr", edge_attr, (edge_index.shape[1], self.edge_channels), "edges, channels", dtype)
        for conv in self.convs:
            edge_attr = torch.relu(conv(edge_attr, edge_index, len(x)))
        return self.pool(x, edge_index, edge_attr, batch, num_graphs)
