"""Do two latent spaces speak the same language? Stitching, latent communication and linear translation.

*Stitching* (Lenc and Vedaldi 2015; Moschella et al. 2023, arXiv 2209.15430) feeds the encoder of one model to the head
of another: ``S[i, j]`` is the score of head j on encoder i. Spaces that were trained apart need a translation, fitted
on *anchors*, items that every encoder has seen: :class:`Relative` describes each item by its similarities to them,
:class:`Procrustes` rotates one space onto the other, :class:`Affine` is the least-squares map and the upper control,
and :class:`Shuffled` breaks the pairing of the anchors, the lower control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.evaluate.blocks import centred, unit_rows
from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_features,
    as_labels,
    as_seed,
    check_choice,
    check_count,
    check_same_length,
    check_same_width,
    to_numpy,
)
from headgate.evaluate.search import search
from headgate.evaluate.similarity import neighbour_overlap
from headgate.evaluate.undefined import undefined

__all__ = [
    "Affine",
    "LinearMap",
    "Procrustes",
    "Relative",
    "Shuffled",
    "StitchingMatrix",
    "Translation",
    "affine",
    "latent_communication",
    "procrustes",
    "stitching_matrix",
]

Metric: TypeAlias = Literal["accuracy", "mse"] | Callable[[Any, Any], float]


@dataclass(frozen=True)
class LinearMap:
    """A map from one space to another: ``(Z - source_mean) @ matrix + target_mean``.

    Attributes:
        matrix: ``(d_x, d_y)``.
        source_mean: ``(d_x,)``.
        target_mean: ``(d_y,)``.
        residual: ``‖XW - Y‖² / ‖Y‖²`` of the centred items it was fitted on; 0 for a perfect map, 1 for none.
    """

    matrix: Float[np.ndarray, "dim_x dim_y"]
    source_mean: Float[np.ndarray, " dim_x"]
    target_mean: Float[np.ndarray, " dim_y"]
    residual: float

    def __call__(self, Z: Float[Array, "n dim_x"]) -> Float[np.ndarray, "n dim_y"]:
        """Map ``(N, d_x)`` to ``(N, d_y)``, float64.

        Raises:
            ValueError: another width than the one fitted on.
        """
        rows = as_features("Z", Z, dtype=np.float64)
        if rows.shape[1] != len(self.source_mean):
            raise ValueError(f"Z must have dim={len(self.source_mean)}, got shape {rows.shape}")
        return (rows - self.source_mean) @ self.matrix + self.target_mean


def procrustes(X: Float[Array, "n dim_x"], Y: Float[Array, "n dim_y"]) -> LinearMap:
    """The rotation (or reflection) of the centred X that comes closest to the centred Y.

    ``Q = U Vᵀ`` with ``U S Vᵀ = XᵀY`` minimises ``‖XQ - Y‖`` over orthogonal Q. Where the widths differ, the narrower
    space is padded with zeros: the residual is that of the padded problem, and ``matrix`` the part of Q between the
    two given spaces.

    Args:
        X: ``(N, d_x)`` features.
        Y: ``(N, d_y)`` features of the same items in the same order.

    Returns:
        The map. Its residual is nan, with a warning, if Y is constant.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, or different N.
    """
    x, y, x_mean, y_mean = _centred_pair(X, Y)
    dim_x, dim_y = x.shape[1], y.shape[1]
    dim = max(dim_x, dim_y)
    padded_x = np.pad(x, ((0, 0), (0, dim - dim_x)))
    padded_y = np.pad(y, ((0, 0), (0, dim - dim_y)))
    left, _, right = np.linalg.svd(padded_x.T @ padded_y)
    rotation = left @ right
    residual = _residual("procrustes", padded_x @ rotation, padded_y)
    return LinearMap(rotation[:dim_x, :dim_y], x_mean, y_mean, residual)


def affine(X: Float[Array, "n dim_x"], Y: Float[Array, "n dim_y"], ridge: float = 1e-3) -> LinearMap:
    """The linear map with offset from X to Y, by ridge regression: the most that a linear translation can do.

    Minimises ``‖XW - Y‖² + ridge · (‖X‖²_F / d_x) · ‖W‖²`` over centred X and Y; measured in the mean variance of X, the
    penalty does not depend on the scale of the space. The offset is not penalised.

    Args:
        X: ``(N, d_x)`` features.
        Y: ``(N, d_y)`` features of the same items in the same order.
        ridge: strength of the penalty, at least 0; 0 gives the minimum-norm least-squares map.

    Returns:
        The map. Its residual is nan, with a warning, if Y is constant.

    Raises:
        TypeError: X or Y is no array of real numbers.
        ValueError: NaN or infinity, different N, or ``ridge`` negative.
    """
    if not ridge >= 0:
        raise ValueError(f"ridge must be at least 0, got ridge={ridge}")
    x, y, x_mean, y_mean = _centred_pair(X, Y)
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    penalty = ridge * float((singular**2).sum()) / x.shape[1]
    cutoff = max(x.shape) * np.finfo(np.float64).eps * (singular[0] if len(singular) else 0.0)
    kept = singular > cutoff
    gain = np.zeros_like(singular)
    gain[kept] = singular[kept] / (singular[kept] ** 2 + penalty)
    matrix = right.T @ (gain[:, None] * (left.T @ y))
    return LinearMap(matrix, x_mean, y_mean, _residual("affine", x @ matrix, y))


def latent_communication(
    Z1: Float[Array, "n dim"],
    Z2: Float[Array, "n dim"],
    k: int = 10,
    *,
    zero: ZeroPolicy = "error",
    chunk: int = 1024,
) -> dict[str, float]:
    """How well vectors of the first space find their own items in the second (Moschella et al. 2023, section 4).

    The gallery is Z2, searched by cosine with the vectors of Z1; the reference for an item is what its own vector in
    Z2 finds there. Both lists may hold the item itself.

    Args:
        Z1: ``(N, d)`` vectors of N items in the space that asks.
        Z2: ``(N, d)`` vectors of the same items, same order, in the space that answers. Spaces of different width
            need a transform first (:func:`procrustes`, :class:`Relative`).
        k: length of the lists, at most N.
        zero: what a zero row, whose cosine is undefined, leads to: an error, or a similarity of 0 to every row.
        chunk: rows per block of the search; no value depends on it.

    Returns:
        ``jaccard``: mean of |found ∩ reference| / |found ∪ reference| over top-k sets; ``mrr``: mean of 1 / rank of
        the item itself, 0 beyond k; ``cosine``: mean cosine of an item's two vectors; ``l2``: their mean distance.

    Raises:
        TypeError: Z1 or Z2 is no array of real numbers.
        ValueError: NaN or infinity, different N or d, k out of range, or a zero row with ``zero="error"``.
    """
    first = as_features("Z1", Z1, dtype=np.float64)
    second = as_features("Z2", Z2, dtype=np.float64)
    n = check_same_length(Z1=first, Z2=second)
    check_same_width(Z1=first, Z2=second)
    k = check_count("k", k, high=n)
    unit_first, unit_second = unit_rows("Z1", first, zero), unit_rows("Z2", second, zero)
    found = search(unit_first, unit_second, k, metric="ip", chunk=chunk).ids
    reference = search(unit_second, unit_second, k, metric="ip", chunk=chunk).ids
    shared = neighbour_overlap(found, reference)
    hit = found == np.arange(n)[:, None]
    reciprocal = np.where(hit.any(axis=1), 1.0 / (hit.argmax(axis=1) + 1), 0.0)
    return {
        "jaccard": float((shared / (2 * k - shared)).mean()),
        "mrr": float(reciprocal.mean()),
        "cosine": float((unit_first * unit_second).sum(axis=1).mean()),
        "l2": float(np.linalg.norm(first - second, axis=1).mean()),
    }


class Translation(Protocol):
    """What stands between the encoder of one model and the head of another.

    Features and anchors are float64, ``(N, d)`` and ``(K, d)``; row k of all anchors is the same item.
    """

    def own(
        self, features: Float[np.ndarray, "n dim"], anchors: Float[np.ndarray, "anchors dim"]
    ) -> Float[np.ndarray, "n out"]:
        """What a head was trained on: the features of its own encoder."""
        ...

    def across(
        self,
        features: Float[np.ndarray, "n source"],
        source_anchors: Float[np.ndarray, "anchors source"],
        target_anchors: Float[np.ndarray, "anchors target"],
    ) -> Float[np.ndarray, "n out"]:
        """The features of another encoder, for a head that was trained on the target's."""
        ...


