"""Two modalities in one space: retrieval across them, and classification by text prompts (CLIP, ALIGN)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.evaluate.checks import (
    Array,
    ZeroPolicy,
    as_labels,
    as_tensor,
    check_count,
    check_matrix,
    normalize_rows,
    to_numpy,
)
from headgate.evaluate.search import search

__all__ = ["CrossModalRecall", "cross_modal_recall", "zero_shot_accuracy", "zero_shot_classifier"]


@dataclass(frozen=True)
class CrossModalRecall:
    """Recall at k in both directions.

    Attributes:
        image_to_text: k → share of images with one of their captions among the first k.
        text_to_image: k → share of captions with their image among the first k.
        mean: average over all k and both directions (with three k, "the mean of the six").
        dropped: images without a caption; they are candidates for captions, but no queries.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    mean: float
    dropped: int


def cross_modal_recall(
    images: Float[Array, "i dim"],
    texts: Float[Array, "t dim"],
    image_of_text: Int[Array, " t"],
    ks: Sequence[int] = (1, 5, 10),
    *,
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> CrossModalRecall:
    """Retrieve captions by image and images by caption, by cosine.

    Args:
        images: ``(I, d)`` image embeddings.
        texts: ``(T, d)`` caption embeddings; an image may have several captions.
        image_of_text: ``(T,)`` the row of the image that each caption describes.
        ks: cuts, each at most I and at most T.
        chunk: rows per block.
        zero: as in :func:`headgate.evaluate.search`.

    Raises:
        TypeError: ``image_of_text`` holds no integers.
        ValueError: bad shapes or values, or a row that no image has.
    """
    num_images, _ = check_matrix("images", images)
    num_texts, _ = check_matrix("texts", texts)
    owner = as_labels("image_of_text", image_of_text, length=num_texts)
    if owner.min() < 0 or owner.max() >= num_images:
        raise ValueError(
            f"image_of_text must hold rows of images in [0, {num_images - 1}], got {owner.min()} to {owner.max()}"
        )
    if len(ks) == 0:
        raise ValueError("ks must hold at least one cut, got none")
    cuts = [check_count("ks", k, high=min(num_images, num_texts)) for k in ks]
    captions = search(images, texts, max(cuts), chunk=chunk, zero=zero).ids
    found_images = search(texts, images, max(cuts), chunk=chunk, zero=zero).ids
    has_caption = np.bincount(owner, minlength=num_images) > 0
    caption_hits = (owner[captions] == np.arange(num_images)[:, None])[has_caption]
    image_hits = found_images == owner[:, None]
    image_to_text = {k: float(caption_hits[:, :k].any(axis=1).mean()) for k in cuts}
    text_to_image = {k: float(image_hits[:, :k].any(axis=1).mean()) for k in cuts}
    mean = float(np.mean([*image_to_text.values(), *text_to_image.values()]))
    return CrossModalRecall(image_to_text, text_to_image, mean, int((~has_caption).sum()))


def zero_shot_classifier(
    class_prompts: Float[Array, "classes prompts dim"] | Sequence[Float[Array, "prompts dim"]],
    *,
    zero: ZeroPolicy = "error",
) -> Float[np.ndarray, "classes dim"]:
    """Return one unit vector per class: ``normalise(mean(normalise(prompt embeddings)))``.

    Args:
        class_prompts: ``(C, P, d)``, or C matrices ``(P_c, d)`` with their own numbers of prompts.
        zero: what a zero prompt, or prompts that cancel, lead to.

    Raises:
        ValueError: no class, bad shapes or values, or a zero vector with ``zero="error"``.
    """
    if not isinstance(class_prompts, Sequence):
        stacked = to_numpy("class_prompts", class_prompts)
        if stacked.ndim != 3:
            raise ValueError(f"class_prompts must have shape (classes, prompts, dim), got {stacked.shape}")
        class_prompts = list(stacked)
    if len(class_prompts) == 0:
        raise ValueError("class_prompts must hold at least one class, got none")
    means: list[Tensor] = []
    for number, prompts in enumerate(class_prompts):
        name = f"class_prompts[{number}]"
        rows = normalize_rows(name, as_tensor(name, prompts, dtype=torch.float64).cpu(), zero=zero)
        if means and len(means[0]) != rows.shape[1]:
            raise ValueError(f"{name} must have dim={len(means[0])} like the classes before it, got {rows.shape[1]}")
        means.append(rows.mean(dim=0))
    return normalize_rows("mean of class_prompts", torch.stack(means), zero=zero).numpy()


def zero_shot_accuracy(
    images: Float[Array, "n dim"],
    class_prompts: Float[Array, "classes prompts dim"] | Sequence[Float[Array, "prompts dim"]],
    labels: Int[Array, " n"],
    *,
    chunk: int = 2048,
    zero: ZeroPolicy = "error",
) -> float:
    """Share of images whose class vector is the nearest by cosine; equal cosines go to the smallest class.

    Args:
        images: ``(N, d)`` image embeddings.
        class_prompts: prompts of every class, as in :func:`zero_shot_classifier`.
        labels: ``(N,)`` row of the right class.
        chunk: rows per block.
        zero: as in :func:`headgate.evaluate.search`.

    Raises:
        TypeError: labels are not integers.
        ValueError: bad shapes or values, or a label that no class has.
    """
    classes = zero_shot_classifier(class_prompts, zero=zero)
    num_images, _ = check_matrix("images", images)
    wanted = as_labels("labels", labels, length=num_images)
    if wanted.min() < 0 or wanted.max() >= len(classes):
        raise ValueError(
            f"labels must lie in [0, {len(classes) - 1}] for {len(classes)} classes, "
            f"got {wanted.min()} to {wanted.max()}"
        )
    predicted = search(images, classes, 1, chunk=chunk, zero=zero).ids[:, 0]
    return float((predicted == wanted).mean())
