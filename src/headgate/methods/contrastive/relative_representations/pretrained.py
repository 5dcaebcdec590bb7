"""The claim at the paper's scale: pretrained image models on CIFAR-100, frozen, with the paper's head (Section 5.3).

Features of all images are computed once per model and cached. Anchors: 768 training images, seed 42. Head: scaled to length
1, LayerNorm, 768 units with tanh, normalised over the batch, 20 coarse classes; Adam at 1e-4, batches of 32, 10 epochs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data import Cifar, stream_generator
from headgate.data.folders import data_folder
from headgate.errors import HeadgateError
from headgate.evaluate import Procrustes, stitching_matrix
from headgate.measurement import Measurement
from headgate.methods.contrastive.relative_representations.anchors import select_anchors
from headgate.methods.contrastive.relative_representations.exchange import device, train
from headgate.methods.contrastive.relative_representations.head import StitchingHead
from headgate.methods.contrastive.relative_representations.projection import RelativeProjection
from headgate.train import base_model, seeded

__all__ = ["PretrainedScale", "measure_pretrained"]

_ANCHOR_SEED = 42
Part = Literal["train", "test", "noise"]


@dataclass(frozen=True)
class PretrainedScale:
    """How large the experiment is.

    Attributes:
        names: timm's names of the pretrained models.
        anchors: K, and the hidden units of the head.
        epochs: of a head.
        labels: ``"coarse"`` (10 epochs in the paper) or ``"fine"`` (20).
        batch_size: items per update.
        rate: learning rate.
    """

    names: tuple[str, ...]
    anchors: int
    epochs: int
    labels: Literal["coarse", "fine"] = "coarse"
    batch_size: int = 32
    rate: float = 1e-4


def measure_pretrained(arm: str, seed: int, settings: PretrainedScale) -> Measurement:
    """One arm with one seed of the heads."""
    folder = data_folder("cifar100")
    known, new = Cifar(folder, "train", settings.labels), Cifar(folder, "test", settings.labels)
    tables, seconds = [], 0.0
    for name in settings.names:
        table, taken = _features(name, known, new, settings.anchors)
        tables.append(table)
        seconds += taken
    codes = [_code(arm, number, table, settings) for number, table in enumerate(tables)]
    heads = []
    for code in codes:
        features = code("train")
        with seeded(seed):
            head = StitchingHead(
                features.shape[1],
                len(known.class_names),
                hidden_dim=settings.anchors,
                normalize=True,
                unit_norm="batch",
            )
        steps = settings.epochs * (len(features) // settings.batch_size)
        heads.append(
            train(
                head,
                (features, known.labels),
                F.cross_entropy,
                steps=steps,
                rate=settings.rate,
                batch_size=settings.batch_size,
                seed=seed,
            )
        )
    rotates = arm == "procrustes"
    matrix = stitching_matrix(
        codes,
        heads,
        "test",
        new.labels,
        _weighted_f1,
        Procrustes() if rotates else None,
        "anchors" if rotates else None,
    )
    return Measurement(
        {"posthoc_same": matrix.diagonal, "posthoc_stitched": matrix.off_diagonal},
        notes={"pairs that cannot be stitched": len(matrix.undefined)},
        base_seconds=seconds,
    )


class _FeatureTable(nn.Module):
    """A model's features of all images and of noise, so that arms and seeds can share them."""

    train_features: Tensor
    test_features: Tensor
    noise_features: Tensor

    def __init__(self, dim: int, counts: dict[Part, int]) -> None:
        super().__init__()
        for part, count in counts.items():
            self.register_buffer(f"{part}_features", torch.zeros(count, dim))


def _features(name: str, known: Cifar, new: Cifar, anchors: int) -> tuple[_FeatureTable, float]:
    timm = _timm()
    dim = int(timm.create_model(name, pretrained=False, num_classes=0).num_features)
    counts: dict[Part, int] = {"train": len(known), "test": len(new), "noise": anchors}
    noise = torch.randint(256, (anchors, 3, 32, 32), generator=stream_generator(0, "noise"), dtype=torch.uint8)
    images: dict[Part, Tensor] = {"train": known.images, "test": new.images, "noise": noise}

    def fill(table: nn.Module) -> None:
        model = timm.create_model(name, pretrained=True, num_classes=0).eval().to(device())
        config = timm.data.resolve_data_config({}, model=model)
        for part, pixels in images.items():
            getattr(table, f"{part}_features").copy_(_embed(model, pixels, config))

    described = {"model": name, "counts": counts, "dim": dim, "recipe": 1}
    return base_model(f"relative-representations-{name}", lambda: _FeatureTable(dim, counts), fill, described)


@torch.no_grad()
def _embed(
    model: nn.Module, pixels: UInt8[Tensor, "n 3 height width"], config: dict[str, Any], chunk: int = 64
) -> Float[Tensor, "n dim"]:
    """Features of images that are enlarged, cropped and standardised as the model expects it."""
    size = int(config["input_size"][-1])
    large = int(size / config["crop_pct"])
    margin = (large - size) // 2
    mean, std = (torch.tensor(config[key], device=device())[:, None, None] for key in ("mean", "std"))
    parts = []
    for start in range(0, len(pixels), chunk):
        images = pixels[start : start + chunk].to(device()).float() / 255
        images = F.interpolate(images, (large, large), mode=config["interpolation"], antialias=True).clamp(0, 1)
        images = images[:, :, margin : margin + size, margin : margin + size]
        parts.append(model((images - mean) / std).cpu())
    return torch.cat(parts)


def _code(arm: str, number: int, table: _FeatureTable, settings: PretrainedScale) -> Callable[[str], Tensor]:
    """Part → what a head reads; the part ``"anchors"`` for rotations."""
    seed = _ANCHOR_SEED + (number + 1 if arm == "other_anchors" else 0)
    chosen = np.asarray(select_anchors(range(len(table.train_features)), k=settings.anchors, seed=seed))
    anchors = table.noise_features if arm == "noise_anchors" else table.train_features[torch.from_numpy(chosen)]
    parts = {"train": table.train_features, "test": table.test_features, "anchors": anchors}
    if arm in ("absolute", "procrustes"):
        return parts.__getitem__
    projection = RelativeProjection(anchors)
    return lambda part: projection.transform(parts[part])


def _weighted_f1(labels: Any, scores: Any) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(np.asarray(labels), scores.argmax(dim=1).numpy(), average="weighted"))


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise HeadgateError("the scale 'paper' needs pretrained models out of timm: pip install timm") from error
