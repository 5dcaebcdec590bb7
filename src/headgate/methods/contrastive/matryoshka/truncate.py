"""Prefixes of an embedding: for tensors and arrays, and as a scikit-learn transformer.

A slice is normalised after slicing, never before: a prefix of a unit vector is shorter than 1, and its dot products
mean something else at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

__all__ = ["MatryoshkaTruncate", "check_prefix", "prefix", "truncate"]

ArrayT = TypeVar("ArrayT", Tensor, np.ndarray)


def truncate(z: ArrayT, dim: int, *, normalize: bool = True) -> ArrayT:
    """Keep the first ``dim`` coordinates and, unless told otherwise, scale each slice to length 1.

    Args:
        z: embeddings ``(..., d)``, floating, a tensor or a NumPy array.
        dim: size to keep, in [1, d].
        normalize: divide each slice by its L2 norm. A slice of zeros, whose direction is undefined, stays zeros.

    Returns:
        ``(..., dim)``, of the same kind and dtype; without ``normalize`` it is a view of ``z``.

    Raises:
        TypeError: not floating, or no tensor or array.
        ValueError: ``dim`` outside [1, d], or (outside ``torch.compile`` and ``torch.export``) NaN in a slice.
    """
    if isinstance(z, np.ndarray):
        if z.dtype.kind != "f":
            raise TypeError(f"z must be floating point, got {z.dtype}")
        check_prefix(z.shape, dim)
        kept = z[..., :dim]
        _refuse_nan(bool(np.isnan(kept).any()))
        return _unit_array(kept) if normalize else kept
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor or a NumPy array, got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(f"z must be floating point, got {z.dtype}")
    check_prefix(z.shape, dim)
    if not torch.compiler.is_compiling() and not z.is_meta:
        _refuse_nan(bool(torch.isnan(z[..., :dim]).any()))
    return prefix(z, dim, normalize)


def prefix(z: Float[Tensor, "... d"], dim: int, normalize: bool) -> Float[Tensor, "... dim"]:
    """:func:`truncate` without its checks, for use inside a training step; NaN stays NaN.

    Norms of half-precision slices are taken in float32.
    """
    kept = z[..., :dim]
    if not normalize:
        return kept
    wide = kept.to(torch.promote_types(kept.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # Dividing a zero slice by 1, not by a tiny number, keeps its gradient small as well.
    return (wide / norm.masked_fill(norm == 0, 1)).to(kept.dtype)


def check_prefix(shape: Sequence[int], dim: int) -> None:
    """Check that an embedding of this shape has a prefix of size ``dim``.

    Raises:
        TypeError: ``dim`` is no integer.
        ValueError: ``dim`` lies outside [1, shape[-1]].
    """
    if isinstance(dim, bool) or not isinstance(dim, int | np.integer):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}")
    if len(shape) == 0:
        raise ValueError("z must have at least one axis, got a scalar")
    if not 1 <= dim <= shape[-1]:
        raise ValueError(f"dim must lie in [1, {shape[-1]}], the embedding's size, got {dim}")


class MatryoshkaTruncate(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """scikit-learn transformer that keeps the first ``dim`` columns and scales each row to length 1.

    Args:
        dim: columns to keep; ``None`` keeps all.
        normalize: scale each row to length 1; a row of zeros stays zeros, as in ``sklearn.preprocessing.Normalizer``.
    """

    def __init__(self, dim: int | None = None, *, normalize: bool = True) -> None:
        self.dim = dim
        self.normalize = normalize

    def fit(self, X: Any, y: Any = None) -> MatryoshkaTruncate:
        """Check the number of columns; there is nothing to learn.

        Args:
            X: ``(n, d)``, finite.
            y: not used.

        Raises:
            ValueError: ``dim`` is no integer in [1, d], or as scikit-learn raises for bad data.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        if self.dim is not None and not (isinstance(self.dim, Integral) and 1 <= self.dim <= X.shape[1]):
            raise ValueError(f"dim must be an integer in [1, n_features={X.shape[1]}], got {self.dim!r}")
        self.dim_ = X.shape[1] if self.dim is None else self.dim
        return self

    def transform(self, X: Any) -> Float[np.ndarray, "n dim"]:
        """Truncate the rows of ``X``, ``(n, d)``, to ``(n, dim)``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return truncate(X, self.dim_, normalize=self.normalize)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the columns that are kept."""
        names: np.ndarray = super().get_feature_names_out(input_features)
        return names[: self.dim_]


def _refuse_nan(found: bool) -> None:
    if found:
        raise ValueError("z must hold no NaN, got at least one in the slice")


def _unit_array(kept: np.ndarray) -> np.ndarray:
    wide = kept.astype(np.promote_types(kept.dtype, np.float32))
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    return (wide / np.where(norm == 0, 1, norm)).astype(kept.dtype)
