"""Which layer of an encoder, at which noise, tells most: a linear probe in every cell of a grid.

The protocol of papers on diffusion features (arXiv 2303.09769, 2307.08702): features are pooled, standardised, and read by
multinomial logistic regression. The encoder is anything that maps a batch of images to (layer, time) → features, such as
:class:`headgate.nn.diffusion.DiffusionFeatures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from headgate.evaluate.checks import Array, as_labels, check_count
from headgate.evaluate.logistic import fit_logistic
from headgate.evaluate.probe_data import Scaler

__all__ = ["GridCell", "collect_grid", "grid_probe", "probe_grid"]

Encoder: TypeAlias = Callable[[Tensor], Mapping[tuple[Any, float], Tensor]]
GridFeatures: TypeAlias = dict[tuple[Any, float], np.ndarray]


class GridCell(NamedTuple):
    """One row of the table.

    Attributes:
        layer: of the encoder.
        t: time.
        target: name of the labels.
        accuracy: on the test images.
        dim: numbers per image.
        correct: which of the test images are read rightly, ``(n,)``.
    """

    layer: Any
    t: float
    target: str
    accuracy: float
    dim: int
    correct: Bool[np.ndarray, " n"]


def grid_probe(
    encoder: Encoder,
    train: tuple[Tensor, Array | Mapping[str, Array]],
    test: tuple[Tensor, Array | Mapping[str, Array]],
    layers: Sequence[Any] | None = None,
    timesteps: Sequence[float] | None = None,
    *,
    C: float = 1.0,
    max_iter: int = 300,
    batch_size: int = 256,
) -> list[GridCell]:
    """Probe every layer at every time.

    Args:
        encoder: images → (layer, time) → features.
        train: images ``(n, ...)`` and their labels ``(n,)``, or name → labels for several targets.
        test: the same of other images.
        layers: which of the encoder's layers; default all.
        timesteps: which of its times; default all.
        C: inverse strength of the L2 penalty.
        max_iter: iterations of the solver.
        batch_size: images per call of the encoder.

    Returns:
        One row per layer, time and target, in the encoder's order.

    Raises:
        ValueError: lengths that differ, targets that differ, or a layer or time that the encoder does not give.
    """
    (train_images, train_labels), (test_images, test_labels) = train, test
    fitted = collect_grid(encoder, train_images, batch_size=batch_size)
    scored = collect_grid(encoder, test_images, batch_size=batch_size)
    known_layers, known_times = {key[0] for key in fitted}, {key[1] for key in fitted}
    for name, wanted, known in (("layers", layers, known_layers), ("timesteps", timesteps, known_times)):
        foreign = [] if wanted is None else [item for item in wanted if item not in known]
        if foreign:
            raise ValueError(f"{name} must be among those of the encoder, {sorted(known, key=str)}, got {foreign}")
    keys = [
        key for key in fitted if (layers is None or key[0] in layers) and (timesteps is None or key[1] in timesteps)
    ]
    return probe_grid(
        {key: fitted[key] for key in keys},
        train_labels,
        {key: scored[key] for key in keys},
        test_labels,
        C=C,
        max_iter=max_iter,
    )


def collect_grid(encoder: Encoder, images: Tensor, *, batch_size: int = 256) -> GridFeatures:
    """Run an encoder over images.

    Args:
        encoder: images → (layer, time) → features.
        images: ``(n, ...)``.
        batch_size: images per call.

    Returns:
        (layer, time) → ``(n, d)``; tokens and maps are averaged over places where the encoder does not pool them to
        ``(n, d)`` itself; maps that it pools to p × p cells should be flattened by the encoder.
    """
    check_count("batch_size", batch_size)
    parts: dict[tuple[Any, float], list[np.ndarray]] = {}
    for start in range(0, len(images), batch_size):
        for key, value in encoder(images[start : start + batch_size]).items():
            parts.setdefault(key, []).append(_flat(value).detach().float().cpu().numpy())
    return {key: np.concatenate(blocks) for key, blocks in parts.items()}


def probe_grid(
    train: Mapping[tuple[Any, float], np.ndarray],
    train_labels: Array | Mapping[str, Array],
    test: Mapping[tuple[Any, float], np.ndarray],
    test_labels: Array | Mapping[str, Array],
    *,
    C: float = 1.0,
    max_iter: int = 300,
) -> list[GridCell]:
    """Probe features that are there already; arguments and result as of :func:`grid_probe`."""
    fitted, scored = _targets(train_labels), _targets(test_labels)
    if set(fitted) != set(scored):
        raise ValueError(f"train and test must have the same targets, got {sorted(fitted)} and {sorted(scored)}")
    rows = []
    for key, features in train.items():
        scaler = Scaler.fit(features, np.arange(len(features)), "standardize")
        x, x_test = scaler(features), scaler(test[key])
        for target, labels in fitted.items():
            wanted = as_labels(f"train labels {target!r}", labels, length=len(x))
            truth = as_labels(f"test labels {target!r}", scored[target], length=len(x_test))
            model = fit_logistic(x, wanted, C, max_iter=max_iter, tol=1e-4)
            predicted = model.classes[model.decide(x_test).argmax(axis=1)]
            correct = predicted == truth
            rows.append(GridCell(key[0], key[1], target, float(correct.mean()), features.shape[1], correct))
    return rows


def _targets(labels: Array | Mapping[str, Array]) -> dict[str, Array]:
    return dict(labels) if isinstance(labels, Mapping) else {"label": labels}


def _flat(features: Tensor) -> Tensor:
    if features.dim() == 2:
        return features
    if features.dim() == 3:
        return features.mean(dim=1)
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    raise ValueError(f"the encoder must give (n, d), tokens or maps, got shape {tuple(features.shape)}")
