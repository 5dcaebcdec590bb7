"""Adaptive classification: answer from a short prefix where it is sure, from longer ones elsewhere (paper, Section 4.2.1).

With p^(g) the softmax at size m_g and its confidence s^(g) = max p^(g), an item is answered at the first g with
``s^(g) > t_g``, else at the last size allowed. The thresholds are chosen on held-out items, each pair of neighbouring
sizes by itself: the smallest t on a grid at which "g where s^(g) > t, else g + 1" is right most often.

    expected size = Σ_g m_g · P(stop at g)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.evaluate.adaptive import cascade_thresholds
from headgate.evaluate.checks import Array, as_labels, as_probabilities, check_finite
from headgate.methods.contrastive.matryoshka.head import MatryoshkaHead
from headgate.methods.contrastive.matryoshka.sizes import check_dims

__all__ = ["CascadeCurve", "CascadePrediction", "MatryoshkaCascade"]

_SUM_TOLERANCE = 1e-3


class CascadePrediction(NamedTuple):
    """Answers of a cascade.

    Attributes:
        labels: ``(N,)`` predicted class of each item.
        used_dim: ``(N,)`` size at which it was answered; its mean is the expected size.
    """

    labels: Int[np.ndarray, " n"]
    used_dim: Int[np.ndarray, " n"]


class CascadeCurve(NamedTuple):
    """Accuracy over expected size, one point per largest size allowed.

    Attributes:
        max_dim: ``(G,)`` largest size allowed.
        accuracy: ``(G,)``.
        expected_dim: ``(G,)``.
    """

    max_dim: Int[np.ndarray, " g"]
    accuracy: Float[np.ndarray, " g"]
    expected_dim: Float[np.ndarray, " g"]


class MatryoshkaCascade:
    """A cascade over the sizes of a nesting set.

    Args:
        dims: sizes in increasing order, at least two.
        grid: rising thresholds to choose from; ``None`` is the paper's 100 values from 0.1 to 1.

    Raises:
        ValueError: ``dims`` is no nesting set of two sizes or more.
    """

    def __init__(self, dims: Sequence[int], *, grid: Sequence[float] | None = None) -> None:
        self.dims = check_dims(dims)
        if len(self.dims) < 2:
            raise ValueError(f"dims must hold at least two sizes, got {list(self.dims)}")
        self.grid = None if grid is None else np.asarray(grid, dtype=np.float64)

    def fit(self, probs: Array, y: Array) -> Self:
        """Choose the thresholds on held-out items.

        Args:
            probs: ``(G, N, C)`` class probabilities at each size.
            y: ``(N,)`` true classes.

        Returns:
            The cascade, with ``thresholds`` ``(G - 1,)``.

        Raises:
            TypeError: labels are not integers.
            ValueError: no items, items of one class only, labels outside [0, C), or ``probs`` of another number of
                sizes, with NaN, or that do not sum to 1.
        """
        table = self._check(probs)
        labels = as_labels("y", y, length=table.shape[1])
        if labels.min() < 0 or labels.max() >= table.shape[2]:
            raise ValueError(f"y must lie in [0, {table.shape[2]}), got {labels.min()} to {labels.max()}")
        if len(np.unique(labels)) < 2:
            raise ValueError(f"y must hold at least two classes to calibrate with, got class {labels[0]} only")
        self.thresholds = cascade_thresholds(table.max(axis=2), table.argmax(axis=2) == labels, self.grid)
        return self

    def predict(self, probs: Array, max_dim: int | None = None) -> CascadePrediction:
        """Answer each item at the first size that is sure enough.

        Args:
            probs: ``(G, N, C)`` class probabilities at each size.
            max_dim: largest size allowed, one of ``dims``; ``None`` is the last.

        Returns:
            Labels and the size used for each.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: bad probabilities, or ``max_dim`` is not one of ``dims``.
        """
        limits = self._limits(max_dim)
        table = self._check(probs)[: len(limits) + 1]
        sure = np.ones(table.shape[:2], dtype=bool)
        sure[:-1] = table[:-1].max(axis=2) > limits[:, None]
        stage = sure.argmax(axis=0)
        labels = table[stage, np.arange(table.shape[1])].argmax(axis=1)
        return CascadePrediction(labels, np.asarray(self.dims)[stage])

    def curve(self, probs: Array, y: Array) -> CascadeCurve:
        """Accuracy and expected size with each size as the largest allowed.

        Args:
            probs: ``(G, N, C)``.
            y: ``(N,)`` true classes.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: bad probabilities or labels.
        """
        labels = as_labels("y", y, length=self._check(probs).shape[1])
        answers = [self.predict(probs, max_dim) for max_dim in self.dims]
        return CascadeCurve(
            np.asarray(self.dims),
            np.array([float((answer.labels == labels).mean()) for answer in answers]),
            np.array([float(answer.used_dim.mean()) for answer in answers]),
        )

    @torch.no_grad()
    def classify(
        self, head: MatryoshkaHead, z: Float[Tensor, "batch dim"], max_dim: int | None = None
    ) -> CascadePrediction:
        """Answer embeddings with a head, computing each size only for the items that no shorter one has answered.

        Args:
            head: over the same ``dims``.
            z: embeddings ``(batch, dims[-1])``.
            max_dim: as in :meth:`predict`.

        Returns:
            What :meth:`predict` gives for the softmax of the head's logits.

        Raises:
            RuntimeError: :meth:`fit` was not called.
            ValueError: the head has other sizes, ``max_dim`` is not one of them, or ``z`` holds NaN or infinity.
        """
        if head.dims != self.dims:
            raise ValueError(f"head must have the dims {list(self.dims)}, got {list(head.dims)}")
        check_finite("z", z)
        limits = [*self._limits(max_dim), -np.inf]
        labels = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        used = torch.zeros_like(labels)
        waiting = torch.arange(len(z), device=z.device)
        for size, limit in zip(self.dims, limits, strict=False):
            logits = head.classifier(size)(z[waiting, :size])
            confidence, answer = logits.double().softmax(dim=1).max(dim=1)
            sure = confidence > limit
            labels[waiting[sure]], used[waiting[sure]] = answer[sure], size
            waiting = waiting[~sure]
        return CascadePrediction(labels.cpu().numpy(), used.cpu().numpy())

    def _limits(self, max_dim: int | None) -> Float[np.ndarray, " stages"]:
        if not hasattr(self, "thresholds"):
            raise RuntimeError("fit must be called before the cascade can answer")
        if max_dim is not None and max_dim not in self.dims:
            raise ValueError(f"max_dim must be one of {list(self.dims)}, got {max_dim}")
        return self.thresholds if max_dim is None else self.thresholds[: self.dims.index(max_dim)]

    def _check(self, probs: Array) -> Float[np.ndarray, "g n c"]:
        table = as_probabilities("probs", probs, shape=(len(self.dims), None, None), axes="size, item, class")
        off = np.abs(table.sum(axis=2) - 1)
        if off.max() > _SUM_TOLERANCE:
            size, item = np.unravel_index(off.argmax(), off.shape)
            raise ValueError(
                f"probs must sum to 1 over the classes, got {table[size, item].sum():g} at size {self.dims[size]} "
                f"for item {item} (softmax in float32 first)"
            )
        return table
