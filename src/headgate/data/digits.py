"""The handwritten digits inside scikit-learn: 1,797 images of 8×8 pixels in 10 classes, no download.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the test part of it, which scikit-learn ships). A pixel counts the ink of 4×4 finer pixels: 0 to 16.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from headgate.data.seeding import splitmix64_array

__all__ = ["DigitImages", "load_digits_images"]

_MAX_INK = 16.0


class DigitImages(NamedTuple):
    """Images and their labels.

    Attributes:
        images: float32 of shape (count, 1, 8, 8).
        labels: int64 of shape (count,), the digits 0 to 9.
    """

    images: Float32[Tensor, "count 1 8 8"]
    labels: Int64[Tensor, " count"]


def load_digits_images(
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    test_size: int | float = 597,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> DigitImages:
    """Load one side of a stratified split of scikit-learn's digits.

    The split is decided by SplitMix64 hashes of (seed, index) and by whole numbers, so it is the same on every machine
    and with every library version.

    Args:
        split: ``"train"`` or ``"test"``; the two are disjoint and together hold all 1,797 images.
        seed: which of the possible splits.
        test_size: images of the test side (an integer), or their share in (0, 1); each class gives its share of them,
            rounded so that the sum is right.
        value_range: what no ink and full ink become, e.g. ``(-1.0, 1.0)`` for diffusion models.

    Returns:
        The images in scikit-learn's order.

    Raises:
        ValueError: an unknown split, a test size that leaves a class out of either side, or an empty value range.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    in_test = _stratified_test_mask(labels.astype(np.int64), seed, test_size)
    keep = in_test if split == "test" else ~in_test
    ink = torch.from_numpy(pixels[keep].reshape(-1, 1, 8, 8) / _MAX_INK)
    return DigitImages((low + (high - low) * ink).float(), torch.from_numpy(labels[keep].astype(np.int64)))


def _stratified_test_mask(labels: np.ndarray, seed: int, test_size: int | float) -> np.ndarray:
    """True for the images of the test side: in every class those with the smallest hashes."""
    classes, class_sizes = np.unique(labels, return_counts=True)
    count = round(test_size * len(labels)) if isinstance(test_size, float) else test_size
    exact = class_sizes * count  # in units of 1 / len(labels), so that the rounding is done on integers
    quotas = exact // len(labels)
    largest_remainders = np.argsort(-(exact % len(labels)), kind="stable")[: count - quotas.sum()]
    quotas[largest_remainders] += 1
    if (quotas < 1).any() or (quotas >= class_sizes).any():
        raise ValueError(
            f"test_size must leave every one of {len(classes)} classes an image on both sides of {len(labels)} images, "
            f"got test_size={test_size}"
        )
    hashes = splitmix64_array(np.arange(len(labels)), seed)
    mask = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        mask[members[np.argsort(hashes[members], kind="stable")[:quota]]] = True
    return mask