@dataclass(frozen=True)
class Relative:
    """Similarities to the anchors: the same in all spaces that differ by a rotation (and, with cosine, a scale).

    Heads are trained on relative representations of width K.

    Attributes:
        similarity: ``"cosine"``, or ``"inner"``: inner product over √d.
        center: subtract the mean of the anchors first, for spaces with an offset.
        zero: what a zero row leads to under ``"cosine"``: an error, or similarities of 0.
    """

    similarity: Literal["cosine", "inner"] = "cosine"
    center: bool = False
    zero: ZeroPolicy = "error"

    def __post_init__(self) -> None:
        check_choice("similarity", self.similarity, ("cosine", "inner"))

    def own(
        self, features: Float[np.ndarray, "n dim"], anchors: Float[np.ndarray, "anchors dim"]
    ) -> Float[np.ndarray, "n anchors"]:
        """Similarity of every item to every anchor."""
        if self.center:
            mean = anchors.mean(axis=0)
            features, anchors = features - mean, anchors - mean
        if self.similarity == "inner":
            return features @ anchors.T / np.sqrt(features.shape[1])
        return unit_rows("features", features, self.zero) @ unit_rows("anchors", anchors, self.zero).T

    def across(
        self,
        features: Float[np.ndarray, "n source"],
        source_anchors: Float[np.ndarray, "anchors source"],
        target_anchors: Float[np.ndarray, "anchors target"],
    ) -> Float[np.ndarray, "n anchors"]:
        """Similarity of every item to every anchor, both in the source space."""
        return self.own(features, source_anchors)


