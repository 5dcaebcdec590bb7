"""Relative representations with anchors that are kept: fit once on the anchors' embeddings, then project any embeddings.

For frozen encoders: one projection per encoder, fitted on the same items in the same order, and what leaves them can be
compared, searched, or read by one head.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.evaluate.checks import Array, ZeroPolicy, as_labels, as_tensor, check_choice, normalize_rows, to_numpy
from headgate.methods.contrastive.relative_representations.attention import OutputNorm, RelativeAttention
from headgate.methods.contrastive.relative_representations.quantize import Quantization, RelativeQuantizer
from headgate.methods.contrastive.relative_representations.similarity import Similarity, check_similarity
from headgate.methods.contrastive.relative_representations.subspaces import (
    Pool,
    SubspaceRelativeAttention,
    check_pool,
)
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["RelativeProjection"]


class RelativeProjection(nn.Module):
    """Embeddings described by their similarities to anchors: ``(batch, dim)`` to ``(batch, anchors)``.

    Without parameters but those of ``out_norm`` and ``pool="linear"``. The anchors' embeddings, their ids and, with
    ``aggregate``, their classes are buffers. A projection without anchors takes its sizes from :meth:`fit` or from the
    state dict that is loaded into it.

    Args:
        anchors: ``(K, d)`` embeddings of the anchors, NumPy or tensor; ``None`` to :meth:`fit` later.
        num_anchors: K, to reserve place for a state dict; with ``dim``, in place of ``anchors``.
        dim: d.
        similarity: ``"cosine"`` (the paper's), ``"inner"``, ``"basis_change"``, ``"euclidean"``, ``"l1"``, ``"angular"``.
        normalize: scale items and anchors to length 1; ``None``: for cosine and angular alone.
        center: subtract the mean of the anchors first, for spaces with an offset.
        quantize: ``"round"``, ``"round_gradient"``, ``"smooth"`` or ``"cluster"``; see :class:`RelativeQuantizer`.
        bin_size: width of its bins.
        cluster_threshold: distance up to which ``"cluster"`` merges rows of the batch.
        quantize_on: ``"similarity"``, or ``"absolute"``: items and anchors before they are compared.
        aggregate: ``"class"`` averages the similarities over the anchors of each class.
        num_classes: C; ``None`` takes it from the labels given to :meth:`fit`.
        groups: averages per class.
        out_norm: ``"l2"``, ``"layernorm"``, ``"batchnorm"`` or ``"instancenorm"``.
        subspaces: S equal blocks of the coordinates, projected one by one.
        pool: how their results are joined: ``"concat"``, ``"sum"``, ``"mean"``, ``"max"``, ``"linear"``.
        zero: what a zero vector, which has no direction, leads to in :meth:`fit` and :meth:`transform` where vectors are
            scaled to length 1: an error, or (``"ignore"``) the cosine 0. :meth:`forward` always does the latter.
        anchor_labels: ``(K,)`` classes, with ``anchors`` and ``aggregate``.
        anchor_ids: ``(K,)`` integers that name the anchors, with ``anchors``; see :meth:`fit`.
        official_quirks: as :class:`RelativeAttention`.
        device: of what is reserved.
        dtype: of what is reserved; anchors that are given keep theirs.

    Raises:
        ValueError: sizes that are not positive or not both given, or as :class:`RelativeAttention` and :meth:`fit`.
    """

    anchors: Float[Tensor, "anchors dim"] | None
    anchor_ids: Int[Tensor, " anchors"] | None
    anchor_labels: Int[Tensor, " anchors"] | None

    def __init__(
        self,
        anchors: Array | None = None,
        *,
        num_anchors: int | None = None,
        dim: int | None = None,
        similarity: Similarity = "cosine",
        normalize: bool | None = None,
        center: bool = False,
        quantize: Quantization | None = None,
        bin_size: float | None = None,
        cluster_threshold: float | None = None,
        quantize_on: Literal["similarity", "absolute"] = "similarity",
        aggregate: Literal["class"] | None = None,
        num_classes: int | None = None,
        groups: int = 1,
        out_norm: OutputNorm | None = None,
        subspaces: int = 1,
        pool: Pool = "concat",
        zero: ZeroPolicy = "error",
        anchor_labels: Array | None = None,
        anchor_ids: Array | None = None,
        official_quirks: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("quantize_on", quantize_on, ("similarity", "absolute"))
        check_choice("zero", zero, ("error", "ignore"))
        check_positive(subspaces=subspaces)
        normalized = check_similarity(similarity, normalize)
        if quantize is None and (bin_size is not None or cluster_threshold is not None):
            raise ValueError(
                f"bin_size and cluster_threshold need quantize, got bin_size={bin_size}, "
                f"cluster_threshold={cluster_threshold} with quantize=None"
            )
        if aggregate is None and num_classes is not None:
            raise ValueError(f"num_classes needs aggregate='class', got num_classes={num_classes} without it")
        quantizer = None if quantize is None else RelativeQuantizer(quantize, bin_size, cluster_threshold)
        self.similarity, self.normalized, self.center, self.zero = similarity, normalized, center, zero
        self.num_classes = num_classes
        self._options: dict[str, Any] = {
            "similarity": similarity,
            "normalize": normalize,
            "center": center,
            "quantizer" if quantize_on == "similarity" else "absolute_quantizer": quantizer,
            "aggregate": aggregate,
            "groups": groups,
            "out_norm": out_norm,
            "official_quirks": official_quirks,
        }
        self._subspaces: dict[str, Any] = {"subspaces": subspaces, "pool": pool}
        self.block: RelativeAttention | SubspaceRelativeAttention | None = None
        self.register_buffer("anchors", None)
        self.register_buffer("anchor_ids", None)
        self.register_buffer("anchor_labels", None)
        self._is_fitted = False
        # Options that do not go together are refused here, not at the first fit.
        self._new_block(1, subspaces, 1 if num_classes is None else num_classes, torch.device("meta"), torch.float32)
        if (num_anchors is None) != (dim is None) or (anchors is not None and dim is not None):
            raise ValueError(
                "num_anchors and dim must be given together, and without anchors, got "
                f"num_anchors={num_anchors}, dim={dim}, anchors {'given' if anchors is not None else 'not given'}"
            )
        if isinstance(anchors, Tensor) and anchors.is_meta:
            num_anchors, dim, device, dtype = *anchors.shape, anchors.device, anchors.dtype
        if anchors is not None and dim is None:
            self.fit(anchors, anchor_labels, anchor_ids)
        elif anchors is None and (anchor_labels is not None or anchor_ids is not None):
            raise ValueError("anchor_labels and anchor_ids need anchors, got anchors=None")
        elif num_anchors is not None and dim is not None:
            check_positive(num_anchors=num_anchors, dim=dim)
            if aggregate is not None and num_classes is None:
                raise ValueError("num_classes must be given to reserve place for averages by class, got None")
            self._reserve(num_anchors, dim, device, dtype or torch.get_default_dtype())

    @property
    def out_dim(self) -> int:
        """Size of the result.

        Raises:
            ValueError: the sizes are not known before :meth:`fit`.
        """
        return self._require_block().out_dim

    def fit(self, anchors: Array, labels: Array | None = None, ids: Array | None = None) -> RelativeProjection:
        """Keep the anchors' embeddings.

        Args:
            anchors: ``(K, d)`` embeddings, finite, NumPy or tensor. K and d may differ from those of an earlier fit only
                while the projection has no parameters (``out_norm`` with weights, ``pool="linear"``).
            labels: ``(K,)`` classes from 0, needed by ``aggregate``.
            ids: ``(K,)`` integers that name the items, e.g. their rows in the data set, so that
                :func:`check_same_anchors` can compare projections; by default 0 … K - 1.

        Returns:
            itself.

        Raises:
            TypeError: no arrays of numbers.
            ValueError: wrong shapes, NaN or infinity, a zero anchor with ``zero="error"`` (see the class), labels missing
                or out of range, or sizes that differ from those of the parameters.
        """
        rows = as_tensor("anchors", anchors)
        count, dim = rows.shape
        classes = None if labels is None else torch.from_numpy(as_labels("labels", labels, length=count).copy())
        if self._options["aggregate"] is not None and classes is None:
            raise ValueError("labels must hold the anchors' classes for aggregate='class', got None")
        names = torch.arange(count) if ids is None else torch.from_numpy(as_labels("ids", ids, length=count).copy())
        if self.normalized and self.zero == "error":
            self._refuse_zeros("anchors", rows, rows)
        if self.similarity == "basis_change" and len(torch.unique(rows, dim=0)) < count:
            warnings.warn(
                "anchors hold an item twice, so that coordinates in them are not unique: those of least norm are taken",
                UserWarning,
                stacklevel=2,
            )
        if self._options["aggregate"] is not None and classes is not None:
            num_classes = self.num_classes or int(classes.max()) + 1
            if int(classes.min()) < 0 or int(classes.max()) >= num_classes:
                raise ValueError(
                    f"labels must lie in [0, {num_classes}), got {int(classes.min())} to {int(classes.max())}"
                )
            if self.block is not None and num_classes != self._blocks()[0].num_classes and self._has_parameters():
                raise ValueError(f"labels must name {self._blocks()[0].num_classes} classes, got {num_classes}")
        else:
            num_classes = 1
        if self._has_parameters():
            held = self._require_block()
            if (count, dim) != (held.num_anchors, held.dim):
                raise ValueError(
                    f"anchors must have shape ({held.num_anchors}, {held.dim}), that of the parameters, got {(count, dim)}"
                )
            reference = next(held.parameters())
            rows = rows.to(reference.device, reference.dtype)
        else:
            training = self.training
            self.block = self._new_block(count, dim, num_classes, rows.device, rows.dtype).train(training)
        # Clone: the caller may change what was given afterwards.
        self.anchors = rows.clone()
        self.anchor_ids = names.to(rows.device)
        self.anchor_labels = None
        if self._options["aggregate"] is not None and classes is not None:
            self.anchor_labels = classes.to(rows.device)
        self._is_fitted = True
        return self

    def forward(self, x: Float[Tensor, "batch dim"] | Float[np.ndarray, "batch dim"]) -> Any:
        """Relative representation of embeddings.

        Args:
            x: ``(batch, dim)`` of the anchors' dtype; NumPy is handed to :meth:`transform`.

        Returns:
            ``(batch, out_dim)``, differentiable for a tensor.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or no anchors yet.
            RuntimeError: clusters in training mode.
        """
        if isinstance(x, np.ndarray):
            return self.transform(x)
        block = self._require_block()
        if not self._is_fitted or self.anchors is None:
            raise ValueError("anchors must be given with fit, or by a state dict, before anything is projected")
        check_shape("x", x, (None, block.dim), "batch, dim")
        check_floating("x", x, like=self.anchors.dtype)
        anchors = self.anchors.to(x.dtype)  # they differ under autocast alone
        return block.decode(block.encode_trusted(x, anchors, self.anchor_labels))  # type: ignore[arg-type]

    def transform(self, X: Array) -> Any:
        """As :meth:`forward`, in evaluation mode and without gradients, after a look at the values.

        Args:
            X: ``(N, d)`` embeddings, NumPy or tensor, finite.

        Returns:
            ``(N, out_dim)``, of the kind of ``X`` and on its device, in the anchors' dtype.

        Raises:
            TypeError: no array of numbers.
            ValueError: wrong shape, NaN or infinity, a zero vector with ``zero="error"``, or no anchors yet.
        """
        block = self._require_block()
        if self.anchors is None:
            raise ValueError("anchors must be given with fit before anything is projected")
        rows = as_tensor("X", X).to(self.anchors.device, self.anchors.dtype)
        check_shape("X", rows, (None, block.dim), "n, dim")
        if self.normalized and self.zero == "error":
            self._refuse_zeros("X", rows, self.anchors)
        modes = {module: module.training for module in self.modules()}
        try:
            with torch.no_grad():
                result: Tensor = self.eval()(rows)
        finally:
            for module, training in modes.items():
                module.training = training
        return result.to(X.device) if isinstance(X, Tensor) else to_numpy("result", result)

    def fit_transform(self, anchors: Array, labels: Array | None = None, ids: Array | None = None) -> Any:
        """:meth:`fit` on the anchors, then their own relative representation, ``(K, out_dim)``."""
        return self.fit(anchors, labels, ids).transform(anchors)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        sizes = (
            "no anchors" if self.anchors is None else f"{self.anchors.shape[0]} anchors of size {self.anchors.shape[1]}"
        )
        return f"{sizes}, similarity={self.similarity!r}, center={self.center}"

    def _new_block(
        self, num_anchors: int, dim: int, num_classes: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> RelativeAttention | SubspaceRelativeAttention:
        options = {**self._options, "device": device, "dtype": dtype}
        if options["aggregate"] is not None:
            options["num_classes"] = num_classes
        if self._subspaces["subspaces"] == 1 and self._subspaces["pool"] != "linear":
            check_pool(self._subspaces["pool"])
            return RelativeAttention(num_anchors, dim, **options)
        return SubspaceRelativeAttention(num_anchors, dim, **self._subspaces, **options)

    def _reserve(self, num_anchors: int, dim: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
        self.block = self._new_block(num_anchors, dim, self.num_classes or 1, device, dtype)
        self.anchors = torch.zeros(num_anchors, dim, device=device, dtype=dtype)
        self.anchor_ids = torch.zeros(num_anchors, device=device, dtype=torch.int64)
        if self._options["aggregate"] is not None:
            self.anchor_labels = torch.zeros(num_anchors, device=device, dtype=torch.int64)

    def _blocks(self) -> list[RelativeAttention]:
        return [module for module in self.modules() if isinstance(module, RelativeAttention)]

    def _has_parameters(self) -> bool:
        return self.block is not None and any(True for _ in self.block.parameters())

    def _require_block(self) -> RelativeAttention | SubspaceRelativeAttention:
        if self.block is None:
            raise ValueError("anchors must be given with fit before sizes are known, got none yet")
        return self.block

    def _refuse_zeros(self, name: str, rows: Float[Tensor, "n dim"], anchors: Float[Tensor, "anchors dim"]) -> None:
        """Zero vectors are looked for where they are scaled: behind centring, in each subspace."""
        shifted = rows - anchors.mean(dim=0) if self.center else rows
        if shifted.shape[1] % self._subspaces["subspaces"] == 0:
            for part in shifted.chunk(self._subspaces["subspaces"], dim=1):
                normalize_rows(name, part, zero="error")

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        held = state_dict.get(f"{prefix}anchors")
        if held is not None:
            if self.block is None and held.dim() == 2:
                labels = state_dict.get(f"{prefix}anchor_labels")
                if self.num_classes is None and labels is not None and labels.numel():
                    self.num_classes = int(labels.max()) + 1
                self._reserve(held.shape[0], held.shape[1], held.device, held.dtype)
            self._is_fitted = True
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
