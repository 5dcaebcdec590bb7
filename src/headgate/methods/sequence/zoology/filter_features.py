r"""Positional features from which an implicit filter is computed (Poli et al., "Hyena", arXiv 2302.10866, section 3.3).

.. math:: z_t = [\,t/(l-1),\ \cos(f_b w_t),\ -\sin(f_b w_t)\,]_{b},\qquad w_t = 2\pi t / l,

with frequencies f from 1e-4 to (number of bands - 1).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["filter_features"]


def filter_features(max_length: int, num_features: int) -> Float[Tensor, "max_length num_features"]:
    """The features of positions 0 … max_length - 1.

    Args:
        max_length: l, the longest filter.
        num_features: an odd number of at least 3: the time, and a cosine and a sine for every band.

    Raises:
        ValueError: ``num_features`` is even or below 3.
    """
    if num_features < 3 or num_features % 2 == 0:
        raise ValueError(f"num_features must be odd and at least 3, got {num_features}")
    bands = (num_features - 1) // 2
    time = torch.linspace(0, 1, max_length)[:, None]
    angle = 2 * math.pi * torch.linspace(0, max_length - 1, max_length)[:, None] / max_length
    angle = torch.linspace(1e-4, bands - 1, bands) * angle
    return torch.cat((time, angle.cos(), -angle.sin()), dim=-1)