@dataclass(frozen=True)
class Procrustes:
    """Rotate the source space onto the target space by :func:`procrustes` on the anchors; heads read plain features."""

    def own(
        self, features: Float[np.ndarray, "n dim"], anchors: Float[np.ndarray, "anchors dim"]
    ) -> Float[np.ndarray, "n dim"]:
        """The features as they are."""
        return features

    def across(
        self,
        features: Float[np.ndarray, "n source"],
        source_anchors: Float[np.ndarray, "anchors source"],
        target_anchors: Float[np.ndarray, "anchors target"],
    ) -> Float[np.ndarray, "n target"]:
        """The rotated features."""
        return procrustes(source_anchors, target_anchors)(features)


@dataclass(frozen=True)
class Affine:
    """Map the source space to the target space by :func:`affine` on the anchors: the upper control.

    Attributes:
        ridge: strength of the penalty.
    """

    ridge: float = 1e-3

    def own(
        self, features: Float[np.ndarray, "n dim"], anchors: Float[np.ndarray, "anchors dim"]
    ) -> Float[np.ndarray, "n dim"]:
        """The features as they are."""
        return features

    def across(
        self,
        features: Float[np.ndarray, "n source"],
        source_anchors: Float[np.ndarray, "anchors source"],
        target_anchors: Float[np.ndarray, "anchors target"],
    ) -> Float[np.ndarray, "n target"]:
        """The mapped features."""
        return affine(source_anchors, target_anchors, self.ridge)(features)


