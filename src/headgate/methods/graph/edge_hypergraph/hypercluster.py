r"""HyperCluster: compress the edges of every graph into a few vectors, and spread these over the edges again.

Jo et al. 2021, section 3.3, with the graph multiset pooling of Baek, Kang and Hwang (arXiv 2102.11533) on the dual hypergraph.
With S learned seeds Z, and keys and values of the edges from convolutions on the dual hypergraph,

.. math:: Q = Z W_q, \quad A = \mathrm{softmax}(Q K^T / \sqrt h), \quad O = Q + A V, \quad O' = O + \mathrm{ReLU}(O W_o) .

For clusters the softmax runs over the seeds, so each edge is shared out among the clusters; unpooling is then A^T O'.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from headgate.methods.graph.edge_hypergraph.checks import check_batch, check_edges, check_ratio, check_rows
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.ops import segment_counts, segment_pack
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["Clusters", "HyperCluster", "SeedAttention"]


class Clusters(NamedTuple):
    """Pooled edges.

    Attributes:
        pooled: (graphs, clusters, channels).
        assign: (heads * graphs, clusters, places), the attention A, head by head; places are the edges of a graph in their
            order, and what lies behind the last one is no edge.
    """

    pooled: Float[Tensor, "graphs clusters channels"]
    assign: Float[Tensor, "rows clusters places"]


class SeedAttention(nn.Module):
    """Learned seeds that attend to the items of every graph.

    Args:
        channels: h, of items and seeds.
        num_seeds: S.
        heads: of the attention; must divide ``channels``. Logits are divided by √h whatever the heads.
        layer_norm: normalise before and behind the last linear layer.
        cluster: softmax over the seeds in place of the items.
    """

    def __init__(self, channels: int, num_seeds: int, heads: int, layer_norm: bool, cluster: bool) -> None:
        super().__init__()
        check_positive(channels=channels, num_seeds=num_seeds)
        check_divides(heads=heads, channels=channels)
        self.channels, self.heads, self.cluster = channels, heads, cluster
        self.seeds = nn.Parameter(torch.empty(1, num_seeds, channels))
        self.query = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.norm_before: nn.Module = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        self.norm_after: nn.Module = nn.LayerNorm(channels) if layer_norm else nn.Identity()
        nn.init.xavier_uniform_(self.seeds)

    def forward(
        self,
        keys: Float[Tensor, "graphs places channels"],
        values: Float[Tensor, "graphs places channels"],
        mask: Bool[Tensor, "graphs places"],
    ) -> Clusters:
        """Attend: keys and values (B, places, h), zero where there is no item, and where there is one (B, places)."""
        graphs = keys.shape[0]
        query = self.query(self.seeds).expand(graphs, -1, -1)
        query, keys, values = (self._split(part) for part in (query, keys, values))
        logits = query @ keys.transpose(1, 2) / math.sqrt(self.channels)
        empty = ~mask.repeat(self.heads, 1)[:, None]
        if self.cluster:
            assign = logits.masked_fill(empty, 0).softmax(dim=1)
        else:
            # Not minus infinity: a graph without items would have no softmax.
            assign = logits.masked_fill(empty, -1e4 if logits.dtype == torch.float16 else -1e9).softmax(dim=2)
        attended = query + assign.to(values.dtype) @ values
        pooled = self.norm_before(attended.unflatten(0, (self.heads, graphs)).movedim(0, 2).flatten(2))
        return Clusters(self.norm_after(pooled + torch.relu(self.output(pooled))), assign)

    def _split(self, part: Float[Tensor, "graphs places channels"]) -> Float[Tensor, "rows places width"]:
        """Heads one below the other."""
        return torch.cat(part.split(self.channels // self.heads, dim=2))


class HyperCluster(nn.Module):
    """Pool the edges of every graph to a fixed number of clusters.

    Args:
        channels: h, of the features of edges and of the clusters.
        num_clusters: S; or instead:
        ratio: clusters as a share of the edges of an average graph, in (0, 1].
        avg_num_edges: edges of an average graph; S = ceil(ratio * avg_num_edges).
        heads: of the attention; must divide ``channels``. :meth:`unpool` needs 1.
        layer_norm: normalise before and behind the last linear layer.
        cluster: share each edge out among the clusters; without it each cluster is a mean over the edges.

    Raises:
        ValueError: a number lies outside its range, or neither ``num_clusters`` nor ``ratio`` with ``avg_num_edges``.
    """

    def __init__(
        self,
        channels: int,
        num_clusters: int | None = None,
        *,
        ratio: float | None = None,
        avg_num_edges: float | None = None,
        heads: int = 1,
        layer_norm: bool = False,
        cluster: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.heads = channels, heads
        self.num_clusters = count_clusters(num_clusters, ratio, avg_num_edges)
        self.key = EdgeHypergraphConv(channels, channels)
        self.value = EdgeHypergraphConv(channels, channels)
        self.attention = SeedAttention(channels, self.num_clusters, heads, layer_norm, cluster)

    def extra_repr(self) -> str:
        """Channels and clusters."""
        return f"{self.channels}, num_clusters={self.num_clusters}, heads={self.heads}"

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"],
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> Clusters:
        """Pool.

        Args:
            x: (n, features), of which the number of nodes alone is read.
            edge_index: (2, m), the edges of a graph one behind the other, as in a batch of PyTorch Geometric.
            edge_attr: (m, channels).
            batch: (n,), the graph of every node; default: there is one.
            num_graphs: B; default: one more than the largest number in ``batch``.

        Returns:
            The clusters, and how the edges are shared out among them. A graph without edges has the seeds' own values.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, a number outside its range, or edges of different graphs that are mixed.
        """
        check_rows("x", x, (None, None), "nodes, channels", self.key.weight.dtype)
        mask, edge_batch = self._layout(edge_index, batch, len(x), num_graphs)
        graphs, places = mask.shape
        keys = self.key(edge_attr, edge_index, len(x))
        values = self.value(edge_attr, edge_index, len(x))
        packed = (segment_pack(part, edge_batch, graphs, places)[0] for part in (keys, values))
        return self.attention(*packed, mask)

    def edge_mask(
        self,
        edge_index: Int64[Tensor, "2 edges"],
        batch: Int64[Tensor, " nodes"] | None,
        num_nodes: int,
        num_graphs: int | None = None,
    ) -> Bool[Tensor, "graphs places"]:
        """Where ``assign`` stands for an edge, (B, places); arguments as of :meth:`forward`."""
        return self._layout(edge_index, batch, num_nodes, num_graphs)[0]

    def unpool(
        self,
        pooled: Float[Tensor, "graphs clusters channels"],
        assign: Float[Tensor, "graphs clusters places"],
        mask: Bool[Tensor, "graphs places"],
    ) -> Float[Tensor, "edges channels"]:
        """Features of every edge from the clusters: each edge gets the mixture that it was shared out to.

        Args:
            pooled: (B, S, channels).
            assign: (B, S, places).
            mask: (B, places), from :meth:`edge_mask`.

        Returns:
            (m, channels), in the order of the edges.

        Raises:
            ValueError: several heads, or shapes that do not fit.
        """
        if self.heads > 1:
            raise ValueError(f"unpool needs heads=1: heads share edges out differently, got heads={self.heads}")
        check_shape("pooled", pooled, (None, self.num_clusters, self.channels), "graphs, clusters, channels")
        check_floating("pooled", pooled)
        axes = "graphs, clusters, places"
        check_shape("assign", assign, (pooled.shape[0], self.num_clusters, None), axes)
        check_shape("mask", mask, (pooled.shape[0], assign.shape[2]), "graphs, places")
        spread = assign.transpose(1, 2).to(pooled.dtype) @ pooled
        if torch.compiler.is_compiling() and len(mask) == 1:
            return spread[0]  # of one graph every place is an edge, and the shape follows from those of the inputs
        return spread[mask]

    def _layout(
        self, edge_index: Tensor, batch: Tensor | None, num_nodes: int, num_graphs: int | None
    ) -> tuple[Bool[Tensor, "graphs places"], Int64[Tensor, " edges"]]:
        """Which places hold an edge, and the graph of every edge."""
        check_edges(edge_index, num_nodes)
        if batch is None:
            edge_batch = torch.zeros_like(edge_index[0], dtype=torch.int64)
            return torch.ones(1, edge_index.shape[1], dtype=torch.bool, device=edge_index.device), edge_batch
        check_batch(batch, num_nodes, num_graphs)
        edge_batch = batch.long()[edge_index[0].long()]
        if bool((edge_batch.diff() < 0).any()):
            raise ValueError(
                "edge_index must hold the edges of a graph one behind the other, got graphs that are mixed"
            )
        if num_graphs is None:
            num_graphs = int(batch.max()) + 1 if batch.numel() else 0
        counts = segment_counts(edge_batch, num_graphs)
        places = int(counts.max()) if counts.numel() else 0
        return torch.arange(places, device=batch.device) < counts[:, None], edge_batch


def count_clusters(num_clusters: int | None, ratio: float | None, avg_num_edges: float | None) -> int:
    """How many clusters are asked for.

    Raises:
        ValueError: a number lies outside its range, or neither a number nor a share is given.
    """
    if num_clusters is None:
        if ratio is None or avg_num_edges is None:
            raise ValueError("num_clusters must be given, or ratio and avg_num_edges")
        check_ratio(ratio=ratio)
        check_positive(avg_num_edges=avg_num_edges)
        return math.ceil(ratio * avg_num_edges)
    if ratio is not None or avg_num_edges is not None:
        raise ValueError("num_clusters must not be given together with ratio or avg_num_edges")
    check_positive(num_clusters=num_clusters)
    return num_clusters
