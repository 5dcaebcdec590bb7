r"""Convolutions on the nodes, which the paper's models run beside those on the edges.

Kipf and Welling (arXiv 1609.02907): with edge weights w, a loop of weight 1 at every node, and d_i the sum of the weights of the
edges into i,

.. math:: x'_i = \Theta^T \sum_{j \to i} \frac{w_{ji}}{\sqrt{d_j d_i}} x_j + b .

A loop that stands among the edges keeps its weight. The molecule models have another form, with features of bonds in the messages.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.ops import segment_sum

__all__ = ["GraphConv", "MoleculeConv", "normalize_weights"]


class GraphConv(nn.Module):
    """Graph convolution.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        normalize: add the loops and divide by the roots of the degrees; without it messages are added up as they are.
    """

    def __init__(self, in_channels: int, out_channels: int, *, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights Glorot-uniform; the bias starts at zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Float[Tensor, "nodes in"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> Float[Tensor, "nodes out"]:
        """Convolve: nodes (n, in), edges (2, m) from row 0 to row 1, weights (m,), 1 by default → (n, out)."""
        h = x @ self.weight.T
        weight = h.new_ones(edge_index.shape[1]) if edge_weight is None else edge_weight.to(h.dtype)
        source, target = edge_index
        if not self.normalize:
            out = segment_sum(weight[:, None] * h[source], target, len(h))
            return out + self.bias.to(out.dtype)
        is_loop = source == target
        # One place more than there are nodes takes what is no loop.
        place = torch.where(is_loop, source, len(h))
        loop_weight = h.new_ones(len(h) + 1).scatter(0, place, weight)[:-1]
        weight = torch.where(is_loop, 0, weight)
        scale = _inverse_root(segment_sum(weight, target, len(h)) + loop_weight)
        messages = (scale[source] * weight * scale[target])[:, None] * h[source]
        out = segment_sum(messages, target, len(h)) + (loop_weight * scale**2)[:, None] * h
        return out + self.bias.to(out.dtype)


class MoleculeConv(nn.Module):
    """Graph convolution with features of the edges: ``Σ w/√(d_j d_i) · ReLU(A x_j + B e) + ReLU(A x_i + r) / d_i``.

    Degrees d count the weights of the edges into a node, plus 1.

    Args:
        channels: of nodes and edges, in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.node = nn.Linear(channels, channels)  # A
        self.edge = nn.Linear(channels, channels)  # B
        self.root = nn.Parameter(torch.empty(channels))  # r
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw r from a standard normal distribution; the linear layers start as PyTorch has them."""
        self.node.reset_parameters()
        self.edge.reset_parameters()
        nn.init.normal_(self.root)

    def forward(
        self,
        x: Float[Tensor, "nodes channels"],
        edge_index: Int64[Tensor, "2 edges"],
        edge_attr: Float[Tensor, "edges channels"],
        edge_weight: Float[Tensor, " edges"] | None = None,
    ) -> Float[Tensor, "nodes channels"]:
        """Convolve: nodes (n, channels), edges (2, m), their features (m, channels) and weights (m,), 1 by default."""
        h = self.node(x)
        weight = h.new_ones(edge_index.shape[1]) if edge_weight is None else edge_weight.to(h.dtype)
        source, target = edge_index
        degree = segment_sum(weight, target, len(h)) + 1
        scale = _inverse_root(degree)
        norm = scale[source] * weight * scale[target]
        messages = norm[:, None] * torch.relu(h[source] + self.edge(edge_attr))
        out = segment_sum(messages, target, len(h))
        return out + torch.relu(h + self.root.to(h.dtype)) / degree[:, None]


def normalize_weights(
    edge_index: Int64[Tensor, "2 edges"], edge_weight: Float[Tensor, " edges"], num_nodes: int
) -> Float[Tensor, " edges"]:
    """Divide each weight by the roots of the degrees of its two ends; no loops are added.

    Args:
        edge_index: (2, m).
        edge_weight: (m,), not negative.
        num_nodes: n.

    Returns:
        (m,); degrees are sums over the edges into a node, and where one is 0, so is the weight.
    """
    source, target = edge_index
    scale = _inverse_root(segment_sum(edge_weight, target, num_nodes))
    return scale[source] * edge_weight * scale[target]


def _inverse_root(degree: Tensor) -> Tensor:
    positive = degree > 0
    return torch.where(positive, torch.where(positive, degree, 1).rsqrt(), 0)
