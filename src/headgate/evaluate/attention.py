"""How do the heads of a vision transformer attend: near or far, by query or not, sharply or broadly?

For the attention A of one image and head, rows summing to 1 over keys (diagnostics of Shi et al. 2024, arXiv
2306.15876, after Xie et al. 2023 and Park et al. 2023):

- distance: ``mean_q Σ_k A_qk ‖pos_q - pos_k‖``; heads that have collapsed all sit at the value of uniform attention;
- NMI of query and key: with ``p(q) = 1/N``, ``p(k) = Σ_q A_qk / N``,
  ``I = Σ_qk (A_qk / N) log(A_qk / p(k))`` and ``NMI = I / sqrt(H(q) H(k))``: 0 if all queries attend alike, 1 if they
  attend one to one;
- entropy: ``mean_q -Σ_k A_qk log A_qk``.

Each is averaged over images, per head, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headgate.evaluate.checks import Array, check_count, check_finite
from headgate.evaluate.undefined import undefined
from headgate.validate import check_positive

__all__ = ["attention_distance", "attention_entropy", "attention_nmi"]

_ROW_SUM_TOLERANCE = 0.02  # the rounding of softmax in bfloat16


def attention_distance(
    attention: Float[Array, "*image heads n n"],
    grid: tuple[int, int],
    *,
    patch_size: float = 1.0,
    prefix_tokens: int = 0,
    chunk: int = 16,
) -> Float[np.ndarray, " heads"]:
    """Mean distance between a patch and what it attends to, per head.

    Args:
        attention: ``(…, heads, N, N)`` probabilities; axes before the heads are averaged over.
        grid: rows and columns of patches, in raster order; ``N = rows · columns + prefix_tokens``.
        patch_size: side of a patch, in the unit of the result: 1 gives patches, 16 pixels of a ViT-B/16.
        prefix_tokens: class and register tokens in front of the patches. They have no position: as queries they are
            left out, and what patches attend to them is left out of the mean.
        chunk: images per block; the values do not depend on it.

    Returns:
        ``(heads,)``. A patch that attends to prefix tokens alone has no distance and is left out of the mean; a head
        in which all do is nan, with a warning.

    Raises:
        TypeError: no array of floating point.
        ValueError: NaN or infinity, negative values, rows that do not sum to 1, or sizes that do not fit.
    """
    check_positive(patch_size=patch_size)
    rows, columns = (check_count("grid", size) for size in grid)
    check_count("prefix_tokens", prefix_tokens, low=0)
    tokens = rows * columns + prefix_tokens
    images = _images(attention)
    if tuple(images.shape[-2:]) != (tokens, tokens):
        raise ValueError(
            f"attention must have shape (…, heads, {tokens}, {tokens}) for grid={tuple(grid)} and "
            f"prefix_tokens={prefix_tokens}, got {tuple(attention.shape)}"
        )
    row, column = np.divmod(np.arange(rows * columns), columns)
    distance = np.hypot(row[:, None] - row, column[:, None] - column) * patch_size

    def per_head(weights: np.ndarray) -> np.ndarray:
        weights = weights[..., prefix_tokens:, prefix_tokens:]
        mass = weights.sum(axis=-1)
        moment = (weights * distance).sum(axis=-1)
        seen = mass > 0
        value = np.divide(moment, mass, out=np.zeros_like(mass), where=seen)
        return np.stack([value.sum(axis=(0, 2)), seen.sum(axis=(0, 2))])

    total, count = _accumulate(images, per_head, chunk)
    if (count == 0).any():
        undefined(
            "attention_distance", f"all patches of head {int((count == 0).argmax())} attend to prefix tokens alone"
        )
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def attention_nmi(attention: Float[Array, "*image heads query key"], *, chunk: int = 16) -> Float[np.ndarray, " heads"]:
    """Normalised mutual information of query position and key position, per head.

    Args:
        attention: ``(…, heads, N, N)`` probabilities; axes before the heads are averaged over. To leave out class
            tokens, cut them off and divide by the new row sums first.
        chunk: images per block; the values do not depend on it.

    Returns:
        ``(heads,)`` in [0, 1]; 0 by definition where all attention lies on one key, or there is one query.

    Raises:
        TypeError: no array of floating point.
        ValueError: NaN or infinity, negative values, or rows that do not sum to 1.
    """

    def per_head(weights: np.ndarray) -> np.ndarray:
        num_queries = weights.shape[-2]
        of_key = weights.mean(axis=-2)  # p(k)
        # I = H(k) - H(k | q)
        key_entropy = _entropy(of_key)
        information = (key_entropy - _entropy(weights).mean(axis=-1)).clip(min=0)
        scale = np.sqrt(key_entropy * np.log(num_queries))
        # The entropy of one key taking all is 0 up to the rounding of its probability.
        defined = scale > 1e-12
        return np.divide(information, scale, out=np.zeros_like(scale), where=defined).clip(max=1).sum(axis=0)[None]

    images = _images(attention)
    return _accumulate(images, per_head, chunk)[0] / len(images)


def attention_entropy(
    attention: Float[Array, "*image heads query key"], *, chunk: int = 16
) -> Float[np.ndarray, " heads"]:
    """Mean entropy of the attention of a query, per head, in nats.

    Args:
        attention: ``(…, heads, N, N)`` probabilities; axes before the heads are averaged over.
        chunk: images per block; the values do not depend on it.

    Returns:
        ``(heads,)`` from 0 (every query attends to one key) to log N (uniform).

    Raises:
        TypeError: no array of floating point.
        ValueError: NaN or infinity, negative values, or rows that do not sum to 1.
    """

    def per_head(weights: np.ndarray) -> np.ndarray:
        return _entropy(weights).mean(axis=-1).sum(axis=0)[None]

    images = _images(attention)
    return _accumulate(images, per_head, chunk)[0] / len(images)


def _images(attention: Array) -> Array:
    """Check dtype and shape and hand the attention on as ``(image, heads, query, key)``."""
    if not isinstance(attention, np.ndarray | Tensor):
        raise TypeError(f"attention must be a NumPy array or a torch tensor, got {type(attention).__name__}")
    is_float = attention.is_floating_point() if isinstance(attention, Tensor) else attention.dtype.kind == "f"
    if not is_float:
        raise TypeError(f"attention must be floating point, got {attention.dtype}")
    if attention.ndim < 3 or 0 in attention.shape:
        raise ValueError(
            f"attention must have shape (…, heads, query, key), none of them 0, got {tuple(attention.shape)}"
        )
    return attention.reshape(-1, *attention.shape[-3:])


def _accumulate(images: Array, per_head: Callable[[np.ndarray], np.ndarray], chunk: int) -> np.ndarray:
    """Check the values block by block and add up ``per_head``, a function from images to ``(values, heads)``."""
    check_count("chunk", chunk)
    check_finite("attention", images)
    parts = []
    for start in range(0, len(images), chunk):
        block = images[start : start + chunk]
        weights = block.detach().to("cpu", torch.float64).numpy() if isinstance(block, Tensor) else block.astype(float)
        if weights.min() < 0:
            raise ValueError(f"attention must not be negative, got {weights.min():g}; give it after the softmax")
        sums = weights.sum(axis=-1, keepdims=True)
        worst = float(sums.flat[np.abs(sums - 1).argmax()])
        if abs(worst - 1) > _ROW_SUM_TOLERANCE:
            raise ValueError(f"attention must sum to 1 over keys, got a row with sum {worst:g}")
        parts.append(per_head(weights / sums))
    return np.sum(parts, axis=0)


def _entropy(p: Float[np.ndarray, "*axes outcome"]) -> Float[np.ndarray, "*axes"]:
    """Entropy over the last axis in nats, with ``0 log 0 = 0``."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
