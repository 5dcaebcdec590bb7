r"""Hyena of order 2 (Poli et al., "Hyena Hierarchy", arXiv 2302.10866).

.. math:: [x_1, x_2, v] = \mathrm{shortconv}(W_{in} u),\qquad y = W_{out}\,\bigl(x_2 \odot (k * (v \odot x_1) + D \odot (v \odot x_1))\bigr)

The long kernel k is a network with sine activations on positional features, damped by a window that decays faster in
later
channels: :math:`k_t = \mathrm{FFN}(z_t)\,e^{-t|\delta_c|},\ t \in [0, 1]`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.zoology.filter_features import filter_features
from headgate.nn import ShortConvolution
from headgate.ops import long_convolution
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["Hyena", "HyenaFilter"]


class Hyena(nn.Module):
    """Two gates around a long convolution with an implicit kernel.

    Args:
        dim: channels.
        max_length: longest sequence.
        filter_dim: width of the network that computes the kernel.
        short_kernel_size: taps of the convolution behind the input projection.
        dropout: rate on the gated values in front of the long convolution.
        **filter_options: further keywords of :class:`HyenaFilter`.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        *,
        filter_dim: int = 64,
        short_kernel_size: int = 3,
        dropout: float = 0.0,
        **filter_options: float,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, max_length=max_length)
        check_probability(dropout=dropout)
        self.dim = dim
        self.max_length = max_length
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_conv = ShortConvolution(3 * dim, short_kernel_size)
        self.filter = HyenaFilter(dim, max_length, hidden_dim=filter_dim, **filter_options)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix ``x`` ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a sequence longer than ``max_length``.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.in_proj.weight.dtype)
        length = x.shape[1]
        if length > self.max_length:
            raise ValueError(f"x must have length <= max_length={self.max_length}, got {tuple(x.shape)}")
        x1, x2, v = self.short_conv(self.in_proj(x)).chunk(3, dim=-1)
        v = long_convolution(self.dropout(v * x1), self.filter(length), self.filter.skip)
        return self.out_proj(v * x2)

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: the gated values, ``dim * length``."""
        return self.dim * length


class HyenaFilter(nn.Module):
    """The implicit kernel of :class:`Hyena` and its skip weight D.

    Args:
        dim: channels of the kernel.
        max_length: longest kernel.
        num_features: positional features, odd and at least 3. They are parameters, as published (there with a learning
            rate of 1e-5 of their own).
        hidden_dim: width of the network.
        num_inner_layers: linear layers between its first and last.
        frequency: start of ω in ``sin(ω ·)``, one vector that all sines share.
        linear: whether one linear map takes the place of the network.
        modulate: whether the kernel is damped by the decaying window.
        fast_decay: the window of the last channel falls to ``decay_target`` at this share of ``max_length``.
        slow_decay: the same for the first channel.
        decay_target: see there.
        decay_shift: added to the window.
        normalize: whether the kernel is divided by the sum of its absolute values over the channels.
    """

    time: Tensor
    decay: Tensor

    def __init__(
        self,
        dim: int,
        max_length: int,
        *,
        num_features: int = 3,
        hidden_dim: int = 64,
        num_inner_layers: int = 2,
        frequency: float = 1.0,
        linear: bool = False,
        modulate: bool = True,
        fast_decay: float = 0.3,
        slow_decay: float = 1.5,
        decay_target: float = 0.01,
        decay_shift: float = 0.0,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, max_length=max_length, hidden_dim=hidden_dim)
        self.modulate = modulate
        self.decay_shift = decay_shift
        self.normalize = normalize
        self.features = nn.Parameter(filter_features(max_length, num_features))
        self.register_buffer("time", torch.linspace(0, 1, max_length)[:, None])
        # δ: the window e^{-t|δ|} reaches decay_target at t = slow_decay … fast_decay.
        rates = (math.log(decay_target) / slow_decay, math.log(decay_target) / fast_decay)
        self.register_buffer("decay", torch.linspace(*rates, dim))
        widths = [num_features] if linear else [num_features] + [hidden_dim] * (1 + num_inner_layers)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))
        self.layers.append(nn.Linear(widths[-1], dim, bias=False))
        self.frequency = None if linear else nn.Parameter(torch.full((hidden_dim,), float(frequency)))  # ω
        self.skip = nn.Parameter(torch.randn(dim))  # D

    def forward(self, length: int) -> Float[Tensor, "dim length"]:
        """The first ``length`` taps of the kernel."""
        hidden = self.features[:length]
        for layer in self.layers[:-1]:
            hidden = torch.sin(self.frequency * layer(hidden))
        kernel = self.layers[-1](hidden)
        if self.modulate:
            window = torch.exp(-self.time[:length] * self.decay.abs()) + self.decay_shift
            kernel = kernel * window
        if self.normalize:
            kernel = kernel / kernel.abs().sum(-1, keepdim=True)
        return kernel.T
