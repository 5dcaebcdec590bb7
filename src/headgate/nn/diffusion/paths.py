r"""Paths from data to noise: one object owns α, σ, their derivatives and the time convention.

.. math:: x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon, \qquad v = \dot\alpha(t)\,x_0 + \dot\sigma(t)\,\epsilon

and, solved for the parts, with :math:`D = \alpha\dot\sigma - \dot\alpha\sigma`,

.. math:: x_0 = (\dot\sigma x_t - \sigma v) / D, \qquad \epsilon = (\alpha v - \dot\alpha x_t) / D,
          \qquad \nabla\log p = -\epsilon / \sigma .

===================  =================  ==========================  ==============
path                 time               α, σ                        network sees
===================  =================  ==========================  ==============
:class:`VP`          integers 0 … T-1   √ᾱ, √(1-ᾱ)                  t (or t / T)
:class:`EDM`         σ > 0              1, σ                        ln(σ) / 4
:class:`LinearFlow`  [0, 1], 0 = data   1 - t, t                    t
:class:`OTFlow`      [0, 1], 1 = data   t, 1 - (1 - σ_min) t        t
:class:`CosineFlow`  [0, 1], 0 = data   cos(πt/2), sin(πt/2)        t
===================  =================  ==========================  ==============

Sources: DDPM (arXiv 2006.11239), EDM (arXiv 2206.00364), SiT (arXiv 2401.08740), flow matching (arXiv 2210.02747).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor

from headgate.nn.diffusion.betas import cosine_betas, linear_betas, scaled_linear_betas

__all__ = ["EDM", "VP", "Coefficients", "CosineFlow", "LinearFlow", "OTFlow", "Path", "path_from_scheduler"]


class Coefficients(NamedTuple):
    """α, σ and their derivatives by time, float64, each of the shape of the times.

    Attributes:
        alpha: α, the share of data.
        sigma: σ, the share of noise.
        alpha_dot: dα/dt.
        sigma_dot: dσ/dt.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


