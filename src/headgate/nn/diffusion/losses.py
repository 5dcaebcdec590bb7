r"""What a denoiser is trained on: the squared error of noise, data or velocity, and EDM's weighted error.

.. math:: L = \mathbb E\, w(t) \lVert F(x_t, t) - y \rVert^2, \qquad y \in \{\epsilon, x_0, v\}

(DDPM, arXiv 2006.11239, equation 14; flow matching, arXiv 2210.02747, equation 23; EDM, arXiv 2206.00364, table 1.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Real
from torch import Tensor

from headgate.nn.diffusion.paths import EDM, Path

__all__ = ["Target", "denoising_loss", "edm_loss"]

Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(noisy samples, network times) → prediction."""

Target: TypeAlias = Literal["noise", "x0", "velocity", "vp_v"]


def denoising_loss(
    predict: Predict,
    path: Path,
    x0: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    t: Real[Tensor, " batch"],
    target: Target = "velocity",
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, " batch"]:
    """Squared error of a prediction, averaged over the entries of each sample.

    Args:
        predict: the network, called with x_t and the times that it is to see. A condition is bound by the caller. Of twice
            as many channels as ``x0`` has (a learned variance) the first half is looked at.
        path: how data and noise are mixed.
        x0: data.
        noise: ε of the same shape.
        t: a time per sample.
        target: ``"noise"`` ε, ``"x0"``, ``"velocity"`` α̇ x0 + σ̇ ε, or ``"vp_v"`` α ε - σ x0.
        reduction: ``"mean"`` gives a scalar, ``"none"`` ``(batch,)``.

    Raises:
        ValueError: unknown target or reduction, or as the path refuses.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if target == "noise":
        wanted = noise
    elif target == "x0":
        wanted = x0
    elif target == "velocity":
        wanted = path.velocity(x0, noise, t)
    elif target == "vp_v":
        wanted = path.vp_v(x0, noise, t)
    else:
        raise ValueError(f"target must be 'noise', 'x0', 'velocity' or 'vp_v', got {target!r}")
    predicted = predict(path.add_noise(x0, noise, t).to(x0.dtype), path.network_time(t))
    if predicted.shape[1] == 2 * x0.shape[1]:
        predicted = predicted.chunk(2, dim=1)[0]
    errors = (predicted - wanted).square().flatten(1).mean(dim=1)
    return errors.mean() if reduction == "mean" else errors


def edm_loss(
    predict: Predict,
    path: EDM,
    x0: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    sigma: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """(σ² + σ_d²) / (σ σ_d)² ‖D(x0 + σ ε; σ) - x0‖², D the preconditioned network.

    Args:
        predict: F of :meth:`EDM.preconditioning`, called with c_in x and ln(σ)/4.
        path: holds σ_d.
        x0: data.
        noise: ε of the same shape.
        sigma: ``(batch,)``; the paper draws ln σ from N(-1.2, 1.2²).
    """
    shape = (-1,) + (1,) * (x0.dim() - 1)
    skip, out, scale = (part.reshape(shape) for part in path.preconditioning(sigma))
    x = path.add_noise(x0, noise, sigma).to(x0.dtype)
    denoised = skip * x + out * predict(scale * x, path.network_time(sigma))
    weight = (1 / out.square()).flatten()
    return (weight * (denoised - x0).square().flatten(1).mean(dim=1)).mean()


def check_like(x: Tensor, predicted: Tensor) -> Tensor:
    """Hand on a prediction of the samples' shape.

    Raises:
        ValueError: another shape.
    """
    if predicted.shape != x.shape:
        raise ValueError(f"predict must give the shape of x, {tuple(x.shape)}, got {tuple(predicted.shape)}")
    return predicted.to(torch.promote_types(x.dtype, torch.float32))
