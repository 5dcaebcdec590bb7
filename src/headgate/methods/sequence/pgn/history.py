r"""Historical information extraction: what all earlier steps of a window say, in one linear map (PGN, equation of H).

.. math:: H_t = b + \sum_{\tau=1}^{K} W_\tau\, x_{t-\tau}

with zeros before the window. The current step is left out, so that :math:`H_1 = b`. One hop leads from every earlier step
to every later one; the same kernel serves all steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["FFT_FROM_LAGS", "history_by_convolution", "history_by_fft", "past"]

FFT_FROM_LAGS = 511
"""From this number of lags on :func:`past` goes through the Fourier transform."""


def past(
    x: Float[Tensor, "batch features length"],
    weight: Float[Tensor, "dim group_features lags"],
    bias: Float[Tensor, " dim"] | None,
    groups: int = 1,
) -> Float[Tensor, "batch dim length"]:
    """Map the steps before each one.

    Args:
        x: ``(batch, features, length)``.
        weight: ``(dim, features / groups, lags)``; entry ``lags - τ`` of the last axis weighs the step τ before.
        bias: ``(dim,)``, or ``None``.
        groups: input and output channels are cut into so many groups, each of which sees itself alone.

    Returns:
        ``(batch, dim, length)``.
    """
    if weight.shape[2] >= FFT_FROM_LAGS:
        return history_by_fft(x, weight, bias, groups)
    return history_by_convolution(x, weight, bias, groups)


def history_by_convolution(
    x: Float[Tensor, "batch features length"],
    weight: Float[Tensor, "dim group_features lags"],
    bias: Float[Tensor, " dim"] | None,
    groups: int = 1,
) -> Float[Tensor, "batch dim length"]:
    """The sum of :func:`past` as one convolution: O(length · lags)."""
    # Without the last step, the window of a kernel that ends at step t - 1 gives output t.
    return F.conv1d(F.pad(x[..., :-1], (weight.shape[2], 0)), weight, bias, groups=groups)


def history_by_fft(
    x: Float[Tensor, "batch features length"],
    weight: Float[Tensor, "dim group_features lags"],
    bias: Float[Tensor, " dim"] | None,
    groups: int = 1,
) -> Float[Tensor, "batch dim length"]:
    """The sum of :func:`past` as a product of spectra: O(length · log length). Below float32 it is taken in float32."""
    length, lags = x.shape[2], weight.shape[2]
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    # Tap τ of the kernel weighs the step τ before, and tap 0 nothing; with length + lags points nothing wraps around.
    taps = F.pad(weight.to(wide).flip(2), (1, 0))
    points = length + lags
    signal = torch.fft.rfft(x.to(wide).unflatten(1, (groups, -1)), n=points)
    kernel = torch.fft.rfft(taps.unflatten(0, (groups, -1)), n=points)
    spectrum = torch.einsum("bgcf,gdcf->bgdf", signal, kernel)
    mixed = torch.fft.irfft(spectrum, n=points)[..., :length].flatten(1, 2)
    if bias is not None:
        mixed = mixed + bias.to(wide)[:, None]
    return mixed.to(x.dtype)
