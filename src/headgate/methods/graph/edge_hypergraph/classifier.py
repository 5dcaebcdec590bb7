"""Graph classifiers that drop edges: node convolutions weighed by the scores of HyperDrop (Jo et al. 2021, section 4.2).

For layer l, with the edges that are left:

    x = ReLU(GraphConv_l(x, edges, weights))                    weights: 1 in the first layer
    e = ReLU(HConv_l(e));  edges, e, weights = HyperDrop_l(e)   but for the last layer
    readout += [max ‖ mean ‖ sum] of x over the nodes of each graph

and a perceptron of three layers on the readout. No node is ever dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.graph.edge_hypergraph.checks import check_batch, check_edges, check_ids, check_ratio, check_rows
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.graph_conv import GraphConv, MoleculeConv
from headgate.methods.graph.edge_hypergraph.hyperdrop import HyperDrop
from headgate.ops import segment_max, segment_mean, segment_sum
from headgate.train.hub import HubModel
from headgate.validate import check_integer, check_positive, check_probability, check_shape

__all__ = ["EHGNNClassifier", "GraphFeatures", "MoleculeEHGNN"]

ATOM_DIMS = (119, 4, 12, 12, 10, 6, 6, 2, 2)
"""Values of the nine features of an atom in Open Graph Benchmark 1.3.0; later releases have five chiralities."""

BOND_DIMS = (5, 6, 2)
"""Values of the three features of a bond."""


class GraphFeatures(NamedTuple):
    """What the layers make of a batch of graphs.

    Attributes:
        readout: (B, 3 · hidden).
        nodes: (n, hidden), features of the nodes behind the last layer.
        edge_index: (2, kept), edges behind the last drop.
        kept: per drop, which of the edges before it stayed.
    """

    readout: Float[Tensor, "graphs readout"]
    nodes: Float[Tensor, "nodes hidden"]
    edge_index: Int64[Tensor, "2 kept"]
    kept: tuple[Int64[Tensor, " kept"], ...]


class _EdgeDropping(nn.Module):
    """What both classifiers share: the layers of edges, the readout and the head."""

    def __init__(
        self,
        convs: Sequence[nn.Module],
        edge_convs: Sequence[EdgeHypergraphConv],
        hidden: int,
        num_outputs: int,
        ratio: float,
        clamp: tuple[float, float],
        dropout: float,
    ) -> None:
        super().__init__()
        check_ratio(ratio=ratio)
        check_probability(dropout=dropout)
        self.hidden, self.ratio = hidden, ratio
        self.convs = nn.ModuleList(convs)
        self.edge_convs = nn.ModuleList(edge_convs)
        self.drops = nn.ModuleList(HyperDrop(conv.out_channels, ratio, clamp=clamp) for conv in edge_convs)
        self.head = nn.Sequential(
            nn.Linear(3 * hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden // 2, num_outputs),
        )

    def _convolve(self, layer: int, x: Tensor, edge_index: Tensor, edge_attr: Tensor, weight: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _run(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor | None, graphs: int
    ) -> GraphFeatures:
        edge_index = edge_index.long()
        of_graph = torch.zeros(len(x), dtype=torch.int64, device=x.device) if batch is None else batch.long()
        weight, kept, readouts = None, [], []
        for layer in range(len(self.convs)):
            x = torch.relu(self._convolve(layer, x, edge_index, edge_attr, weight))
            if layer < len(self.drops):
                edge_attr = torch.relu(self.edge_convs[layer](edge_attr, edge_index, len(x)))
                edge_index, edge_attr, weight, _, perm, _ = self.drops[layer](x, edge_index, edge_attr, batch)
                kept.append(perm)
            readouts.append(
                torch.cat([reduce(x, of_graph, graphs) for reduce in (segment_max, segment_mean, segment_sum)], dim=1)
            )
        return GraphFeatures(torch.stack(readouts).sum(dim=0), x, edge_index, tuple(kept))


class EHGNNClassifier(_EdgeDropping, HubModel):
    """The published classifier of the TU sets.

    Args:
        in_channels: features of the nodes.
        num_classes: classes.
        edge_channels: features of the edges; 1 for graphs that have none.
        hidden: channels of the nodes; even.
        edge_hidden: channels of the edges; default: ``hidden``.
        num_convs: layers, at least 1; there is a drop behind each but the last.
        ratio: ρ, share of every graph's edges that each drop keeps.
        dropout: in the head.
        clamp: least and largest weight of an edge.

    Raises:
        ValueError: a number lies outside its range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        edge_channels: int = 1,
        *,
        hidden: int = 128,
        edge_hidden: int | None = None,
        num_convs: int = 3,
        ratio: float = 0.8,
        dropout: float = 0.5,
        clamp: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        edge_hidden = hidden if edge_hidden is None else edge_hidden
        check_positive(
            in_channels=in_channels, num_classes=num_classes, edge_channels=edge_channels, hidden=hidden,
            edge_hidden=edge_hidden, num_convs=num_convs,
        )  # fmt: skip
        node_widths = [in_channels, *[hidden] * num_convs]
        edge_widths = [edge_channels, *[edge_hidden] * (num_convs - 1)]
        super().__init__(
            [GraphConv(*widths) for widths in itertools.pairwise(node_widths)],
            [EdgeHypergraphConv(*widths) for widths in itertools.pairwise(edge_widths)],
            hidden,
            num_classes,
            ratio,
            clamp,
            dropout,
        )
        self.in_channels, self.edge_channels, self.num_classes = in_channels, edge_channels, num_classes

    def forward(
        self,
        x: Float[Tensor, "nodes in"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"] | None = None,
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> Float[Tensor, "graphs classes"]:
        """Classify graphs.

        Args:
            x: (n, in_channels).
            edge_index: (2, m); undirected edges in both directions.
            edge_attr: (m, edge_channels); default: ones.
            batch: (n,), the graph of every node; default: there is one.
            num_graphs: B; default: one more than the largest number in ``batch``.

        Returns:
            Logarithms of probabilities (B, num_classes), for ``torch.nn.functional.nll_loss``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a number outside its range.
        """
        features = self.forward_features(x, edge_index, edge_attr, batch, num_graphs)
        return F.log_softmax(self.head(features.readout), dim=1)

    def forward_features(
        self,
        x: Float[Tensor, "nodes in"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"] | None = None,
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> GraphFeatures:
        """The readout, and what led to it; arguments as of :meth:`forward`."""
        dtype = self.convs[0].weight.dtype
        check_rows("x", x, (None, self.in_channels), "nodes, channels", dtype)  # type: ignore[arg-type]
        check_edges(edge_index, len(x))
        if edge_attr is None:
            edge_attr = x.new_ones(edge_index.shape[1], self.edge_channels)
        shape = (edge_index.shape[1], self.edge_channels)
        check_rows("edge_attr", edge_attr, shape, "edges, channels", dtype)  # type: ignore[arg-type]
        return self._run(x, edge_index, edge_attr, batch, count_graphs(batch, len(x), num_graphs))

    def _convolve(self, layer: int, x: Tensor, edge_index: Tensor, edge_attr: Tensor, weight: Tensor | None) -> Tensor:
        return self.convs[layer](x, edge_index, weight)


class MoleculeEHGNN(_EdgeDropping, HubModel):
    """The published model of the molecules of Open Graph Benchmark.

    Features of atoms and bonds are numbers of categories; each has an embedding, and these are added up.

    Args:
        num_tasks: outputs.
        hidden: channels of nodes and edges; even.
        num_convs: layers, at least 1; there is a drop behind each but the last.
        ratio: ρ, share of every graph's edges that each drop keeps.
        dropout: in the head.
        clamp: least and largest weight of an edge.
        atom_dims: values of each feature of an atom.
        bond_dims: values of each feature of a bond.

    Raises:
        ValueError: a number lies outside its range.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        hidden: int = 128,
        num_convs: int = 3,
        ratio: float = 0.8,
        dropout: float = 0.5,
        clamp: tuple[float, float] = (0.0, 1.0),
        atom_dims: Sequence[int] = ATOM_DIMS,
        bond_dims: Sequence[int] = BOND_DIMS,
    ) -> None:
        check_positive(num_tasks=num_tasks, hidden=hidden, num_convs=num_convs)
        super().__init__(
            [MoleculeConv(hidden) for _ in range(num_convs)],
            [EdgeHypergraphConv(hidden, hidden) for _ in range(num_convs - 1)],
            hidden,
            num_tasks,
            ratio,
            clamp,
            dropout,
        )
        self.atoms = _Categories(atom_dims, hidden)
        self.bonds = _Categories(bond_dims, hidden)
        self.num_tasks = num_tasks

    def forward(
        self,
        x: Int64[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Int64[Tensor, "edges features"],
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> Float[Tensor, "graphs tasks"]:
        """Predict properties of molecules.

        Args:
            x: (n, 9), features of the atoms.
            edge_index: (2, m); bonds in both directions.
            edge_attr: (m, 3), features of the bonds.
            batch: (n,), the molecule of every atom; default: there is one.
            num_graphs: B; default: one more than the largest number in ``batch``.

        Returns:
            Logits (B, num_tasks).

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a number outside its range.
        """
        return self.head(self.forward_features(x, edge_index, edge_attr, batch, num_graphs).readout)

    def forward_features(
        self,
        x: Int64[Tensor, "nodes features"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Int64[Tensor, "edges features"],
        batch: Int64[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> GraphFeatures:
        """The readout, and what led to it; arguments as of :meth:`forward`."""
        check_shape("x", x, (None, len(self.atoms.dims)), "nodes, features")
        check_edges(edge_index, len(x))
        check_shape("edge_attr", edge_attr, (edge_index.shape[1], len(self.bonds.dims)), "edges, features")
        graphs = count_graphs(batch, len(x), num_graphs)
        return self._run(self.atoms("x", x), edge_index, self.bonds("edge_attr", edge_attr), batch, graphs)

    def _convolve(self, layer: int, x: Tensor, edge_index: Tensor, edge_attr: Tensor, weight: Tensor | None) -> Tensor:
        return self.convs[layer](x, edge_index, edge_attr, weight)


class _Categories(nn.Module):
    """The sum of an embedding per feature."""

    def __init__(self, dims: Sequence[int], channels: int) -> None:
        super().__init__()
        check_positive(**{f"dims[{place}]": dim for place, dim in enumerate(dims)})
        self.dims = tuple(dims)
        self.embeddings = nn.ModuleList(nn.Embedding(dim, channels) for dim in dims)
        for embedding in self.embeddings:
            nn.init.xavier_uniform_(embedding.weight)  # type: ignore[arg-type]

    def forward(self, name: str, features: Int64[Tensor, "rows features"]) -> Float[Tensor, "rows channels"]:
        check_integer(name, features)
        for place, dim in enumerate(self.dims):
            check_ids(f"{name}[:, {place}]", features[:, place], dim, "values")
        columns = features.long().unbind(1)
        embedded = [embedding(column) for embedding, column in zip(self.embeddings, columns, strict=True)]
        return torch.stack(embedded).sum(dim=0)


def count_graphs(batch: Tensor | None, num_nodes: int, num_graphs: int | None) -> int:
    """How many graphs a batch holds, after a check of ``batch``.

    Raises:
        TypeError: ``batch`` holds no integers.
        ValueError: wrong shape, or a number outside [0, num_graphs).
    """
    if batch is None:
        if num_graphs not in (None, 1):
            raise ValueError(f"num_graphs must be 1 without batch, got {num_graphs}")
        return 1
    check_batch(batch, num_nodes, num_graphs)
    if num_graphs is not None:
        return num_graphs
    return int(batch.max()) + 1 if batch.numel() else 0
