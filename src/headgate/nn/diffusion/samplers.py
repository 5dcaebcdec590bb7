r"""From noise to data: DDIM, Euler and Heun for the flow's ODE, Euler–Maruyama for its SDE, and EDM's sampler.

States are kept in float32 at least; all randomness comes from the generator that is given. Sources: DDIM (arXiv 2010.02502,
equation 12), SiT (arXiv 2401.08740, equation 4), EDM (arXiv 2206.00364, algorithm 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.nn.diffusion.losses import Predict, check_like
from headgate.nn.diffusion.paths import EDM, VP, Path
from headgate.validate import check_positive

__all__ = ["edm_sigmas", "sample_ddim", "sample_edm", "sample_ode", "sample_sde"]

_EDGE = 1e-5
"""Scores are not asked for nearer to the ends of [0, 1] than this."""


@torch.no_grad()
def sample_ddim(
    predict: Predict,
    path: VP,
    noise: Float[Tensor, "batch *shape"],
    steps: int = 50,
    eta: float = 0.0,
    *,
    generator: torch.Generator | None = None,
    clip: float | None = None,
) -> Float[Tensor, "batch *shape"]:
    """DDIM: every T/steps-th step from the noisiest one to data.

    Args:
        predict: (x, network times) → ε.
        path: with T steps.
        noise: the start.
        steps: must divide T; the steps taken are 0, T/steps, 2T/steps, … backwards (spacing "leading" in diffusers).
        eta: 0 is deterministic, 1 is DDPM's sampler on these steps.
        generator: of the noise for ``eta`` above 0.
        clip: bound of the predicted data, or none.

    Returns:
        Samples of the shape of ``noise``.

    Raises:
        ValueError: ``steps`` does not divide T, or ``eta`` outside [0, 1].
    """
    check_positive(steps=steps)
    if path.steps % steps:
        raise ValueError(f"steps must divide the path's {path.steps} steps, got {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    stride = path.steps // steps
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for index in reversed(range(steps)):
        time = index * stride
        t = torch.full(x.shape[:1], time, device=x.device)
        epsilon = check_like(x, predict(x, path.network_time(t)))
        x0 = path.x0_from_noise(x, epsilon, t)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            epsilon = path.noise_from_x0(x, x0, t)
        now = float(path.alphas_bar[time])
        then = float(path.alphas_bar[time - stride]) if index else 1.0
        fresh = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        x = then**0.5 * x0 + max(0.0, 1 - then - fresh**2) ** 0.5 * epsilon
        if fresh > 0:
            x = x + fresh * _normal(x, generator)
    return x


@torch.no_grad()
def sample_ode(
    velocity: Predict,
    start: Float[Tensor, "batch *shape"],
    times: Sequence[float],
    method: Literal["euler", "heun"] = "euler",
) -> Float[Tensor, "batch *shape"]:
    """Integrate dx/dt = v(x, t) along ``times``, e.g. from 1 to 0 for a flow whose noise lies at 1.

    Args:
        velocity: (x, t) → v.
        start: x at the first time.
        times: at least two, monotone.
        method: ``"euler"``, of order 1, or ``"heun"``, of order 2 with two calls a step.

    Returns:
        x at the last time.

    Raises:
        ValueError: fewer than two times, or an unknown method.
    """
    _check_times(times)
    if method not in ("euler", "heun"):
        raise ValueError(f"method must be 'euler' or 'heun', got {method!r}")
    x = start.to(torch.promote_types(start.dtype, torch.float32))
    for now, then in itertools.pairwise(times):
        slope = check_like(x, velocity(x, _fill(x, now)))
        ahead = x + (then - now) * slope
        if method == "heun":
            second = check_like(x, velocity(ahead, _fill(x, then)))
            ahead = x + (then - now) / 2 * (slope + second)
        x = ahead
    return x


@torch.no_grad()
def sample_sde(
    velocity: Predict,
    path: Path,
    start: Float[Tensor, "batch *shape"],
    times: Sequence[float],
    *,
    generator: torch.Generator | None = None,
    diffusion: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch *shape"]:
    r"""Euler–Maruyama for the SDE with the flow's marginals, towards data.

    .. math:: dx = (v - \tfrac12 w(t)\,\nabla\log p)\,dt + \sqrt{w(t)}\,d\bar W

    for time that falls; where data lie at 1 and time rises, the sign of the score's part turns. The last step adds no noise.

    Args:
        velocity: (x, t) → v.
        path: of the flow, on [0, 1].
        start: x at the first time.
        times: at least two, monotone.
        generator: of the noise.
        diffusion: w, from α-σ times ``(batch,)``; default 2 σ(t).

    Returns:
        x at the last time.

    Raises:
        ValueError: fewer than two times.
    """
    _check_times(times)
    x = start.to(torch.promote_types(start.dtype, torch.float32))
    for index, (now, then) in enumerate(itertools.pairwise(times)):
        t = _fill(x, min(max(now, _EDGE), 1 - _EDGE))
        v = check_like(x, velocity(x, t))
        score = path.score(path.noise_from_velocity(x, v, t), t)
        strength = 2 * path.coefficients(t).sigma if diffusion is None else diffusion(t)
        w = strength.to(x.device, x.dtype).reshape((-1,) + (1,) * (x.dim() - 1))
        x = x + (then - now) * v + abs(then - now) / 2 * w * score
        if index < len(times) - 2:
            x = x + (abs(then - now) * w).sqrt() * _normal(x, generator)
    return x


def edm_sigmas(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Float[Tensor, " steps_plus_1"]:
    """EDM's noise levels (equation 5) from ``high`` to ``low``, then 0; float64 ``(steps + 1,)``.

    Raises:
        ValueError: fewer than two steps, or levels that do not fall.
    """
    if steps < 2 or not 0 < low < high or rho <= 0:
        raise ValueError(
            f"steps must be at least 2, 0 < low < high and rho > 0, got steps={steps}, {low}, {high}, {rho}"
        )
    share = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    levels = (high ** (1 / rho) + share * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def sample_edm(
    predict: Predict,
    path: EDM,
    noise: Float[Tensor, "batch *shape"],
    sigmas: Sequence[float] | Tensor,
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, float("inf")),
    churn_noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *shape"]:
    """EDM's stochastic Heun sampler; without churn it is deterministic.

    Args:
        predict: the preconditioned network's F, as in :func:`~headgate.nn.diffusion.edm_loss`.
        path: holds σ_d.
        noise: of deviation 1; it is scaled to the first level.
        sigmas: levels that fall and end in 0, as of :func:`edm_sigmas`.
        churn: S_churn, how much noise is added over all steps.
        churn_range: S_tmin and S_tmax, the levels at which it is added.
        churn_noise: S_noise, its deviation.
        generator: of that noise.

    Returns:
        Samples of the shape of ``noise``.

    Raises:
        ValueError: levels that do not fall to 0.
    """
    levels = [float(level) for level in sigmas]
    if len(levels) < 2 or levels[-1] != 0 or any(a <= b for a, b in itertools.pairwise(levels)):
        raise ValueError(f"sigmas must fall strictly and end in 0, got {levels}")
    x = noise.to(torch.promote_types(noise.dtype, torch.float32)) * levels[0]

    def slope(x: Tensor, level: float) -> Tensor:
        sigma = _fill(x, level)
        shape = (-1,) + (1,) * (x.dim() - 1)
        skip, out, scale = (part.reshape(shape) for part in path.preconditioning(sigma))
        denoised = skip * x + out * check_like(x, predict(scale * x, path.network_time(sigma)))
        return (x - denoised) / level

    for now, then in itertools.pairwise(levels):
        gamma = min(churn / (len(levels) - 1), 2**0.5 - 1) if churn_range[0] <= now <= churn_range[1] else 0.0
        raised = now * (1 + gamma)
        if gamma > 0:
            x = x + (raised**2 - now**2) ** 0.5 * churn_noise * _normal(x, generator)
        first = slope(x, raised)
        ahead = x + (then - raised) * first
        if then > 0:
            ahead = x + (then - raised) / 2 * (first + slope(ahead, then))
        x = ahead
    return x


def _fill(x: Tensor, time: float) -> Tensor:
    return torch.full(x.shape[:1], time, device=x.device, dtype=x.dtype)


def _normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    place = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=place, dtype=x.dtype).to(x.device)


def _check_times(times: Sequence[float]) -> None:
    if len(times) < 2:
        raise ValueError(f"times must hold at least two times, got {list(times)}")
