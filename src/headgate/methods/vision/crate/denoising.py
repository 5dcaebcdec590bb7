"""The claim without a network: what one compression step does to noisy tokens, and what ISTA does to sparse signals.

Tokens of unit length lie in one of K orthonormal subspaces each, but for noise. A compression step that works moves energy
into a token's own subspace; tokens get unit length again behind it, because the factor 1 - κ alone lowers the rate of any
tokens against any subspaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headgate.data import portable_normal, stream_generator
from headgate.evaluate import subspace_coding_rate, token_coding_rate, zero_share
from headgate.methods.vision.crate.operators import ista_objective, ista_step, mssa_step

__all__ = [
    "STEPS",
    "Mixture",
    "SparseCoding",
    "Tokens",
    "code_signals",
    "draw_tokens",
    "energy_shares",
    "rates",
    "step",
    "unit",
]

STEPS = ("crate", "random_subspaces", "shrink", "uniform", "opposite")
"""The steps that are compared; the first one is the method's."""


@dataclass(frozen=True)
class Mixture:
    """How tokens are drawn and compressed.

    Attributes:
        num_subspaces: K.
        subspace_dim: p.
        dim: d, at least K p.
        num_tokens: N.
        noise: deviation of the noise per channel, beside signals of about unit length.
        kappa: κ of the step.
        logit_scale: factor of the logits.
        eps2: ε² of the rates.
    """

    num_subspaces: int = 4
    subspace_dim: int = 4
    dim: int = 32
    num_tokens: int = 256
    noise: float = 0.1
    kappa: float = 0.5
    logit_scale: float = 8.0
    eps2: float = 0.05


class Tokens(NamedTuple):
    """A draw.

    Attributes:
        z: tokens of unit length.
        bases: the subspaces that they come from.
        own: which one each token comes from.
        other_bases: random subspaces of the same shape.
    """

    z: Float[Tensor, "tokens dim"]
    bases: Float[Tensor, "heads dim head_dim"]
    own: Int64[Tensor, " tokens"]
    other_bases: Float[Tensor, "heads dim head_dim"]


@dataclass(frozen=True)
class SparseCoding:
    """How signals are drawn and coded: ``x = D s`` and noise, D orthonormal.

    Attributes:
        dim: channels and atoms.
        num_signals: signals.
        density: share of entries of s that are not zero; they are absolute values of normal numbers.
        noise: deviation of the noise per channel.
        steps: of ISTA.
        step_size: η.
        lambd: λ.
    """

    dim: int = 32
    num_signals: int = 256
    density: float = 0.1
    noise: float = 0.02
    steps: int = 30
    step_size: float = 0.1
    lambd: float = 0.1


def draw_tokens(mixture: Mixture, seed: int) -> Tokens:
    """Draw subspaces and tokens; float64."""
    generator = stream_generator(seed, "mixture")
    bases, other_bases = (_subspaces(mixture, generator) for _ in range(2))
    own = torch.randint(mixture.num_subspaces, (mixture.num_tokens,), generator=generator)
    coordinates = _normal((mixture.num_tokens, mixture.subspace_dim), generator) / mixture.subspace_dim**0.5
    signal = (bases[own] @ coordinates[:, :, None]).squeeze(-1)
    noise = mixture.noise * _normal((mixture.num_tokens, mixture.dim), generator)
    return Tokens(unit(signal + noise), bases, own, other_bases)


def step(name: str, tokens: Tokens, mixture: Mixture) -> Float[Tensor, "tokens dim"]:
    """One step of one of :data:`STEPS`, before tokens get unit length again."""
    z, kappa = tokens.z[None], mixture.kappa
    if name == "crate":
        moved = mssa_step(z, tokens.bases, kappa, logit_scale=mixture.logit_scale)
    elif name == "random_subspaces":
        moved = mssa_step(z, tokens.other_bases, kappa, logit_scale=mixture.logit_scale)
    elif name == "shrink":
        moved = (1 - kappa) * z
    elif name == "uniform":
        moved = mssa_step(z, tokens.bases, kappa, logit_scale=0.0)
    elif name == "opposite":
        moved = mssa_step(z, tokens.bases, -kappa, logit_scale=mixture.logit_scale)
    else:
        raise ValueError(f"name must be one of {', '.join(STEPS)}, got {name!r}")
    return moved[0]


def energy_shares(z: Float[Tensor, "tokens dim"], tokens: Tokens) -> tuple[float, float]:
    """The share of a token's energy in its own subspace, and in all of them; means over tokens."""
    energy = (z @ tokens.bases).square().sum(dim=-1) / z.square().sum(dim=-1)
    return float(energy[tokens.own, torch.arange(len(z))].mean()), float(energy.sum(dim=0).mean())


def rates(z: Float[Tensor, "tokens dim"], tokens: Tokens, eps2: float) -> tuple[float, float]:
    """Rᶜ of tokens against the true subspaces, and R - Rᶜ."""
    within = float(subspace_coding_rate(z, tokens.bases, eps2))
    return within, float(token_coding_rate(z, eps2, normalize=False)) - within


def unit(z: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
    """Give every token unit length."""
    return z / z.norm(dim=-1, keepdim=True)


def code_signals(coding: SparseCoding, seed: int, lambd: float) -> tuple[list[float], list[float]]:
    """Code signals by ISTA from z = y, as a layer does, but for many steps.

    Args:
        coding: signals and steps.
        seed: of the draw.
        lambd: λ of the coder and of its objective.

    Returns:
        The objective before the first step and behind every one, and the share of zeros behind every one.
    """
    generator = stream_generator(seed, "signals")
    dictionary = torch.linalg.qr(_normal((coding.dim, coding.dim), generator))[0]
    shape = (coding.num_signals, coding.dim)
    codes = _normal(shape, generator).abs() * (torch.rand(shape, generator=generator) < coding.density)
    y = codes @ dictionary.mT + coding.noise * _normal(shape, generator)
    z, objective, zeros = y, [float(ista_objective(y, y, dictionary, lambd))], []
    for _ in range(coding.steps):
        z = ista_step(z, y, dictionary, coding.step_size, lambd)
        objective.append(float(ista_objective(z, y, dictionary, lambd)))
        zeros.append(float(zero_share(z)))
    return objective, zeros


def _subspaces(mixture: Mixture, generator: torch.Generator) -> Float[Tensor, "heads dim head_dim"]:
    """K orthonormal bases from the columns of one QR decomposition."""
    columns = mixture.num_subspaces * mixture.subspace_dim
    basis = torch.linalg.qr(_normal((mixture.dim, columns), generator))[0]
    return basis.unflatten(1, (mixture.num_subspaces, mixture.subspace_dim)).permute(1, 0, 2).contiguous()


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, ...]:
    return portable_normal(shape, generator).double()
