r"""BaseConv, the gated convolution with nothing else (Arora et al., arXiv 2312.04927, section 4).

.. math:: y = \mathrm{conv}(u) \odot (W u + b) + u

The convolution is either short (kernel 3) or as long as the sequence. A long one has its skip built in,
:math:`\mathrm{conv}(u) = u + k * u`, and a kernel that is learned tap by tap or computed from the position by a small
network: :math:`k_t = W_2\,\mathrm{relu}(W_1 z_t + b_1) + b_2` with the features z of :mod:`.filter_features`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.zoology.filter_features import filter_features
from headgate.nn import ShortConvolution
from headgate.ops import long_convolution
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["BaseConv", "ImplicitLongConvolution", "LongConvolution"]


class BaseConv(nn.Module):
    """Gated convolution, short or long.

    Args:
        dim: channels.
        max_length: longest sequence, for a long convolution.
        kernel_size: taps of a short convolution, or -1 for a long one.
        implicit: whether the kernel of a long convolution is computed from the position.
        activation: whether both factors pass a SiLU.
        official_quirks: see :class:`LongConvolution`; it concerns a long convolution that is not implicit.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        kernel_size: int = 3,
        *,
        implicit: bool = True,
        activation: bool = False,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, max_length=max_length)
        if kernel_size != -1 and kernel_size < 1:
            raise ValueError(f"kernel_size must be positive, or -1 for a long convolution, got {kernel_size}")
        self.dim = dim
        self.activation = activation
        self.projection = nn.Linear(dim, dim)
        self.conv: ShortConvolution | LongConvolution | ImplicitLongConvolution
        if kernel_size != -1:
            self.conv = ShortConvolution(dim, kernel_size)
        elif implicit:
            self.conv = ImplicitLongConvolution(dim, max_length)
        else:
            self.conv = LongConvolution(dim, max_length, official_quirks=official_quirks)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix ``x`` ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a sequence longer than ``max_length`` in a long convolution.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.projection.weight.dtype)
        mixed, gate = self.conv(x), self.projection(x)
        if self.activation:
            mixed, gate = F.silu(mixed), F.silu(gate)
        return mixed * gate + x

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: ``dim * kernel_size``, or ``dim * length`` for a long kernel."""
        return self.conv.state_size(length)


class LongConvolution(nn.Module):
    """``u + k * u`` with a kernel that is learned tap by tap, from N(0, 1).

    Args:
        dim: channels.
        max_length: taps of the kernel, the longest sequence.
        official_quirks: let the taps beyond a shorter sequence wrap around, as in the published code, which hands all
            of them to a Fourier transform of twice the sequence's length; then later tokens leak into earlier ones.
    """

    def __init__(self, dim: int, max_length: int, *, official_quirks: bool = False) -> None:
        super().__init__()
        check_positive(dim=dim, max_length=max_length)
        self.dim = dim
        self.max_length = max_length
        self.official_quirks = official_quirks
        self.kernel = nn.Parameter(torch.randn(dim, max_length))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Convolve ``x`` ``(batch, length, dim)``.

        Raises:
            ValueError: wrong shape, or a sequence longer than ``max_length``.
        """
        _check_length(x, self.max_length)
        mixed = x + long_convolution(x, self.kernel)
        return mixed + self._wrapped(x) if self.official_quirks else mixed

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: all of them."""
        return self.dim * length

    def _wrapped(self, x: Tensor) -> Tensor:
        """What a circular convolution of 2L points adds: tap 2L - s weighs the token s steps ahead."""
        length = x.shape[1]
        ahead = self.kernel[:, length + 1 : 2 * length].flip(1)
        if ahead.shape[1] == 0:
            return torch.zeros_like(x)
        ahead = F.pad(ahead, (length - ahead.shape[1], 0))
        return long_convolution(x.flip(1), ahead).flip(1)


class ImplicitLongConvolution(nn.Module):
    """``u + k * u`` with a kernel that a small network computes from the position.

    Args:
        dim: channels.
        max_length: longest sequence.
        num_features: positional features, odd and at least 3.
        hidden_dim: width of the network.
    """

    features: Tensor

    def __init__(self, dim: int, max_length: int, num_features: int = 3, hidden_dim: int = 16) -> None:
        super().__init__()
        check_positive(dim=dim, max_length=max_length, hidden_dim=hidden_dim)
        self.dim = dim
        self.max_length = max_length
        self.register_buffer("features", filter_features(max_length, num_features))
        self.filter = nn.Sequential(nn.Linear(num_features, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Convolve ``x`` ``(batch, length, dim)``.

        Raises:
            ValueError: wrong shape, or a sequence longer than ``max_length``.
        """
        _check_length(x, self.max_length)
        return x + long_convolution(x, self.filter(self.features[: x.shape[1]]).T)

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: all of them."""
        return self.dim * length


def _check_length(x: Tensor, max_length: int) -> None:
    if x.shape[1] > max_length:
        raise ValueError(
            f"x must have length <= max_length={max_length}, got {tuple(x.shape)} for (batch, length, dim)"
        )
