"""Beside the classifiers: how alike blocks, times and networks are, and features that are kept on disk."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from headgate.evaluate import Features, cka
from headgate.evaluate.features import FeatureWriter
from headgate.nn.diffusion import DiffusionFeatures, pool_features

__all__ = ["block_similarity", "cache_features"]


def block_similarity(
    first: Mapping[Any, np.ndarray | Tensor],
    second: Mapping[Any, np.ndarray | Tensor] | None = None,
    *,
    debiased: bool = True,
) -> Float[np.ndarray, "first second"]:
    """Linear CKA of every pair of features, of blocks, times or other networks, over the same images.

    Args:
        first: name → features ``(n, d)``; tokens and maps are averaged over places. Some 2,000 images should do.
        second: the same to compare with; default ``first`` itself.
        debiased: the unbiased estimate; without, the one in most publications, which grows with d / n.

    Returns:
        ``(len(first), len(second))``.

    Raises:
        ValueError: no features, or another number of images.
    """
    rows = {name: _flat(value) for name, value in first.items()}
    columns = rows if second is None else {name: _flat(value) for name, value in second.items()}
    if not rows or not columns:
        raise ValueError("first and second must hold features, got none")
    return np.array([[cka(x, y, debiased=debiased) for y in columns.values()] for x in rows.values()])


def cache_features(
    encoder: DiffusionFeatures,
    loader: Iterable[Any],
    folder: str | os.PathLike[str],
    pool: int | str = "mean",
) -> dict[tuple[Any, float], Features]:
    """Run an encoder over a loader once and keep pooled features on disk, in float16.

    A map of 1024 × 16 × 16 takes half a megabyte, pooled to 2 × 2 cells eight kilobytes.

    Args:
        encoder: without a generator of its own its noise, and so its features, are other ones at every run; a warning
            says so.
        loader: batches (images, labels) in a fixed order.
        folder: one file per layer and time is written there, whole or not at all.
        pool: ``"mean"``, or cells per side.

    Returns:
        (layer, time) → features, memory-mapped.

    Raises:
        ValueError: an empty loader, or features that float16 cannot hold.
    """
    if encoder.generator is None:
        warnings.warn("features are cached from noise without a generator: no run repeats them", stacklevel=2)
    folder = Path(folder)
    labels: list[np.ndarray] = []
    paths: dict[tuple[Any, float], Path] = {}
    with contextlib.ExitStack() as stack:
        writers: dict[tuple[Any, float], FeatureWriter] = {}
        for images, targets in loader:
            labels.append(np.asarray(targets))
            for key, value in encoder(images).items():
                if key not in writers:
                    paths[key] = folder / f"{str(key[0]).replace('/', '_')}-{key[1]:g}.safetensors"
                    writers[key] = stack.enter_context(FeatureWriter(paths[key]))
                pooled = value if value.dim() == 2 else pool_features(value, pool)  # type: ignore[arg-type]
                writers[key].append(pooled.flatten(1).cpu().numpy())
        if not writers:
            raise ValueError("loader must hold at least one batch, got none")
        y = np.concatenate(labels)
        for key, writer in writers.items():
            writer.finish(y, np.arange(len(y)), {"layer": str(key[0]), "t": key[1], "pooling": str(pool)})
    return {key: Features.open(path) for key, path in paths.items()}


def _flat(features: np.ndarray | Tensor) -> np.ndarray:
    array = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if array.ndim == 2:
        return array
    return array.mean(axis=1) if array.ndim == 3 else array.mean(axis=(2, 3))
