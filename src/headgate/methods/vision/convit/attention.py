r"""Gated positional self-attention, and the plain self-attention that takes its place in the last blocks.

d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases" (ICML 2021, arXiv
2103.10697). In head h a query i attends to a key j with the weight (equation 7)

.. math:: A^h_{ij} = (1 - \sigma(\lambda_h))\,\mathrm{softmax}_j(q_i \cdot k_j / \sqrt{d_h})
          + \sigma(\lambda_h)\,\mathrm{softmax}_j(w_h \cdot r_{ij})

with r the relative coordinates of the two patches. Both softmaxes are taken before they are mixed, so content and position
compete through the gate alone, never through the size of their scores. With attention dropout off, the two averages of the
values are computed apart and mixed: content by PyTorch's fused attention, position by the factors of
:mod:`~headgate.methods.vision.convit.positions`. No batch × heads × N × N weights are written, and the positional part needs
no cache: its factors are smaller than the weights of the layer.

Parameters have the published names, so that published weights load as they are.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.evaluate import attention_distance
from headgate.methods.vision.convit.positions import (
    average_by_position,
    axis_attention,
    grid_attention,
    offsets_of_heads,
)
from headgate.validate import check_divides, check_floating, check_positive, check_probability, check_shape

__all__ = ["GPSA", "MHSA"]

Grid = tuple[int, int]


class _SelfAttention(nn.Module):
    """What both kinds share: heads, the output projection, and dropout behind it."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads)
        check_divides(num_heads=num_heads, dim=dim)
        check_probability(attn_drop=attn_drop, proj_drop=proj_drop)
        self.dim = dim
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_parameters(self) -> None:
        """Draw the weights of linear layers from a normal of deviation 0.02 cut at ±2; biases are 0."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _heads(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch heads tokens head_dim"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _output(self, y: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _check(self, x: Tensor) -> None:
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.proj.weight.dtype)


class GPSA(_SelfAttention):
    """Gated positional self-attention over a grid of patches, without a class token.

    A drop-in for multi-head self-attention. With ``local_init`` it starts as a convolution: each of the first k² heads
    (k = ⌊√heads⌋) looks at one offset of a k × k filter.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``. A square number has an offset for every head.
        qkv_bias: whether queries, keys and values have biases. The output projection always has one.
        attn_drop: rate on the attention weights in training.
        proj_drop: rate on the output in training.
        locality_strength: α, how narrowly a head looks at its offset at the start; above 0 (else a warning).
        local_init: whether to start local (:meth:`localise_`); without, positions and values start at random.
        grid_size: rows and columns of the patches; default: the square grid of as many patches as there are tokens.
        branch_dropout: drop weights of content and of position apart, before they are mixed, which keeps the fused form
            in training: the positional mask is the same for the whole batch. Without, ``attn_drop`` acts on the mixed
            weights, as in the published code, which then have to be written out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        local_init: bool = True,
        grid_size: Grid | None = None,
        *,
        branch_dropout: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop, proj_drop)
        if grid_size is not None:
            check_positive(rows=grid_size[0], columns=grid_size[1])
        self.grid_size = None if grid_size is None else (grid_size[0], grid_size[1])
        self.locality_strength = locality_strength
        self.local_init = local_init
        self.branch_dropout = branch_dropout
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))  # λ
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: the usual draws, gates at σ(1) = 0.73, and then, with ``local_init``, the local start."""
        super().reset_parameters()
        nn.init.ones_(self.gating_param)
        if self.local_init:
            self.localise_()

    def localise_(self, locality_strength: float | None = None) -> None:
        """Start as a convolution: values become the identity, gates open to 0.73, heads look at their offsets.

        Queries, keys and the output projection stay.

        Args:
            locality_strength: α; default: the layer's.
        """
        nn.init.eye_(self.v.weight)
        if self.v.bias is not None:
            nn.init.zeros_(self.v.bias)
        nn.init.ones_(self.gating_param)
        self.localise_positions_(locality_strength)

    @torch.no_grad()
    def localise_positions_(self, locality_strength: float | None = None) -> None:
        """The positional part of :meth:`localise_` alone: each of the first k² heads looks at its offset.

        The weights of the heads beyond k² are multiplied by α, as in the published code.

        Args:
            locality_strength: α; default: the layer's. At 0 or below no head is local, of which a warning tells.
        """
        strength = self.locality_strength if locality_strength is None else locality_strength
        if not strength > 0:
            warnings.warn(
                f"locality_strength={strength} makes no head local; above 0 it draws a head to its offset", stacklevel=2
            )
        offsets = offsets_of_heads(self.num_heads)
        weight = self.pos_proj.weight
        weight[: len(offsets), :2] = 2 * offsets.to(weight)
        weight[: len(offsets), 2] = -1.0
        weight.mul_(strength)
        nn.init.zeros_(self.pos_proj.bias)

    @property
    def gate(self) -> Float[Tensor, " heads"]:
        """σ(λ), the share of positional attention, per head."""
        return torch.sigmoid(self.gating_param)

    def forward(
        self, x: Float[Tensor, "batch length dim"], grid_size: Grid | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend within every grid of patches.

        Args:
            x: ``(batch, rows * columns, dim)`` in raster order.
            grid_size: rows and columns, in place of the layer's.

        Returns:
            ``(batch, rows * columns, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or tokens that do not fill the grid (such as a class token among them).
        """
        grid = self._grid(x, grid_size)
        q, k = self._queries_keys(x)
        v = self._heads(self.v(x))
        if self.training and self.attn_drop > 0 and not self.branch_dropout:
            weights = F.dropout(self._mixed(q, k, grid), self.attn_drop)
            return self._output(weights.to(v.dtype) @ v)
        rate = self.attn_drop if self.training else 0.0
        content = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        position = self._position_average(v, grid, rate)
        # Equation 7 without its division by the sum over keys: a convex mixture of distributions sums to one.
        return self._output(content.lerp(position.to(content.dtype), self.gate.to(content.dtype)[:, None, None]))

    def attention(
        self, x: Float[Tensor, "batch length dim"], grid_size: Grid | None = None
    ) -> Float[Tensor, "batch heads length length"]:
        """The mixed weights A of every query (row) for every key (column), without dropout; arguments as of :meth:`forward`."""
        grid = self._grid(x, grid_size)
        return self._mixed(*self._queries_keys(x), grid)

    def positional_attention(self, grid_size: Grid) -> Float[Tensor, "heads tokens tokens"]:
        """The positional weights P of every head, which no input changes."""
        return grid_attention(*axis_attention(self.pos_proj.weight, self.pos_proj.bias, grid_size))

    def attention_distance(
        self, x: Float[Tensor, "batch length dim"], grid_size: Grid | None = None
    ) -> Float[Tensor, " heads"]:
        """How far a query looks, per head: the mean over queries of Σ_j ‖δ_ij‖ A_ij, A averaged over the batch.

        Args:
            x: as of :meth:`forward`.
            grid_size: as of :meth:`forward`.

        Returns:
            ``(heads,)`` in patches, float64 on the CPU.
        """
        grid = self._grid(x, grid_size)
        mean = self.attention(x, grid).mean(dim=0, keepdim=True)
        return torch.from_numpy(attention_distance(mean, grid))

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"dim={self.dim}, num_heads={self.num_heads}, grid_size={self.grid_size}"

    def _queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.qk(x).chunk(2, dim=-1)
        return self._heads(q), self._heads(k)

    def _mixed(self, q: Tensor, k: Tensor, grid: Grid) -> Float[Tensor, "batch heads length length"]:
        """Equation 7, written out."""
        content = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        gate = self.gate.to(content.dtype)[:, None, None]
        mixed = content.lerp(self.positional_attention(grid).to(content.dtype), gate)
        return mixed / mixed.sum(dim=-1, keepdim=True)

    def _position_average(self, v: Tensor, grid: Grid, rate: float) -> Float[Tensor, "batch heads tokens head_dim"]:
        if rate > 0:
            return F.dropout(self.positional_attention(grid), rate).to(v.dtype) @ v
        by_row, by_column = axis_attention(self.pos_proj.weight, self.pos_proj.bias, grid)
        return average_by_position(by_row.to(v.dtype), by_column.to(v.dtype), v)

    def _grid(self, x: Tensor, grid_size: Grid | None) -> Grid:
        self._check(x)
        grid = self.grid_size if grid_size is None else (grid_size[0], grid_size[1])
        return _fit_grid(x.shape[1], grid)


