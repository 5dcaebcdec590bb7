"""Visual contrastive decoding's distorted view: an image half drowned in Gaussian noise by forward diffusion.

``x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps`` with ``abar_k = prod_{s <= k} (1 - b_s)``,
``b_s = sigmoid(linspace(-6, 6, 1000)_s) (5e-3 - 1e-5) + 1e-5`` (Leng et al., arXiv 2311.16922).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_floating

__all__ = ["NOISE_STEPS", "noise_image", "signal_share"]

NOISE_STEPS = 1000


def signal_share() -> Float[Tensor, " steps"]:
    """How much of the image's variance is left after each of the 1000 steps: abar, falling from nearly 1."""
    betas = torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS)) * (0.5e-2 - 1e-5) + 1e-5
    return torch.cumprod(1 - betas, dim=0)


def noise_image(
    image: Float[Tensor, "*shape"],
    step: int = 500,
    generator: torch.Generator | None = None,
    *,
    noise: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Diffuse an image as the model gets it, after its preprocessing.

    Args:
        image: normalised pixels of any shape, e.g. ``pixel_values``.
        step: k, from 0 (hardly any noise) to 999.
        generator: for the noise, a CPU generator; the noise is drawn there and moved.
        noise: standard normal noise of the image's shape, in place of drawn one.

    Raises:
        TypeError: an image that is not floating point.
        ValueError: ``step`` outside [0, 999], noise of another shape, or neither or both of generator and noise.
    """
    check_floating("image", image)
    if not 0 <= step < NOISE_STEPS:
        raise ValueError(f"step must lie in [0, {NOISE_STEPS - 1}], got {step}")
    if (generator is None) == (noise is None):
        raise ValueError("exactly one of generator and noise must be given")
    if noise is None:
        noise = torch.randn(image.shape, generator=generator)
    if noise.shape != image.shape:
        raise ValueError(f"noise must have the shape of image, {tuple(image.shape)}, got {tuple(noise.shape)}")
    share = signal_share()[step].to(image.device)
    exact = image.to(torch.promote_types(image.dtype, torch.float32))
    return (share.sqrt() * exact + (1 - share).sqrt() * noise.to(exact)).to(image.dtype)
