r"""H3, "hungry hungry hippos" (Fu et al., arXiv 2212.14052): linear attention whose memories are state space models.

Queries, keys and values are linear in the input. The keys pass a shift SSM, so that a key can meet the value after it;
the outer product of key and value passes a diagonal SSM; the query reads it:

.. math:: \tilde k = S * k + D_k \odot k,\qquad
          y_t = \sum_a q_{t,a}\,\bigl(K * (\tilde k_a v_b) + D\,\tilde k_a v_b\bigr)_t,\qquad o = W_o y .

The channels form dim / p groups of p = ``head_dim`` channels; a, b run over the p channels of a group, so a group has
p² products, which share one kernel K.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.ops import long_convolution
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["H3", "DiagonalKernel", "ShiftKernel"]


class H3(nn.Module):
    """Shift SSM on the keys, diagonal SSM on key times value, read by the query.

    Args:
        dim: channels.
        state_dim: N, the state of each SSM; even.
        head_dim: p, channels of a group; must divide ``dim``.
        max_length: longest sequence; ``None`` for any.
        dt_min: smallest step Δ of the diagonal SSM at the start.
        dt_max: largest step Δ.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 64,
        head_dim: int = 1,
        max_length: int | None = None,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, head_dim=head_dim)
        check_divides(head_dim=head_dim, dim=dim)
        if max_length is not None:
            check_positive(max_length=max_length)
        groups = dim // head_dim
        self.dim = dim
        self.state_dim = state_dim
        self.head_dim = head_dim
        self.max_length = max_length
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.key_kernel = ShiftKernel(dim, state_dim)
        self.key_skip = nn.Parameter(torch.randn(dim))
        self.kernel = DiagonalKernel(groups, state_dim, dt_min=dt_min, dt_max=dt_max)
        self.skip = nn.Parameter(torch.randn(groups))
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """Mix ``x`` ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a sequence longer than ``max_length``.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.query.weight.dtype)
        batch, length, _ = x.shape
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"x must have length <= max_length={self.max_length}, got {tuple(x.shape)}")
        size = self.head_dim
        key = long_convolution(self.key(x), self.key_kernel(length), self.key_skip)
        # batch, a, b, length, group: the p² products of a group stand in the batch axis and so share its kernel.
        key = key.unflatten(-1, (-1, size)).permute(0, 3, 1, 2)[:, :, None]
        value = self.value(x).unflatten(-1, (-1, size)).permute(0, 3, 1, 2)[:, None]
        query = self.query(x).unflatten(-1, (-1, size)).permute(0, 3, 1, 2)[:, :, None]
        product = (key * value).flatten(0, 2)
        memory = long_convolution(product, self.kernel(length), self.skip).unflatten(0, (batch, size, size))
        y = (query * memory).sum(1)
        # The published layer hands the channels on in the order (channel of the group, group).
        return self.output(y.transpose(1, 2).flatten(2).to(x.dtype))

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens, counted as published: ``dim * state_dim``."""
        return self.dim * self.state_dim


class ShiftKernel(nn.Module):
    r"""Kernel of a shift SSM, whose state holds the last N inputs: :math:`S_l = \sum_n B_n C_{n+l}` for l < N, then zero.

    Args:
        dim: channels.
        state_dim: N.
    """

    def __init__(self, dim: int, state_dim: int) -> None:
        super().__init__()
        check_positive(dim=dim, state_dim=state_dim)
        self.input = nn.Parameter(torch.zeros(dim, state_dim).index_fill_(1, torch.tensor([0]), 1.0))  # B = e_1
        self.readout = nn.Parameter(torch.empty(dim, state_dim).uniform_(-1, 1) / math.sqrt(state_dim))  # C

    def forward(self, length: int) -> Float[Tensor, "dim taps"]:
        """The kernel's taps, at most ``length`` of them; those not given are zero."""
        wide = torch.promote_types(self.input.dtype, torch.float32)
        taps = self.input.shape[1]
        source = torch.fft.rfft(self.input.to(wide), n=2 * taps)
        readout = torch.fft.rfft(self.readout.to(wide), n=2 * taps)
        return torch.fft.irfft(source.conj() * readout, n=2 * taps)[:, : min(taps, length)]


class DiagonalKernel(nn.Module):
    r"""Kernel of a diagonal SSM (S4D; Gu et al., arXiv 2206.11893) under the bilinear discretisation.

    N/2 complex modes with :math:`A = -e^a + i\omega` and step :math:`\Delta`:

    .. math:: \bar A = \frac{1 + \Delta A/2}{1 - \Delta A/2},\qquad
              K_l = 2\,\mathrm{Re} \sum_n \frac{B_n C_n \Delta}{1 - \Delta A_n/2}\,\bar A_n^{\,l}

    It starts from S4D-Lin, A = -½ + iπn, with B = 1, C from the complex normal distribution, and log Δ uniform.

    Args:
        dim: channels.
        state_dim: N, even: a mode and its conjugate count as two.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ.
    """

    def __init__(self, dim: int, state_dim: int = 64, *, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
        super().__init__()
        check_positive(dim=dim, state_dim=state_dim, dt_min=dt_min, dt_max=dt_max)
        if state_dim % 2:
            raise ValueError(f"state_dim must be even, got {state_dim}")
        modes = state_dim // 2
        self.log_dt = nn.Parameter(torch.empty(dim).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_decay = nn.Parameter(torch.full((dim, modes), math.log(0.5)))  # a
        self.frequency = nn.Parameter(math.pi * torch.arange(modes).float().repeat(dim, 1))  # ω
        self.input = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(dim, modes, 1))  # B, as (real, imaginary)
        self.readout = nn.Parameter(torch.randn(dim, modes, 2) / math.sqrt(2))  # C

    def forward(self, length: int) -> Float[Tensor, "dim length"]:
        """The first ``length`` taps.

        Powers of Ā are taken in polar form with real arithmetic, in float32 at least: for the compiler, and because a
        product of many complex factors in half precision drifts.
        """
        wide = torch.promote_types(self.log_dt.dtype, torch.float32)
        half_dt = self.log_dt.to(wide).exp()[:, None] / 2
        damping = half_dt * self.log_decay.to(wide).exp()  # -Re(ΔA/2)
        turn = half_dt * self.frequency.to(wide)  # Im(ΔA/2)
        below = (1 + damping).square() + turn.square()  # |1 - ΔA/2|²
        log_radius = 0.5 * torch.log1p(-4 * damping / below)  # |1 + ΔA/2|² = |1 - ΔA/2|² - 4 · damping
        angle = torch.atan2(turn, 1 - damping) + torch.atan2(turn, 1 + damping)
        source_real, source_imag = self.input.to(wide).unbind(-1)
        readout_real, readout_imag = self.readout.to(wide).unbind(-1)
        weight_real = source_real * readout_real - source_imag * readout_imag
        weight_imag = source_real * readout_imag + source_imag * readout_real
        # w · 2·(Δ/2)·2 / (1 - ΔA/2) = w · 4·(Δ/2)·conj(1 - ΔA/2) / |1 - ΔA/2|², and conj(1 - ΔA/2) = (1 + damping) + i·turn
        scale = 4 * half_dt / below
        gain_real = scale * (weight_real * (1 + damping) - weight_imag * turn)
        gain_imag = scale * (weight_real * turn + weight_imag * (1 + damping))
        steps = torch.arange(length, device=angle.device, dtype=wide)
        radius = torch.exp(log_radius[..., None] * steps)
        phase = angle[..., None] * steps
        return (radius * (gain_real[..., None] * phase.cos() - gain_imag[..., None] * phase.sin())).sum(1)
