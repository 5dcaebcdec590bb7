"""The definition of the long convolution as a loop over its taps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["long_convolution_reference"]


def long_convolution_reference(
    u: Float[Tensor, "batch length dim"], kernel: Float[Tensor, "dim taps"], skip: Float[Tensor, " dim"] | None
) -> Float[Tensor, "batch length dim"]:
    """``y_t = sum_s kernel_s * u_{t-s} + skip * u_t``, tap by tap."""
    length = u.shape[1]
    y = torch.zeros_like(u) if skip is None else skip * u
    for tap in range(min(length, kernel.shape[1])):
        past = torch.nn.functional.pad(u[:, : length - tap], (0, 0, tap, 0))
        y = y + kernel[:, tap] * past
    return y
