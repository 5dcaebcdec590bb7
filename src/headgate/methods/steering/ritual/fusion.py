"""One next-token score out of several views of the input, and the tokens that the original view finds plausible.

A model gives logits ``l_t(V)`` for the next token from the original image V, and ``l_t(V')`` from other views of it, always
after the same prefix. With weights for all of them::

    RITUAL   z = l + alpha l^T                            alpha = 3     T: a randomly transformed image
    VCD      z = (1 + alpha) l - alpha l^noise            alpha = 1     contrastive decoding against a noised image
    M3ID     z = l + (l - l^noimage) (1 - g_t) / g_t      g_t = exp(-0.02 t), t = 0, 1, ...
    guidance z = (1 + s) l - s l^unconditional

Several of them add up in their deviations from ``l``: ``z = l + alpha l^T + alpha' (l - l^noise)``. Tokens with
``l < log(beta) + max l`` (beta = 0.1: a tenth of the best token's probability) get minus infinity, whatever the views say.

Woo et al., "RITUAL: Random Image Transformations as a Universal Anti-hallucination Lever in LVLMs", arXiv 2405.17821; VCD:
Leng et al., arXiv 2311.16922; M3ID: Favero et al., arXiv 2403.14003.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headgate.validate import check_floating, check_shape

__all__ = ["WEIGHTS", "fuse_logits", "m3id_weight", "plausible", "view_weights"]

Weight = float | Callable[[int], float]


def fuse_logits(
    base: Float[Tensor, "batch vocabulary"],
    views: Sequence[Float[Tensor, "batch vocabulary"]],
    weights: Sequence[float],
    plausibility: float | None = 0.1,
    *,
    normalize: bool = False,
) -> Float[Tensor, "batch vocabulary"]:
    """Add the weighted logits of all views, and leave the tokens that the original view finds implausible out.

    Args:
        base: logits of the original view. Entries of minus infinity, from processors that came before, stay so.
        views: logits of the other views, after the same prefix.
        weights: one of the base, then one of each view: ``(1, 3)`` is RITUAL, ``(2, -1)`` VCD, ``(1 + s, -s)`` guidance.
        plausibility: β in (0, 1]: tokens with ``base < log β + max base`` get minus infinity; None keeps them all.
        normalize: whether to divide by the sum of the weights, so that a temperature means what it did without views.

    Returns:
        Scores in float32, in float64 where the base is.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: shapes that differ, NaN or infinite logits, β outside (0, 1], a negative weight without a plausibility
            mask (what no view makes likely would then win), or weights that cannot be normalised.
    """
    check_shape("base", base, (None, None), "batch, vocabulary")
    check_floating("base", base)
    if len(weights) != len(views) + 1:
        raise ValueError(f"weights must hold one of the base and one of each view, got {len(weights)} for {len(views)}")
    if plausibility is None and any(weight < 0 for weight in weights):
        raise ValueError(f"plausibility must be given where a weight is negative, got weights={tuple(weights)}")
    exact = base.to(torch.promote_types(base.dtype, torch.float32))
    kept = exact != -math.inf
    if not bool((exact.isfinite() | ~kept).all() & kept.any(dim=-1).all()):
        raise ValueError("base must have a finite logit in every row, and no NaN nor plus infinity")
    scores = weights[0] * exact
    for index, (view, weight) in enumerate(zip(views, weights[1:], strict=True)):
        check_shape(f"views[{index}]", view, tuple(base.shape), "batch, vocabulary")
        check_floating(f"views[{index}]", view)
        other = view.to(exact)
        if not bool((other.isfinite() | ~kept).all()):
            raise ValueError(f"views[{index}] must be finite wherever base is")
        scores = scores + weight * other
    if normalize:
        total = math.fsum(weights)
        if not total > 0:
            raise ValueError(f"weights must have a positive sum to be normalised, got {tuple(weights)}")
        scores = scores / total
    if plausibility is not None:
        kept = kept & plausible(exact, plausibility)
    return scores.masked_fill(~kept, -math.inf)


def plausible(logits: Float[Tensor, "*batch vocabulary"], threshold: float = 0.1) -> Bool[Tensor, "*batch vocabulary"]:
    """Tell the tokens with at least ``threshold`` times the best token's probability; the best one always is one.

    Args:
        logits: of one view, or log-probabilities.
        threshold: β in (0, 1].

    Raises:
        ValueError: ``threshold`` lies outside (0, 1].
    """
    _check_threshold(threshold)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact >= math.log(threshold) + exact.amax(dim=-1, keepdim=True)


def m3id_weight(decay: float = 0.02) -> Callable[[int], float]:
    """The weight of the view without an image, which grows with every token: ``-(1 - g_t) / g_t`` with ``g_t = exp(-decay t)``.

    Args:
        decay: per token, positive; the first token (t = 0) is the plain model's.

    Returns:
        Step t → weight, 0 or negative.

    Raises:
        ValueError: ``decay`` is not positive.
    """
    if not decay > 0:
        raise ValueError(f"decay must be positive, got {decay}")
    return lambda step: -math.expm1(decay * step)


WEIGHTS: dict[str, Weight] = {"ritual": 3.0, "vcd": -1.0, "m3id": m3id_weight()}
"""The published weight of a transformed view, of a noised one, and of one without an image."""


def view_weights(views: Sequence[Weight], step: int) -> tuple[float, ...]:
    """What :func:`fuse_logits` takes at one step: a negative weight adds as much to the base as it takes from the view.

    Args:
        views: a weight for each view, positive where it is added (RITUAL), negative where the base is contrasted with it
            (VCD), or a function of the step (M3ID).
        step: t, the number of tokens generated so far.
    """
    numbers = [float(weight(step)) if callable(weight) else float(weight) for weight in views]
    return 1.0 - math.fsum(min(0.0, number) for number in numbers), *numbers


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"plausibility must lie in (0, 1], got {threshold}")
