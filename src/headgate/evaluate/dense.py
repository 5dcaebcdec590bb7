"""The dense probe: a linear map on patch or pixel features, scored as a segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate.checks import Array, as_seed, check_count, check_finite, to_numpy
from headgate.evaluate.features import Split
from headgate.evaluate.logistic import LogisticModel, fit_logistic
from headgate.evaluate.probe_data import Scaler, Scaling, absent_classes, choose
from headgate.evaluate.probes import C_GRID

__all__ = ["DenseProbeResult", "MeanIoU", "dense_probe", "mean_iou"]


class MeanIoU(NamedTuple):
    """Overlap of a segmentation with the truth, pooled over all pixels.

    Attributes:
        mean_iou: mean of ``intersection / union`` over the classes in the truth or the prediction; classes in neither
            have no overlap and are skipped.
        pixel_accuracy: share of pixels that are right.
        per_class: class → its overlap.
    """

    mean_iou: float
    pixel_accuracy: float
    per_class: dict[int, float]


@dataclass(frozen=True)
class DenseProbeResult:
    """A linear segmentation on the test images.

    Attributes:
        mean_iou: see :class:`MeanIoU`.
        pixel_accuracy: share of pixels that are right.
        per_class: class → its overlap.
        predictions: labels, in the shape of ``y[split.test]``.
        C: the chosen regularisation.
        converged: whether the solver ended by itself.
        absent: classes of the test images that training never saw.
    """

    mean_iou: float
    pixel_accuracy: float
    per_class: dict[int, float]
    predictions: Int[np.ndarray, test * places]
    C: float
    converged: bool
    absent: tuple[int, ...]


def mean_iou(y_true: Int[Array, "*places"], y_pred: Int[Array, "*places"], *, ignore: int | None = None) -> MeanIoU:
    """Return mean intersection over union and pixel accuracy of integer label maps.

    Args:
        y_true: labels of any shape.
        y_pred: predicted labels of that shape.
        ignore: label of ``y_true`` whose pixels are left out.

    Raises:
        TypeError: labels are not integers.
        ValueError: shapes differ, or no pixel is left.
    """
    truth, found = to_numpy("y_true", y_true), to_numpy("y_pred", y_pred)
    if truth.dtype.kind not in "iu" or found.dtype.kind not in "iu":
        raise TypeError(f"y_true and y_pred must hold integers, got {truth.dtype} and {found.dtype}")
    if truth.shape != found.shape:
        raise ValueError(f"y_true and y_pred must have one shape, got {truth.shape} and {found.shape}")
    kept = np.ones(truth.shape, dtype=bool) if ignore is None else truth != ignore
    truth, found = truth[kept], found[kept]
    if truth.size == 0:
        raise ValueError("y_true must hold at least one pixel that is not ignored, got none")
    classes, codes = np.unique(np.concatenate([truth, found]), return_inverse=True)
    true_codes, found_codes = codes[: truth.size], codes[truth.size :]
    hits = np.bincount(true_codes[true_codes == found_codes], minlength=len(classes))
    union = np.bincount(true_codes, minlength=len(classes)) + np.bincount(found_codes, minlength=len(classes)) - hits
    overlaps = hits / union
    per_class = {int(label): float(overlap) for label, overlap in zip(classes, overlaps, strict=True)}
    return MeanIoU(float(overlaps.mean()), float((truth == found).mean()), per_class)


def dense_probe(
    X: Float[Array, "n *places dim"],
    y: Int[Array, n * places],
    split: Split,
    *,
    C: Sequence[float] = C_GRID,
    scaling: Scaling = "standardize",
    ignore: int | None = None,
    max_pixels: int = 50_000,
    max_iter: int = 1000,
    seed: int = 0,
) -> DenseProbeResult:
    """Fit logistic regression on single patches or pixels and segment the test images with it.

    Args:
        X: ``(N, ..., d)`` features of every place of N images, e.g. ``(N, patches, d)`` or ``(N, H, W, d)``.
        y: ``(N, ...)`` integer label of every place.
        split: of the images, so that no image gives both training and test pixels.
        C: inverse strengths of the regularisation; of several, the one with the best mean intersection over union on
            ``split.val`` is chosen.
        scaling: as in :func:`headgate.evaluate.linear_probe`.
        ignore: label whose places are neither fitted nor scored.
        max_pixels: training places to fit on, drawn by ``seed`` where there are more.
        max_iter: iterations after which the solver gives up.
        seed: of the draw.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, fewer than two training classes, or several ``C`` without validation images.
    """
    features, labels = to_numpy("X", X), to_numpy("y", y)
    if features.ndim < 3 or 0 in features.shape:
        raise ValueError(f"X must have shape (n, ..., dim) with places, none of them 0, got {features.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"y must hold integers, got dtype {labels.dtype}")
    if labels.shape != features.shape[:-1]:
        raise ValueError(f"y must have one label per place, shape {features.shape[:-1]}, got {labels.shape}")
    check_finite("X", features)
    split.check(len(features))
    if len(C) == 0 or not all(0 < value < np.inf for value in C):
        raise ValueError(f"C must be positive, one number or several, got {list(C)}")
    if len(C) > 1 and len(split.val) == 0:
        raise ValueError("split must have validation images to choose C on, got none")
    rows, targets = _pixels(features, labels, split.train, ignore)
    limit = check_count("max_pixels", max_pixels)
    if len(rows) > limit:
        drawn = np.sort(np.random.default_rng(as_seed("seed", seed)).choice(len(rows), limit, replace=False))
        rows, targets = rows[drawn], targets[drawn]
    classes = np.unique(targets)
    if len(classes) < 2:
        raise ValueError(f"y must hold at least two classes to train on, got {classes.tolist()}")
    scaler = Scaler.fit(rows, np.arange(len(rows)), scaling)
    scaled = scaler(rows)

    def segment(model: LogisticModel, images: Int[np.ndarray, " m"]) -> Int[np.ndarray, m * places]:
        return np.stack([model.classes[model.decide(scaler(features[image])).argmax(axis=-1)] for image in images])

    def overlap(value: float) -> float:
        model = fit_logistic(scaled, targets, value, max_iter=max_iter)
        return mean_iou(labels[split.val], segment(model, split.val), ignore=ignore).mean_iou

    chosen = choose(sorted(C), overlap)[0] if len(C) > 1 else float(C[0])
    model = fit_logistic(scaled, targets, chosen, max_iter=max_iter)
    predictions = segment(model, split.test)
    truth = labels[split.test]
    scores = mean_iou(truth, predictions, ignore=ignore)
    absent = absent_classes(truth[truth != ignore] if ignore is not None else truth.ravel(), classes)
    return DenseProbeResult(*scores, predictions, chosen, model.converged, absent)


def _pixels(
    features: Float[np.ndarray, "n *places dim"],
    labels: Int[np.ndarray, n * places],
    images: Int[np.ndarray, " m"],
    ignore: int | None,
) -> tuple[Float[np.ndarray, "pixels dim"], Int[np.ndarray, " pixels"]]:
    rows = features[images].reshape(-1, features.shape[-1])
    targets = labels[images].ravel()
    kept = np.ones(len(targets), dtype=bool) if ignore is None else targets != ignore
    return rows[kept], targets[kept]
