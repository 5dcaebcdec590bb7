r"""Message passing among edges: the dual hypergraph transformation and a hypergraph convolution in one step.

On the dual hypergraph with loops, the convolution of :class:`HypergraphConv` without weights is

.. math:: e' = \frac{1}{1 + |U_e|} \Big( \Theta^T e + \sum_{u \in U_e} \frac{1}{|I_u|} \sum_{f \in I_u} \Theta^T f \Big) + b ,

with I_u the edges that meet in node u, and U_e the ends of e where at least two ends of edges meet. It is computed in this
form, from sums over the nodes: shapes follow from those of the inputs, and no list of incidences is built.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.methods.graph.edge_hypergraph.checks import check_edges, check_rows
from headgate.ops import segment_counts, segment_sum
from headgate.validate import check_positive

__all__ = ["EdgeHypergraphConv"]


class EdgeHypergraphConv(nn.Module):
    """Features of edges from those of the edges that they meet; time and memory are linear in the edges.

    Every stored column of ``edge_index`` is one edge: an undirected graph that is stored in both directions has two.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        residual: add the input to the output, so that deep stacks do not blur an edge's own features.
        bias: add b.

    Raises:
        ValueError: a number of channels is not positive, or ``residual`` with different ones.
    """

    def __init__(self, in_channels: int, out_channels: int, *, residual: bool = False, bias: bool = True) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        if residual and in_channels != out_channels:
            raise ValueError(
                f"out_channels must be in_channels={in_channels} for residual=True, got out_channels={out_channels}"
            )
        self.in_channels, self.out_channels, self.residual = in_channels, out_channels, residual
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))  # Θ
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights Glorot-uniform; the bias starts at zero."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """The channels."""
        return f"{self.in_channels}, {self.out_channels}, residual={self.residual}"

    def forward(
        self,
        edge_attr: Float[Tensor, "edges in"],
        edge_index: Int64[Tensor, "2 edges"],
        num_nodes: int | None = None,
    ) -> Float[Tensor, "edges out"]:
        """Convolve.

        Args:
            edge_attr: (m, in_channels).
            edge_index: (2, m).
            num_nodes: n; default: one more than the largest number in ``edge_index``.

        Returns:
            (m, out_channels).

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a node outside [0, num_nodes).
        """
        check_edges(edge_index, num_nodes)
        axes = "edges, channels"
        check_rows("edge_attr", edge_attr, (edge_index.shape[1], self.in_channels), axes, self.weight.dtype)
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
        h = edge_attr @ self.weight
        dtype = h.dtype
        # Sums over a node with many edges, and their number, leave the range of half precision.
        h = h.float() if dtype in (torch.float16, torch.bfloat16) else h
        first, second = edge_index.long()
        counts = segment_counts(first, num_nodes) + segment_counts(second, num_nodes)
        meets = (counts != 1).to(h.dtype)  # u in U_e, for the edges e that end in u
        nodes = segment_sum(h, first, num_nodes) + segment_sum(h, second, num_nodes)
        nodes = nodes * (meets / counts.clamp_min(1))[:, None]
        # Own features last: the sum of the ends is the same bit by bit in both directions of an edge.
        out = nodes[first] + nodes[second] + h
        out = (out / (1 + meets[first] + meets[second])[:, None]).to(dtype)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out + edge_attr if self.residual else out
