r"""The two steps of a white-box layer as they are derived, on given subspaces and a given dictionary.

Yu et al., "White-Box Transformers via Sparse Rate Reduction" (arXiv 2311.13110); tokens are rows here. *Compression*
(multi-head subspace self-attention) is an approximate gradient step on Rᶜ(Z; U),

.. math:: Z \leftarrow (1 - κ) Z + κ \sum_k \operatorname{softmax}\bigl((Z U_k)(Z U_k)^\top\bigr) Z U_k U_k^\top ,

with the paper's factor p/(N ε²) inside κ. *Sparsification* is a proximal gradient step on
½‖Y - D Z‖² + λ‖Z‖₁ (ISTA) over Z ≥ 0,

.. math:: Z \leftarrow \operatorname{ReLU}\bigl(Z + η D^\top (Y - D Z) - η λ\bigr).

The layers :class:`~headgate.methods.vision.crate.attention.MSSA` and :class:`~headgate.methods.vision.crate.ista.ISTA`
learn U and D.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["check_step_size", "ista_objective", "ista_step", "mssa_step", "soft_threshold"]


def mssa_step(
    z: Float[Tensor, "batch tokens dim"],
    bases: Float[Tensor, "heads dim head_dim"],
    step: float = 0.5,
    *,
    logit_scale: float = 1.0,
) -> Float[Tensor, "batch tokens dim"]:
    """Compress tokens towards K subspaces: one step.

    Args:
        z: ``(batch, N, d)``.
        bases: U ``(K, d, p)``; the derivation has orthonormal columns.
        step: κ; the paper's own step is 0 < κ < 1, a negative one compresses away from the subspaces.
        logit_scale: factor of the logits. With tokens of unit length the softmax over many tokens is almost uniform at 1.

    Returns:
        ``(batch, N, d)``.

    Raises:
        TypeError: not floating point, or of two dtypes.
        ValueError: shapes do not fit.
    """
    check_shape("z", z, (None, None, None), "batch, tokens, dim")
    check_floating("z", z)
    check_shape("bases", bases, (None, z.shape[-1], None), "heads, dim, head_dim")
    check_floating("bases", bases, like=z.dtype)
    projected = z.unsqueeze(1) @ bases
    weights = (logit_scale * projected @ projected.mT).softmax(dim=-1)
    pulled = (weights @ projected @ bases.mT).sum(dim=1)
    return (1 - step) * z + step * pulled


def ista_step(
    z: Float[Tensor, "*batch atoms"],
    y: Float[Tensor, "*batch dim"],
    dictionary: Float[Tensor, "dim atoms"],
    step_size: float = 0.1,
    lambd: float = 0.1,
    *,
    nonnegative: bool = True,
) -> Float[Tensor, "*batch atoms"]:
    """One proximal gradient step on ``½‖y - D z‖² + λ‖z‖₁``.

    Args:
        z: where the step starts, ``(..., atoms)``; the layer starts at ``y``.
        y: what is coded, ``(..., d)``.
        dictionary: D ``(d, atoms)``.
        step_size: η, positive; the objective falls for certain up to 1/‖D‖² (see :func:`check_step_size`).
        lambd: λ, at least 0.
        nonnegative: whether codes must be non-negative; without, both signs are thresholded.

    Returns:
        ``(..., atoms)``.

    Raises:
        ValueError: shapes do not fit, ``step_size`` not positive, or ``lambd`` negative.
    """
    check_positive(step_size=step_size)
    check_shape("dictionary", dictionary, (y.shape[-1], z.shape[-1]), "dim, atoms")
    return soft_threshold(z + step_size * (y - z @ dictionary.mT) @ dictionary, step_size * lambd, nonnegative)


def soft_threshold(x: Tensor, threshold: float, nonnegative: bool = True) -> Tensor:
    """The proximal map of ``threshold · ‖·‖₁``: ``relu(x - threshold)``, or the same on both sides of zero.

    Raises:
        ValueError: ``threshold`` is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if nonnegative:
        return torch.relu(x - threshold)
    return torch.relu(x - threshold) - torch.relu(-x - threshold)


def ista_objective(
    z: Float[Tensor, "*batch atoms"],
    y: Float[Tensor, "*batch dim"],
    dictionary: Float[Tensor, "dim atoms"],
    lambd: float = 0.1,
) -> Float[Tensor, ""]:
    """``½‖y - D z‖² + λ‖z‖₁``, added up over all tokens.

    Args:
        z: codes ``(..., atoms)``.
        y: what is coded, ``(..., d)``.
        dictionary: D ``(d, atoms)``.
        lambd: λ.

    Raises:
        ValueError: shapes do not fit.
    """
    check_shape("dictionary", dictionary, (y.shape[-1], z.shape[-1]), "dim, atoms")
    return (y - z @ dictionary.mT).square().sum() / 2 + lambd * z.abs().sum()


def check_step_size(step_size: float, dictionary: Float[Tensor, "dim atoms"]) -> None:
    """Check that ISTA with this dictionary converges: η < 2/‖D‖², with the spectral norm.

    Up to 1/‖D‖² every step lowers the objective for certain; beyond 2/‖D‖² the steps overshoot and the objective grows.
    It reads the dictionary's values, so it is called by hand, e.g. after an epoch.

    Args:
        step_size: η.
        dictionary: D ``(d, atoms)``.

    Raises:
        ValueError: η is too large.
    """
    check_shape("dictionary", dictionary, (None, None), "dim, atoms")
    check_positive(step_size=step_size)
    wide = dictionary.detach().to(torch.promote_types(dictionary.dtype, torch.float32))
    limit = 2 / float(torch.linalg.matrix_norm(wide, ord=2)) ** 2 if wide.any() else float("inf")
    if step_size >= limit:
        raise ValueError(
            f"step_size must be below 2/‖D‖² = {limit:.4g} for this dictionary, got step_size={step_size}: "
            "every step would raise the objective"
        )
