"""The classifier of the nodes of one large graph, which drops edges against over-smoothing (Jo et al. 2021, section 4.3).

A deep stack of graph convolutions without normalisation, dropout before each; edges start from the features [x_u ‖ x_v] of their
ends behind the first layer. At every fourth layer, from the second on, edges are scored. In training the best ones stay; at
test all stay, and the scores are their weights. Weights are clamped to [1e-4, 1] and normalised by the degrees.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.graph.edge_hypergraph.checks import check_edges, check_rows
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.graph_conv import GraphConv, normalize_weights
from headgate.methods.graph.edge_hypergraph.hyperdrop import HyperDrop
from headgate.train.hub import HubModel
from headgate.validate import check_positive, check_probability

__all__ = ["EHGNNNodeClassifier"]

_PERIOD, _FIRST = 4, 1


class EHGNNNodeClassifier(nn.Module, HubModel):
    """The published node classifier.

    Args:
        in_channels: features of the nodes.
        num_classes: classes.
        hidden: channels of the nodes.
        edge_hidden: channels of the edges.
        num_convs: layers, at least 2; there is a drop at the layers 1, 5, 9, … but for the last.
        ratio: ρ, share of the edges that a drop keeps in training.
        dropout: before each layer of nodes, and behind each of edges.
        clamp: least and largest weight of an edge.

    Raises:
        ValueError: a number lies outside its range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        hidden: int = 32,
        edge_hidden: int = 16,
        num_convs: int = 6,
        ratio: float = 0.8,
        dropout: float = 0.5,
        clamp: tuple[float, float] = (1e-4, 1.0),
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes, hidden=hidden, edge_hidden=edge_hidden)
        check_probability(dropout=dropout)
        if num_convs < 2:
            raise ValueError(f"num_convs must be at least 2, got {num_convs}")
        self.in_channels, self.num_classes, self.dropout = in_channels, num_classes, dropout
        widths = [in_channels, *[hidden] * (num_convs - 1), num_classes]
        self.convs = nn.ModuleList(
            GraphConv(before, behind, normalize=False) for before, behind in itertools.pairwise(widths)
        )
        drop_layers = range(_FIRST, num_convs - 1, _PERIOD)
        # Nothing reads what the edges are behind the last drop.
        edge_widths = [2 * hidden, *[edge_hidden] * (max(drop_layers, default=-1) + 1)]
        self.edge_convs = nn.ModuleList(
            EdgeHypergraphConv(before, behind) for before, behind in itertools.pairwise(edge_widths)
        )
        self.drops = nn.ModuleDict({str(layer): HyperDrop(edge_hidden, ratio, clamp=clamp) for layer in drop_layers})

    def forward(
        self, x: Float[Tensor, "nodes in"], edge_index: Int64[Tensor, "2 edges"]
    ) -> Float[Tensor, "nodes classes"]:
        """Classify nodes.

        Args:
            x: (n, in_channels).
            edge_index: (2, m); undirected edges in both directions, and a loop at each node where it shall see itself.

        Returns:
            Logarithms of probabilities (n, num_classes), for ``torch.nn.functional.nll_loss``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a node outside the graph.
        """
        dtype = self.convs[0].weight.dtype
        check_rows("x", x, (None, self.in_channels), "nodes, channels", dtype)  # type: ignore[arg-type]
        check_edges(edge_index, len(x))
        edge_index = edge_index.long()
        weight, edge_attr = None, x.new_zeros(edge_index.shape[1], 0)
        last = len(self.convs) - 1
        for layer, conv in enumerate(self.convs):
            x = conv(F.dropout(x, self.dropout, self.training), edge_index, weight)
            if layer < last:
                x = torch.relu(x)
            if layer == 0:
                edge_attr = torch.cat([x[edge_index[0]], x[edge_index[1]]], dim=1)
            if layer < len(self.edge_convs):
                edge_attr = torch.relu(self.edge_convs[layer](edge_attr, edge_index, len(x)))
                edge_attr = F.dropout(edge_attr, self.dropout, self.training)
            if str(layer) in self.drops:
                drop = self.drops[str(layer)]
                assert isinstance(drop, HyperDrop)
                score = drop.score(edge_index, edge_attr, len(x))
                if self.training:
                    perm = drop.select(score)
                    edge_index, edge_attr, score = edge_index[:, perm], edge_attr[perm], score[perm]
                weight = normalize_weights(edge_index, drop.weigh(score), len(x))
        return F.log_softmax(x, dim=1)