@dataclass(frozen=True)
class Shuffled:
    """Another translation with the source's anchors in a random order: the lower control.

    Attributes:
        translation: the translation to break.
        seed: of the permutation.
    """

    translation: Translation
    seed: int = 0

    def own(
        self, features: Float[np.ndarray, "n dim"], anchors: Float[np.ndarray, "anchors dim"]
    ) -> Float[np.ndarray, "n out"]:
        """As the unbroken translation: within one space the order of the anchors is its own."""
        return self.translation.own(features, anchors)

    def across(
        self,
        features: Float[np.ndarray, "n source"],
        source_anchors: Float[np.ndarray, "anchors source"],
        target_anchors: Float[np.ndarray, "anchors target"],
    ) -> Float[np.ndarray, "n out"]:
        """The translation fitted on anchors that no longer correspond."""
        order = np.random.default_rng(as_seed("seed", self.seed)).permutation(len(source_anchors))
        return self.translation.across(features, source_anchors[order], target_anchors)


@dataclass(frozen=True)
class StitchingMatrix:
    """The result of :func:`stitching_matrix`.

    Attributes:
        scores: ``(M, M)``; row i, column j: the metric of head j on encoder i; nan where stitching is impossible.
        diagonal: mean over each head with its own encoder.
        off_diagonal: mean over the stitched pairs that are possible; nan if none is.
        ratio: ``off_diagonal / diagonal``; nan if the diagonal is 0.
        undefined: ``(i, j)`` → why that pair cannot be stitched.
    """

    scores: Float[np.ndarray, "model model"]
    diagonal: float
    off_diagonal: float
    ratio: float
    undefined: dict[tuple[int, int], str] = field(default_factory=dict)


def stitching_matrix(
    encoders: Sequence[Callable[[Any], Array]],
    heads: Sequence[Callable[[Any], Array]],
    X: Any,
    y: Array,
    metric: Metric = "accuracy",
    transform: Translation | None = None,
    anchors: Any = None,
) -> StitchingMatrix:
    """Score every head on every encoder.

    Modules run without gradients and in eval mode, and get their mode back. A head receives what its own encoder
    returns: NumPy, or a tensor of the same dtype and device.

    Args:
        encoders: M functions or modules from ``X`` to features ``(N, d_i)``.
        heads: M functions or modules; head j was trained on the features of encoder j, as ``transform`` gives them.
        X: the items, in whatever form the encoders take.
        y: the targets of the N items.
        metric: ``"accuracy"`` (heads return labels ``(N,)`` or class scores ``(N, C)``), ``"mse"`` (heads return values
            of the shape of ``y``), or a function of ``(y, output)``.
        transform: ``None`` hands features on as they are (absolute stitching), else :class:`Relative`,
            :class:`Procrustes`, :class:`Affine`, or one of them :class:`Shuffled`.
        anchors: the K anchor items, in the form of ``X``; needed by a transform.

    Returns:
        The matrix of scores and its summary. Without a transform a pair of encoders of different width is nan.

    Raises:
        TypeError: an encoder or head returns no array, or labels that are not integers.
        ValueError: numbers of encoders and heads differ or are below 2, ``anchors`` without ``transform`` or the
            reverse, an encoder returns NaN or another number of rows, or outputs and targets do not fit.
    """
    if len(encoders) != len(heads) or len(encoders) < 2:
        raise ValueError(
            f"encoders and heads must be of one number of at least 2, got {len(encoders)} encoders, {len(heads)} heads"
        )
    if (transform is None) != (anchors is None):
        given, lacking = ("anchors", "transform") if transform is None else ("transform", "anchors")
        raise ValueError(f"{given} needs {lacking}, got {lacking}=None")
    score = _score(metric)
    raw = [_run(encoder, X) for encoder in encoders]
    features = [as_features(f"features of encoder {i}", values, dtype=np.float64) for i, values in enumerate(raw)]
    check_same_length(y=y, **{f"encoder_{i}": rows for i, rows in enumerate(features)})
    references: list[np.ndarray] = []
    if transform is not None:
        references = [
            as_features(f"anchors of encoder {i}", _run(encoder, anchors), dtype=np.float64)
            for i, encoder in enumerate(encoders)
        ]
        check_same_length(**{f"anchors_of_encoder_{i}": rows for i, rows in enumerate(references)})
    scores = np.full((len(encoders), len(encoders)), np.nan)
    impossible: dict[tuple[int, int], str] = {}
    for i, rows in enumerate(features):
        for j, head in enumerate(heads):
            if transform is None:
                width, expected = rows.shape[1], features[j].shape[1]
                if width != expected:
                    impossible[i, j] = f"encoder {i} has dim={width}, head {j} expects dim={expected}"
                    continue
                seen = rows
            elif i == j:
                seen = transform.own(rows, references[i])
            else:
                seen = transform.across(rows, references[i], references[j])
            scores[i, j] = score(y, _run(head, _like(seen, raw[j])))
    stitched = scores[~np.eye(len(scores), dtype=bool)]
    diagonal = float(np.diag(scores).mean())
    off_diagonal = float(np.nanmean(stitched)) if np.isfinite(stitched).any() else float("nan")
    ratio = off_diagonal / diagonal if diagonal != 0 else float("nan")
    return StitchingMatrix(scores, diagonal, off_diagonal, ratio, impossible)


