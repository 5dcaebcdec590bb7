r"""Causal depthwise convolution with a kernel as long as the sequence.

.. math:: y_t = \sum_{s=0}^{t} k_s \odot u_{t-s} \;+\; D \odot u_t

Hyena, H3, long BaseConv and every state space model in its convolution form are this sum. It costs
:math:`O(L \log L)` through the FFT (Cooley and Tukey, 1965), with the signal padded to twice its length so that the
circular convolution of the transform is the linear one.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.ops.long_convolution.fft import long_convolution_fft
from headgate.ops.long_convolution.reference import long_convolution_reference
from headgate.validate import check_floating, check_shape

__all__ = ["long_convolution"]

_BACKENDS = {"fft": long_convolution_fft, "reference": long_convolution_reference}


def long_convolution(
    u: Float[Tensor, "batch length dim"],
    kernel: Float[Tensor, "dim taps"],
    skip: Float[Tensor, " dim"] | None = None,
    *,
    backend: Literal["fft", "reference"] = "fft",
) -> Float[Tensor, "batch length dim"]:
    """Convolve every channel of ``u`` with its own causal kernel.

    Args:
        u: signal ``(batch, length, dim)``; the length may be zero.
        kernel: ``(dim, taps)``, tap ``s`` weighs the signal ``s`` steps back. Taps from ``length`` on never meet the
            signal and are left out.
        skip: ``(dim,)``, weight D of the signal itself, added to tap 0; ``None`` for none.
        backend: ``"fft"``, or ``"reference"``, the definition as a loop over the taps.

    Returns:
        ``(batch, length, dim)`` in the dtype of ``u``. Below float32 the sum is computed in float32.

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: wrong shape, no taps, or an unknown backend.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, _BACKENDS))}, got {backend!r}")
    check_shape("u", u, (None, None, None), "batch, length, dim")
    check_floating("u", u)
    dim = u.shape[2]
    check_shape("kernel", kernel, (dim, None), "dim, taps")
    check_floating("kernel", kernel)
    if kernel.shape[1] == 0:
        raise ValueError(f"kernel must have at least one tap, got {tuple(kernel.shape)} for (dim, taps)")
    wide = torch.promote_types(torch.promote_types(u.dtype, kernel.dtype), torch.float32)
    if skip is not None:
        check_shape("skip", skip, (dim,), "dim")
        check_floating("skip", skip)
        skip = skip.to(wide)
    return _BACKENDS[backend](u.to(wide), kernel.to(wide), skip).to(u.dtype)
