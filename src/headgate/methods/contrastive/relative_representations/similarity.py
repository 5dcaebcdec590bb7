"""Similarity of every item to every anchor (Moschella et al. 2023, Section 3).

With x an embedding and a_1 … a_K the anchors' embeddings, both of size d::

    cosine        x·a_k / (‖x‖ ‖a_k‖)
    inner         x·a_k / √d, or x·a_k where both are normalised
    basis_change  c minimising ‖Aᵀc - x‖, the one of least norm where K > d
    euclidean     -‖x - a_k‖₂
    l1            -‖x - a_k‖₁
    angular       1 - angle(x, a_k) / π

What a similarity is blind to, all spaces that differ by it share: rotations and reflections (all but ``l1``), the scale
(cosine, angular, basis change), an offset (euclidean, l1), and for a basis change without normalisation by anchors that
span the space every invertible linear map.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["SIMILARITIES", "Similarity", "check_similarity", "similarity_matrix", "unit_vectors"]

Similarity = Literal["cosine", "inner", "basis_change", "euclidean", "l1", "angular"]

SIMILARITIES: tuple[str, ...] = get_args(Similarity)
_OF_ANGLES = ("cosine", "angular")


def check_similarity(similarity: str, normalize: bool | None) -> bool:
    """Check a similarity and say whether its vectors are scaled to length 1 first.

    Args:
        similarity: one of :data:`SIMILARITIES`.
        normalize: scale items and anchors to length 1; ``None`` does so for cosine and angular alone.

    Raises:
        ValueError: an unknown similarity, or ``normalize=False`` for one that looks at angles only.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if similarity in _OF_ANGLES and normalize is False:
        raise ValueError(f"normalize must be True or None for similarity={similarity!r}, which looks at angles only")
    return similarity in _OF_ANGLES if normalize is None else normalize


def similarity_matrix(
    x: Float[Tensor, "items dim"], anchors: Float[Tensor, "anchors dim"], similarity: str, *, normalized: bool
) -> Float[Tensor, "items anchors"]:
    """Similarity of every item to every anchor.

    Args:
        x: ``(N, d)``, scaled to length 1 where ``normalized``.
        anchors: ``(K, d)``, likewise.
        similarity: one of :data:`SIMILARITIES`.
        normalized: whether they are; the inner product is divided by √d where they are not.

    Returns:
        ``(N, K)``. Distances and least squares are computed in float32 at least.
    """
    if similarity == "cosine" or (similarity == "inner" and normalized):
        return x @ anchors.mT
    if similarity == "inner":
        return x @ anchors.mT / math.sqrt(x.shape[-1])
    wide = torch.promote_types(torch.promote_types(x.dtype, anchors.dtype), torch.float32)
    items, references = x.to(wide), anchors.to(wide)
    if similarity == "basis_change":
        found = _coefficients(items, references)
    elif similarity == "angular":
        # The half-angle of unit vectors: unlike the arc cosine it is exact, with a bounded gradient, near 0 and π.
        half = torch.atan2(_distances(items, references, 2.0), _distances(items, -references, 2.0))
        found = 1 - half * (2 / math.pi)
    else:
        found = -_distances(items, references, 2.0 if similarity == "euclidean" else 1.0)
    return found.to(x.dtype)


def unit_vectors(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Scale vectors to length 1; a zero vector stays zero, with a finite gradient.

    Norms of half-precision vectors are taken in float32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The direction does not depend on this factor, so it needs no gradient; it keeps squares within range.
    largest = wide.detach().abs().amax(dim=-1, keepdim=True)
    scaled = wide / largest.masked_fill(largest == 0, 1)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return (scaled / norm.masked_fill(norm == 0, 1)).to(x.dtype)


def _coefficients(
    x: Float[Tensor, "items dim"], anchors: Float[Tensor, "anchors dim"]
) -> Float[Tensor, "items anchors"]:
    """Least-squares coordinates in the anchors, of least norm where they are not unique."""
    # Under autocast the products would run in half precision, which a least-squares solution does not stand.
    with torch.autocast(x.device.type, enabled=False):
        cutoff = max(anchors.shape) * torch.finfo(anchors.dtype).eps
        return x @ torch.linalg.pinv(anchors, rtol=cutoff)


def _distances(
    x: Float[Tensor, "items dim"], anchors: Float[Tensor, "anchors dim"], p: float
) -> Float[Tensor, "items anchors"]:
    return torch.cdist(x, anchors, p=p, compute_mode="donot_use_mm_for_euclid_dist")
