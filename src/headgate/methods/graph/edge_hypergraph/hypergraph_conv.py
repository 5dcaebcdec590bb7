r"""Convolution on hypergraphs (Bai, Zhang and Torr, "Hypergraph Convolution and Hypergraph Attention", 2021), as EHGNN uses it.

With H the (V × E) incidence, w the weights of the hyperedges, D_v = Σ_e w_e H_ve and B_e = 1 / Σ_v H_ve,

.. math:: X' = D^{-1} H \,\mathrm{diag}(w)\, B\, H^T X \Theta + b .

A vertex without hyperedges gets b, a hyperedge without vertices has no effect. The convolution of PyTorch Geometric is the same
without weights; with weights it normalises by D as here but leaves diag(w) out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.graph.edge_hypergraph.checks import check_ids, check_rows
from headgate.ops import segment_counts, segment_mean, segment_softmax, segment_sum
from headgate.validate import check_floating, check_integer, check_positive, check_probability, check_shape

__all__ = ["HypergraphConv"]


class HypergraphConv(nn.Module):
    """Vertices → hyperedges → vertices, each step an average.

    Args:
        in_channels: channels in.
        out_channels: channels out, per head.
        attention: weigh each incidence of a vertex by a softmax over its hyperedges:
            ``softmax_e(LeakyReLU(a · [x_v Θ ‖ h_e Θ]))``, with h_e the features of the hyperedge.
        heads: attention heads.
        concat: set the heads side by side; without it they are averaged.
        negative_slope: of the LeakyReLU.
        dropout: on the attention weights, in [0, 1].
        bias: add b.

    Raises:
        ValueError: a number lies outside its range, or heads without attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        attention: bool = False,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, heads=heads)
        check_probability(dropout=dropout)
        if heads > 1 and not attention:
            raise ValueError(f"heads must be 1 without attention, got heads={heads}")
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.concat, self.negative_slope, self.dropout = concat, negative_slope, dropout
        self.weight = nn.Parameter(torch.empty(in_channels, heads * out_channels))  # Θ
        self.attention = nn.Parameter(torch.empty(1, heads, 2 * out_channels)) if attention else None
        self.bias = nn.Parameter(torch.empty(heads * out_channels if concat else out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights Glorot-uniform; the bias starts at zero."""
        nn.init.xavier_uniform_(self.weight)
        if self.attention is not None:
            nn.init.xavier_uniform_(self.attention)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Channels and heads."""
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}, attention={self.attention is not None}"

    def forward(
        self,
        x: Float[Tensor, "vertices in"],
        hyperedge_index: Int64[Tensor, "2 incidences"],
        hyperedge_weight: Float[Tensor, " hyperedges"] | None = None,
        hyperedge_attr: Float[Tensor, "hyperedges in"] | None = None,
        num_hyperedges: int | None = None,
    ) -> Float[Tensor, "vertices out"]:
        """Convolve.

        Args:
            x: (V, in_channels).
            hyperedge_index: (2, incidences): vertices above the hyperedges that hold them.
            hyperedge_weight: (E,), w, not negative; default 1.
            hyperedge_attr: (E, in_channels), features of the hyperedges, for attention; default: the mean of the features
                of the vertices in it.
            num_hyperedges: E; default: the rows of ``hyperedge_weight`` or ``hyperedge_attr``, or one more than the largest
                number.

        Returns:
            (V, heads * out_channels), or (V, out_channels) where heads are averaged.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, a number outside its range, or features of hyperedges without attention.
        """
        check_rows("x", x, (None, self.in_channels), "vertices, channels", self.weight.dtype)
        check_shape("hyperedge_index", hyperedge_index, (2, None), "2, incidences")
        check_integer("hyperedge_index", hyperedge_index)
        if hyperedge_attr is not None and self.attention is None:
            raise ValueError("hyperedge_attr is read by attention alone, which this layer has not")
        if hyperedge_weight is not None:
            check_shape("hyperedge_weight", hyperedge_weight, (num_hyperedges,), "hyperedges")
            check_floating("hyperedge_weight", hyperedge_weight, self.weight.dtype)
            num_hyperedges = len(hyperedge_weight)
        if hyperedge_attr is not None:
            axes = "hyperedges, channels"
            check_rows("hyperedge_attr", hyperedge_attr, (num_hyperedges, self.in_channels), axes, self.weight.dtype)
            num_hyperedges = len(hyperedge_attr)
        if num_hyperedges is None:
            num_hyperedges = int(hyperedge_index[1].max()) + 1 if hyperedge_index.numel() else 0
        check_ids("hyperedge_index[0]", hyperedge_index[0], x.shape[0], "vertices")
        check_ids("hyperedge_index[1]", hyperedge_index[1], num_hyperedges, "num_hyperedges")

        vertices, hyperedges = hyperedge_index.long()
        h = (x @ self.weight).unflatten(1, (self.heads, self.out_channels))
        alpha = None
        if self.attention is not None:
            alpha = self._attend(h, vertices, hyperedges, hyperedge_attr, num_hyperedges)

        messages = h[vertices] if alpha is None else alpha * h[vertices]
        edges = segment_mean(messages, hyperedges, num_hyperedges)  # B Hᵀ X Θ
        if hyperedge_weight is None:
            degree = segment_counts(vertices, x.shape[0]).to(h.dtype)
        else:
            edges = edges * hyperedge_weight.to(h.dtype)[:, None, None]
            degree = segment_sum(hyperedge_weight[hyperedges], vertices, x.shape[0]).to(h.dtype)
        messages = edges[hyperedges] if alpha is None else alpha * edges[hyperedges]
        out = segment_sum(messages, vertices, x.shape[0])
        out = out * torch.where(degree == 0, 0, 1 / torch.where(degree == 0, 1, degree))[:, None, None]  # D⁻¹
        out = out.flatten(1) if self.concat else out.mean(dim=1)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _attend(
        self,
        h: Float[Tensor, "vertices heads out"],
        vertices: Int64[Tensor, " incidences"],
        hyperedges: Int64[Tensor, " incidences"],
        hyperedge_attr: Float[Tensor, "hyperedges in"] | None,
        num_hyperedges: int,
    ) -> Float[Tensor, "incidences heads 1"]:
        """The weight of every incidence; those of a vertex add up to 1."""
        assert self.attention is not None
        if hyperedge_attr is None:
            edges = segment_mean(h[vertices], hyperedges, num_hyperedges)
        else:
            edges = (hyperedge_attr @ self.weight).unflatten(1, (self.heads, self.out_channels))
        pairs = torch.cat([h[vertices], edges[hyperedges]], dim=-1)
        logits = F.leaky_relu((pairs * self.attention.to(h.dtype)).sum(dim=-1), self.negative_slope)
        alpha = segment_softmax(logits, vertices, h.shape[0])
        return F.dropout(alpha, self.dropout, self.training)[:, :, None]