def _centred_pair(X: Array, Y: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = as_features("X", X, dtype=np.float64), as_features("Y", Y, dtype=np.float64)
    check_same_length(X=x, Y=y)
    (x, x_mean), (y, y_mean) = centred(x), centred(y)
    return x, y, x_mean, y_mean


def _residual(measure: str, fitted: Float[np.ndarray, "n dim"], target: Float[np.ndarray, "n dim"]) -> float:
    whole = float((target**2).sum())
    if whole == 0:
        return undefined(f"the residual of {measure}", "Y is constant")
    return float(((fitted - target) ** 2).sum()) / whole


def _run(function: Callable[[Any], Array], argument: Any) -> Array:
    with torch.no_grad(), _eval_mode(function):
        return function(argument)


@contextlib.contextmanager
def _eval_mode(function: Any) -> Iterator[None]:
    modes = {module: module.training for module in function.modules()} if isinstance(function, nn.Module) else {}
    try:
        if modes:
            function.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _like(values: Float[np.ndarray, "n dim"], example: Array) -> Array:
    """``values`` in the kind, dtype and device of ``example``."""
    if isinstance(example, Tensor):
        return torch.from_numpy(np.ascontiguousarray(values)).to(example)
    return values.astype(example.dtype if example.dtype.kind == "f" else np.float64)


def _score(metric: Metric) -> Callable[[Any, Any], float]:
    if callable(metric):
        return lambda y, output: float(metric(y, output))
    check_choice("metric", metric, ("accuracy", "mse"))
    return _accuracy if metric == "accuracy" else _mse


def _accuracy(y: Array, output: Array) -> float:
    """Share of right labels; of equal class scores the first counts."""
    predicted = to_numpy("output of a head", output)
    if predicted.ndim == 2:
        predicted = as_features("output of a head", predicted).argmax(axis=1)
    labels = as_labels("y", y)
    return float((as_labels("output of a head", predicted, length=len(labels)) == labels).mean())


def _mse(y: Array, output: Array) -> float:
    target, predicted = to_numpy("y", y).astype(np.float64), to_numpy("output of a head", output).astype(np.float64)
    if target.shape != predicted.shape:
        raise ValueError(
            f"y and the output of a head must have the same shape, got {target.shape} and {predicted.shape}"
        )
    return float(((predicted - target) ** 2).mean())
