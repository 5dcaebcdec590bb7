r"""How much noise each step of a diffusion adds: the usual schedules of β.

``linear`` is that of DDPM (Ho et al., arXiv 2006.11239), ``scaled_linear`` that of latent diffusion (Rombach et al., arXiv
2112.10752: linear in :math:`\sqrt\beta`), ``cosine`` that of Nichol and Dhariwal (arXiv 2102.09672, equation 17).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_positive

__all__ = ["cosine_betas", "linear_betas", "scaled_linear_betas"]


def linear_betas(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Float[Tensor, " steps"]:
    """β rising linearly.

    Args:
        steps: T ≥ 1.
        start: first β, in (0, 1).
        end: last β, in (0, 1).

    Returns:
        ``(steps,)``, float64 on the CPU.

    Raises:
        ValueError: a number outside its range.
    """
    _check(steps, start, end)
    return torch.linspace(start, end, steps, dtype=torch.float64, device="cpu")


def scaled_linear_betas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Float[Tensor, " steps"]:
    """β whose root rises linearly; arguments and result as of :func:`linear_betas`."""
    _check(steps, start, end)
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64, device="cpu").square()


def cosine_betas(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Float[Tensor, " steps"]:
    r"""β of :math:`\bar\alpha(s) = \cos^2(\frac{s + o}{1 + o}\cdot\frac{\pi}{2})` at s = 0, 1/T, …, 1.

    Args:
        steps: T ≥ 1.
        offset: o ≥ 0, keeps the first steps from being too small.
        largest: β is cut here.

    Returns:
        ``(steps,)``, float64 on the CPU.

    Raises:
        ValueError: a number outside its range.
    """
    check_positive(steps=steps)
    if offset < 0 or not 0 < largest < 1:
        raise ValueError(f"offset must not be negative and largest lie in (0, 1), got {offset} and {largest}")
    share = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    alpha_bar = torch.cos((share + offset) / (1 + offset) * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=largest)


def _check(steps: int, start: float, end: float) -> None:
    check_positive(steps=steps)
    if not (0 < start < 1 and 0 < end < 1):
        raise ValueError(f"start and end must lie in (0, 1), got {start} and {end}")
