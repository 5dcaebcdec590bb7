"""The long convolution through the FFT, O(L log L)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["long_convolution_fft"]


def long_convolution_fft(
    u: Float[Tensor, "batch length dim"], kernel: Float[Tensor, "dim taps"], skip: Float[Tensor, " dim"] | None
) -> Float[Tensor, "batch length dim"]:
    """The same sum as the reference's, as a product of spectra."""
    length = u.shape[1]
    if length == 0:
        return u if skip is None else skip * u
    # 2L points hold the L + (L - 1) outputs of the linear convolution, so nothing wraps around into the first L.
    points = 2 * length
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=points) * torch.fft.rfft(kernel[:, :length], n=points)
    y = torch.fft.irfft(spectrum, n=points)[..., :length].transpose(1, 2)
    return y if skip is None else y + skip * u
