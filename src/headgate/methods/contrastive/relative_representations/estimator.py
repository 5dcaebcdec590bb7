"""Relative representations as a scikit-learn transformer: anchors are chosen from the rows that it is fitted on.

Two spaces share a language where both transformers have the same anchors: fit them on the same items in the same order with
the same ``random_state`` (or ``anchors``). It also serves :func:`headgate.evaluate.stitching_matrix` as a ``transform``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from headgate.evaluate.checks import ZeroPolicy, to_numpy
from headgate.methods.contrastive.relative_representations.anchors import Strategy, select_anchors
from headgate.methods.contrastive.relative_representations.projection import RelativeProjection
from headgate.methods.contrastive.relative_representations.quantize import Quantization
from headgate.methods.contrastive.relative_representations.similarity import Similarity
from headgate.methods.contrastive.relative_representations.subspaces import Pool

__all__ = ["RelativeRepresentation"]


class RelativeRepresentation(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Similarities of each row to rows that were chosen as anchors.

    Args:
        n_anchors: how many rows become anchors; ``None``: all.
        anchors: indices of the rows that do, in place of ``n_anchors`` and ``strategy``.
        strategy: how they are chosen; see :func:`select_anchors`. ``"stratified"`` needs ``y``.
        similarity: as :class:`RelativeProjection`, and likewise the following.
        normalize: scale rows to length 1 first.
        center: subtract the mean of the anchors first.
        quantize: quantisation.
        bin_size: width of its bins.
        cluster_threshold: distance up to which clusters of rows are merged; their result depends on the rows beside them.
        quantize_on: ``"similarity"`` or ``"absolute"``.
        aggregate: ``"class"`` averages over the anchors of each class; needs ``y``.
        groups: averages per class.
        out_norm: ``"l2"`` or ``"layernorm"`` (without scale and shift) of the result.
        subspaces: equal blocks of columns, transformed one by one.
        pool: how they are joined: ``"concat"``, ``"sum"``, ``"mean"`` or ``"max"``.
        zero: what a zero row leads to where rows are scaled to length 1: the cosine 0 (``"ignore"``, as zero rows stay zero
            in ``sklearn.preprocessing.Normalizer``), or an ``"error"``.
        random_state: seed of the choice of anchors.

    Attributes:
        anchor_indices_: ``(K,)`` rows of the fitted data that are the anchors, in order.
        anchors_: ``(K, d)`` these rows.
        classes_: the classes that ``aggregate`` averages over.
        projection_: the fitted :class:`RelativeProjection`.
    """

    def __init__(
        self,
        n_anchors: int | None = None,
        *,
        anchors: Sequence[int] | Int[np.ndarray, " anchors"] | None = None,
        strategy: Strategy = "uniform",
        similarity: Similarity = "cosine",
        normalize: bool | None = None,
        center: bool = False,
        quantize: Quantization | None = None,
        bin_size: float | None = None,
        cluster_threshold: float | None = None,
        quantize_on: Literal["similarity", "absolute"] = "similarity",
        aggregate: Literal["class"] | None = None,
        groups: int = 1,
        out_norm: Literal["l2", "layernorm"] | None = None,
        subspaces: int = 1,
        pool: Pool = "concat",
        zero: ZeroPolicy = "ignore",
        random_state: int = 0,
    ) -> None:
        self.n_anchors = n_anchors
        self.anchors = anchors
        self.strategy = strategy
        self.similarity = similarity
        self.normalize = normalize
        self.center = center
        self.quantize = quantize
        self.bin_size = bin_size
        self.cluster_threshold = cluster_threshold
        self.quantize_on = quantize_on
        self.aggregate = aggregate
        self.groups = groups
        self.out_norm = out_norm
        self.subspaces = subspaces
        self.pool = pool
        self.zero = zero
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> RelativeRepresentation:
        """Choose the anchors and keep them.

        Args:
            X: ``(n, d)``, finite; NumPy, tensor, or what else scikit-learn takes.
            y: ``(n,)`` classes, for ``strategy="stratified"`` and ``aggregate``.

        Raises:
            ValueError: parameters that do not go together, ``y`` missing, or as scikit-learn raises for bad data.
        """
        rows = validate_data(self, _array("X", X), dtype=[np.float64, np.float32])
        if self.out_norm not in (None, "l2", "layernorm"):
            raise ValueError(f"out_norm must be None, 'l2' or 'layernorm', got {self.out_norm!r}")
        if self.pool == "linear":
            raise ValueError("pool must not be 'linear', which has weights to train: see RelativeProjection")
        needs_classes = self.aggregate is not None or (self.strategy == "stratified" and self.anchors is None)
        codes = None
        if needs_classes:
            if y is None:
                raise ValueError("y must hold the classes of the rows, got None")
            self.classes_, codes = np.unique(column_or_1d(_array("y", y)), return_inverse=True)
            if len(codes) != len(rows):
                raise ValueError(f"y must have one entry per row: expected {len(rows)}, got {len(codes)}")
        self.anchor_indices_ = self._choose(rows, codes)
        self.anchors_ = rows[self.anchor_indices_]
        aggregates = self.aggregate is not None
        self.projection_ = RelativeProjection(
            self.anchors_,
            similarity=self.similarity,
            normalize=self.normalize,
            center=self.center,
            quantize=self.quantize,
            bin_size=self.bin_size,
            cluster_threshold=self.cluster_threshold,
            quantize_on=self.quantize_on,
            aggregate=self.aggregate,
            num_classes=len(self.classes_) if aggregates else None,
            groups=self.groups,
            out_norm=self.out_norm,
            subspaces=self.subspaces,
            pool=self.pool,
            zero=self.zero,
            anchor_labels=codes[self.anchor_indices_] if aggregates and codes is not None else None,
            anchor_ids=self.anchor_indices_,
        ).eval()
        return self

    def transform(self, X: Any) -> Any:
        """Relative representation of the rows of ``X``, ``(n, d)``: ``(n, K)`` without ``aggregate`` and ``subspaces``.

        A tensor gives a tensor on its device; everything else NumPy.
        """
        check_is_fitted(self)
        rows = validate_data(self, _array("X", X), dtype=[np.float64, np.float32], reset=False)
        result = self.projection_.transform(rows)
        if isinstance(X, Tensor):
            import torch

            return torch.from_numpy(result).to(X.device)
        return result

    def own(
        self, features: Float[np.ndarray, "n dim"], anchors: Float[np.ndarray, "anchors dim"]
    ) -> Float[np.ndarray, "n out"]:
        """What a head is trained on, as :class:`headgate.evaluate.Translation` asks for; every row of ``anchors`` counts."""
        if self.aggregate is not None:
            raise ValueError("aggregate must be None to translate between spaces: the anchors come without classes")
        fresh = type(self)(**{**self.get_params(deep=False), "n_anchors": None, "anchors": None, "strategy": "uniform"})
        given = np.arange(len(anchors))
        translated: np.ndarray = fresh.set_params(anchors=given).fit(anchors).transform(features)
        return translated

    def across(
        self,
        features: Float[np.ndarray, "n source"],
        source_anchors: Float[np.ndarray, "anchors source"],
        target_anchors: Float[np.ndarray, "anchors target"],
    ) -> Float[np.ndarray, "n out"]:
        """The features of another encoder for the target's head: relative to the same anchors in their own space."""
        return self.own(features, source_anchors)

    @property
    def _n_features_out(self) -> int:
        return self.projection_.out_dim

    def _choose(
        self, rows: Float[np.ndarray, "n dim"], codes: Int[np.ndarray, " n"] | None
    ) -> Int[np.ndarray, " anchors"]:
        if self.anchors is not None:
            if self.n_anchors is not None:
                raise ValueError(f"n_anchors must be None where anchors are given, got {self.n_anchors}")
            chosen = np.asarray(self.anchors)
            if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or len(chosen) == 0:
                raise ValueError(f"anchors must be a list of row numbers, got {self.anchors!r}")
            if chosen.min() < 0 or chosen.max() >= len(rows):
                raise ValueError(
                    f"anchors must lie in [0, n_samples = {len(rows)}), got {chosen.min()} to {chosen.max()}"
                )
            return chosen.astype(np.int64)
        if self.n_anchors is None:
            return np.arange(len(rows))
        found = select_anchors(rows, codes, self.n_anchors, self.strategy, self.random_state)
        return np.asarray(found)


def _array(name: str, values: Any) -> Any:
    return to_numpy(name, values) if isinstance(values, Tensor) else values