class MHSA(_SelfAttention):
    """Multi-head self-attention, with the parameters' published names and the diagnostics of :class:`GPSA`.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
        qkv_bias: whether queries, keys and values have biases. The output projection always has one.
        attn_drop: rate on the attention weights in training.
        proj_drop: rate on the output in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop, proj_drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Attend within every sequence of ``x`` ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        q, k, v = self._queries_keys_values(x)
        rate = self.attn_drop if self.training else 0.0
        return self._output(F.scaled_dot_product_attention(q, k, v, dropout_p=rate))

    def attention(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch heads length length"]:
        """How much every token (row) takes from every token (column) of ``x``, without dropout."""
        q, k, _ = self._queries_keys_values(x)
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)

    def attention_distance(
        self, x: Float[Tensor, "batch length dim"], grid_size: Grid | None = None
    ) -> Float[Tensor, " heads"]:
        """How far a patch looks, per head, as of :class:`GPSA`.

        Args:
            x: ``(batch, length, dim)``, patches in raster order.
            grid_size: rows and columns of the patches; tokens before them, such as the class token, have no place and are
                left out. Default: the square grid of as many patches as there are tokens.

        Returns:
            ``(heads,)`` in patches, float64 on the CPU.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a grid of more patches than tokens.
        """
        weights = self.attention(x)
        length = x.shape[1]
        grid = _fit_grid(length, None) if grid_size is None else grid_size
        prefix = length - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(f"grid_size must hold at most the {length} tokens of x, got {grid[0]} × {grid[1]}")
        return torch.from_numpy(attention_distance(weights, grid, prefix_tokens=prefix))

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"dim={self.dim}, num_heads={self.num_heads}"

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x)
        q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return q, k, v


def _fit_grid(length: int, grid: Grid | None) -> Grid:
    """The grid that ``length`` patches fill: ``grid``, or a square."""
    if grid is None:
        side = math.isqrt(length)
        if side < 1 or side**2 != length:
            raise ValueError(
                f"x must have a square number of tokens, got {length}; give grid_size=(rows, columns) for other grids, "
                "and leave a class token out: it has no place on the grid"
            )
        return side, side
    if grid[0] < 1 or grid[1] < 1 or grid[0] * grid[1] != length:
        raise ValueError(
            f"grid_size must hold the {length} tokens of x, got {grid[0]} rows of {grid[1]}; a class token has no place "
            "on the grid"
        )
    return grid
