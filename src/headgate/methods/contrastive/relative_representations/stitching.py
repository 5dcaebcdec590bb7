"""Zero-shot stitching: the encoder of one model, the head or decoder of another, and no training in between.

Evaluation over all pairs is :func:`headgate.evaluate.stitching_matrix`, comparison of two spaces
:func:`headgate.evaluate.latent_communication`; both are handed on here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from headgate.evaluate import latent_communication, stitching_matrix
from headgate.evaluate.checks import Array, as_tensor, check_same_length, check_same_width
from headgate.methods.contrastive.relative_representations.anchors import check_same_anchors
from headgate.methods.contrastive.relative_representations.projection import RelativeProjection
from headgate.methods.contrastive.relative_representations.similarity import unit_vectors

__all__ = [
    "StitchedAutoencoder",
    "StitchedModel",
    "latent_communication",
    "relative_distance",
    "stitch",
    "stitching_matrix",
]


class StitchedModel(nn.Module):
    """``head(projection(encoder(x)))``: the projection has the anchors in the encoder's space.

    Args:
        encoder: from inputs to embeddings ``(batch, dim)``.
        projection: fitted in the space of ``encoder``.
        head: trained on relative representations of another encoder with respect to the same anchors.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection
        self.head = head

    def forward(self, x: Any) -> Any:
        """What the head makes of a batch of the encoder's inputs."""
        return self.head(self.projection(self.encoder(x)))


def stitch(
    encoder: nn.Module,
    anchors: Any,
    head: nn.Module,
    *,
    head_projection: RelativeProjection | None = None,
    **options: Any,
) -> StitchedModel:
    """Put the encoder of one model before the head of another; nothing is trained.

    Args:
        encoder: the first model's, from inputs to embeddings ``(batch, dim)``.
        anchors: the anchors as inputs of ``encoder`` (a batch of K), in the order in which the head knows them; or the
            fitted :class:`RelativeProjection` of the encoder.
        head: the second model's.
        head_projection: the projection that the head was trained behind: its anchors' ids must be those of ``anchors``.
        **options: of the :class:`RelativeProjection` that is fitted on ``anchors``.

    Returns:
        The stitched model in evaluation mode. It shares the parts that were given, and puts them into that mode.

    Raises:
        ValueError: options beside a fitted projection, or anchors whose ids differ.
    """
    if isinstance(anchors, RelativeProjection):
        if options:
            raise ValueError(f"options must not be given beside a fitted projection, got {', '.join(options)}")
        projection = anchors
    else:
        with torch.no_grad():
            embedded = encoder.eval()(anchors)
        projection = RelativeProjection(embedded, **options)
    if head_projection is not None:
        check_same_anchors(projection, head_projection)
    return StitchedModel(encoder, projection, head).eval()


class StitchedAutoencoder(nn.Module):
    """The encoder of one autoencoder and the decoder of another.

    Args:
        first: its ``encode`` is used.
        second: its ``decode`` is used.

    Raises:
        ValueError: both keep anchors, and their ids differ.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        if isinstance(getattr(first, "anchor_ids", None), Tensor) and hasattr(second, "anchor_ids"):
            check_same_anchors(first, second)
        self.first = first
        self.second = second

    def forward(self, images: Any) -> Any:
        """The second model's reconstruction from the first model's code."""
        first: Any = self.first
        second: Any = self.second
        return second.decode(first.encode(images))


def relative_distance(relative: Array, reference: Array, metric: Literal["l2", "cosine"] = "l2") -> float:
    """How far a model's relative representations of the anchors are from a reference model's.

    It predicts how well the model does its task without a label: in the paper (Section 4.2) it correlates with the accuracy of
    graph networks (there ``"cosine"``) and the loss of autoencoders (``"l2"``).

    Args:
        relative: ``(N, K)`` of the model to judge, of the anchors or any other items.
        reference: ``(N, K)`` of a good model; the same items and anchors in the same order.
        metric: ``"l2"``: mean Euclidean distance of corresponding rows; ``"cosine"``: 1 minus their mean cosine.

    Returns:
        The distance, 0 for equal representations.

    Raises:
        TypeError: no arrays of numbers.
        ValueError: shapes that differ, NaN or infinity, or an unknown metric.
    """
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric must be 'l2' or 'cosine', got {metric!r}")
    ours = as_tensor("relative", relative, dtype=torch.float64).cpu()
    theirs = as_tensor("reference", reference, dtype=torch.float64).cpu()
    check_same_length(relative=ours, reference=theirs)
    check_same_width(relative=ours, reference=theirs)
    if metric == "l2":
        return float(torch.linalg.vector_norm(ours - theirs, dim=1).mean())
    return 1.0 - float((unit_vectors(ours) * unit_vectors(theirs)).sum(dim=1).mean())