class Path(ABC):
    """What all paths share; a path of your own gives :meth:`coefficients` and :meth:`check_time`.

    Times are tensors ``(batch,)``, one per sample. Results have the dtype of the samples, at least float32.
    """

    @abstractmethod
    def coefficients(self, t: Real[Tensor, " batch"]) -> Coefficients:
        """α, σ and their derivatives at the times ``t``, in float64."""

    @abstractmethod
    def check_time(self, t: Real[Tensor, " batch"]) -> None:
        """Refuse times outside the path's domain.

        Raises:
            TypeError: a dtype that the domain does not have.
            ValueError: a time outside it.
        """

    def network_time(self, t: Real[Tensor, " batch"]) -> Real[Tensor, " batch"]:
        """What the network is told about the times ``t``."""
        return t

    def add_noise(
        self, x0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Real[Tensor, " batch"]
    ) -> Float[Tensor, "batch *shape"]:
        """x_t from data ``x0``, ``noise`` of the same shape, and a time per sample.

        Raises:
            TypeError: times of a dtype that the domain does not have.
            ValueError: shapes that differ, or a time outside the domain.
        """
        alpha, sigma, _, _ = self._at(t, x0, noise)
        return alpha * x0 + sigma * noise

    def velocity(
        self, x0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Real[Tensor, " batch"]
    ) -> Float[Tensor, "batch *shape"]:
        """v = α̇ x0 + σ̇ ε."""
        _, _, alpha_dot, sigma_dot = self._at(t, x0, noise)
        return alpha_dot * x0 + sigma_dot * noise

    def vp_v(
        self, x0: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Real[Tensor, " batch"]
    ) -> Float[Tensor, "batch *shape"]:
        """α ε - σ x0, which Salimans and Ho (arXiv 2202.00512) call v; not the velocity of the path."""
        alpha, sigma, _, _ = self._at(t, x0, noise)
        return alpha * noise - sigma * x0

    def x0_from_velocity(self, x_t: Tensor, v: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """x0 from x_t and v."""
        alpha, sigma, alpha_dot, sigma_dot = self._at(t, x_t, v)
        return (sigma_dot * x_t - sigma * v) / (alpha * sigma_dot - alpha_dot * sigma)

    def noise_from_velocity(self, x_t: Tensor, v: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """ε from x_t and v."""
        alpha, sigma, alpha_dot, sigma_dot = self._at(t, x_t, v)
        return (alpha * v - alpha_dot * x_t) / (alpha * sigma_dot - alpha_dot * sigma)

    def x0_from_noise(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """x0 = (x_t - σ ε) / α; infinite where α is 0."""
        alpha, sigma, _, _ = self._at(t, x_t, noise)
        return (x_t - sigma * noise) / alpha

    def noise_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """ε = (x_t - α x0) / σ; infinite where σ is 0."""
        alpha, sigma, _, _ = self._at(t, x_t, x0)
        return (x_t - alpha * x0) / sigma

    def velocity_from_noise(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """v from x_t and ε; infinite where α is 0."""
        return self.velocity(self.x0_from_noise(x_t, noise, t), noise, t)

    def velocity_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """v from x_t and x0; infinite where σ is 0."""
        return self.velocity(x0, self.noise_from_x0(x_t, x0, t), t)

    def x0_from_vp_v(self, x_t: Tensor, v: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """x0 = (α x_t - σ v) / (α² + σ²) for v of :meth:`vp_v`."""
        alpha, sigma, _, _ = self._at(t, x_t, v)
        return (alpha * x_t - sigma * v) / (alpha.square() + sigma.square())

    def score(self, noise: Tensor, t: Tensor) -> Float[Tensor, "batch *shape"]:
        """∇ log p(x_t) = -ε / σ; infinite where σ is 0."""
        _, sigma, _, _ = self._at(t, noise, noise)
        return -noise / sigma

    def _at(self, t: Tensor, first: Tensor, second: Tensor) -> Coefficients:
        """The coefficients in the dtype of the samples, ready to be multiplied with them."""
        if first.shape != second.shape:
            raise ValueError(f"samples must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
        if t.shape != first.shape[:1]:
            raise ValueError(f"t must hold one time per sample, {tuple(first.shape[:1])}, got {tuple(t.shape)}")
        self.check_time(t)
        wide = torch.promote_types(first.dtype, torch.float32)
        shape = (-1,) + (1,) * (first.dim() - 1)
        return Coefficients(*(part.to(first.device, wide).reshape(shape) for part in self.coefficients(t)))


class VP(Path):
    r"""Variance-preserving diffusion in T steps: :math:`\alpha = \sqrt{\bar\alpha_t}, \sigma = \sqrt{1 - \bar\alpha_t}`.

    Time is an integer. Between steps log α is taken to be linear, which gives the derivatives.

    Args:
        betas: β_0 … β_{T-1}, each in (0, 1).
        network_scale: the network sees ``t * network_scale``; 1 for ADM and Stable Diffusion, ``1 / T`` where a network
            was trained on [0, 1].

    Raises:
        ValueError: no β, or one outside (0, 1).
    """

    def __init__(self, betas: Float[Tensor, " steps"], network_scale: float = 1.0) -> None:
        betas = torch.as_tensor(betas).detach().to("cpu", torch.float64)
        if betas.dim() != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be numbers in (0, 1), one per step, got shape {tuple(betas.shape)}")
        self.betas = betas
        self.alphas_bar = (1 - betas).cumprod(0)
        self.network_scale = network_scale

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02, **options: Any) -> VP:
        """With :func:`~headgate.nn.diffusion.linear_betas`, as DDPM and ADM."""
        return cls(linear_betas(steps, start, end), **options)

    @classmethod
    def scaled_linear(cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012, **options: Any) -> VP:
        """With :func:`~headgate.nn.diffusion.scaled_linear_betas`, as Stable Diffusion."""
        return cls(scaled_linear_betas(steps, start, end), **options)

    @classmethod
    def cosine(cls, steps: int = 1000, **options: Any) -> VP:
        """With :func:`~headgate.nn.diffusion.cosine_betas`."""
        return cls(cosine_betas(steps), **options)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.betas)

    def check_time(self, t: Tensor) -> None:
        """Refuse what is no integer in [0, T)."""
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must hold integer steps, got {t.dtype}")
        if t.numel() and not bool(((t >= 0) & (t < self.steps)).all()):
            raise ValueError(f"t must lie in 0..{self.steps - 1}, got {int(t.min())}..{int(t.max())}")

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :class:`Path`."""
        index = t.cpu().long()
        alpha_bar = self.alphas_bar[index]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        alpha_dot = alpha * torch.log1p(-self.betas[index]) / 2
        return Coefficients(alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma)

    def network_time(self, t: Tensor) -> Tensor:
        """``t`` times ``network_scale``; unscaled steps stay integers."""
        return t if self.network_scale == 1 else t * self.network_scale


class EDM(Path):
    r"""Variance-exploding path of Karras et al.: the time is σ itself, :math:`x = x_0 + \sigma\epsilon`.

    Args:
        sigma_data: deviation of the data.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data

    def check_time(self, t: Tensor) -> None:
        """Refuse what is not above 0."""
        _check_floating_time(t)
        if t.numel() and not bool((t > 0).all()):
            raise ValueError(f"t must be σ > 0, got {float(t.min())}")

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :class:`Path`."""
        t = t.double()
        return Coefficients(torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t))

    def network_time(self, t: Tensor) -> Tensor:
        """ln(σ) / 4."""
        return t.log() / 4

    def preconditioning(self, sigma: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in of D(x; σ) = c_skip x + c_out F(c_in x; ln(σ)/4) (table 1), each ``(batch,)``."""
        square = sigma.square() + self.sigma_data**2
        return self.sigma_data**2 / square, sigma * self.sigma_data * square.rsqrt(), square.rsqrt()


class _UnitPath(Path):
    def check_time(self, t: Tensor) -> None:
        """Refuse what lies outside [0, 1]."""
        _check_floating_time(t)
        if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"t must lie in [0, 1], got {float(t.min())}..{float(t.max())}")


class LinearFlow(_UnitPath):
    """Straight lines from data at t = 0 to noise at t = 1: α = 1 - t, σ = t (rectified flow, SiT)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :class:`Path`."""
        t = t.double()
        return Coefficients(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


class OTFlow(_UnitPath):
    """Straight lines from noise at t = 0 to data at t = 1: α = t, σ = 1 - (1 - σ_min) t (Lipman et al., equation 22).

    Args:
        sigma_min: noise that is left at the data, in [0, 1).
    """

    def __init__(self, sigma_min: float = 0.0) -> None:
        if not 0 <= sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), got {sigma_min}")
        self.sigma_min = sigma_min

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :class:`Path`."""
        t = t.double()
        slope = self.sigma_min - 1
        return Coefficients(t, 1 + slope * t, torch.ones_like(t), torch.full_like(t, slope))


class CosineFlow(_UnitPath):
    """A quarter circle from data at t = 0 to noise at t = 1: α = cos(πt/2), σ = sin(πt/2)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :class:`Path`."""
        angle = t.double() * (math.pi / 2)
        cos, sin = angle.cos(), angle.sin()
        return Coefficients(cos, sin, -sin * (math.pi / 2), cos * (math.pi / 2))


def path_from_scheduler(scheduler: Any) -> Path:
    """The path of a scheduler of diffusers, by its settings: ``alphas_cumprod``, or sigmas of a flow or of EDM.

    Args:
        scheduler: e.g. a ``DDPMScheduler``, ``DDIMScheduler``, ``DPMSolverMultistepScheduler``, ``EDMEulerScheduler`` or
            ``FlowMatchEulerDiscreteScheduler``. A flow's network sees 1000 t there, which the network has to do itself here.

    Raises:
        TypeError: none of these.
    """
    kind = type(scheduler).__name__
    if hasattr(scheduler, "betas") and hasattr(scheduler, "alphas_cumprod"):
        return VP(scheduler.betas)
    if kind.startswith("EDM"):
        return EDM(float(scheduler.config.sigma_data))
    if kind.startswith("FlowMatch"):
        return LinearFlow()
    raise TypeError(f"scheduler must have betas, or be an EDM or flow-matching scheduler of diffusers, got {kind}")


def _check_floating_time(t: Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(f"t must be floating point, got {t.dtype}")
