"""The paper's own experiment: CRATE-T and DeiT-T on ImageNet-1k, with the command of the published README.

Both go through the recipe ``imagenet`` (Lion, 200 epochs of random resized crops and flips); the published script trains
its ViTs with the same code.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.data import stream_generator
from headgate.data.augment import rand_augment
from headgate.data.imagenet import ImageFolders
from headgate.errors import DataError
from headgate.methods.vision.crate.model import CRATE, crate_tiny
from headgate.methods.vision.crate.recipe import Recipe
from headgate.nn import VisionTransformer, deit_tiny
from headgate.train import epoch_batches, fit

__all__ = ["build_classifier", "open_folders", "train_classifier"]


def open_folders(folder: Path) -> tuple[ImageFolders, ImageFolders]:
    """``train/`` and ``val/`` of ImageNet.

    Raises:
        DataError: a folder is missing or empty, or the two hold different classes.
    """
    train, test = ImageFolders(folder / "train"), ImageFolders(folder / "val")
    if train.class_names != test.class_names:
        raise DataError(f"{folder}: train/ and val/ must hold the same classes")
    return train, test


def build_classifier(arm: str, num_classes: int, **options: Any) -> CRATE | VisionTransformer:
    """CRATE-T, or DeiT-T in the arm ``vit_narrow``."""
    if arm == "crate":
        return crate_tiny(num_classes=num_classes, **options)
    return deit_tiny(num_classes=num_classes, **options)


def train_classifier(
    model: nn.Module, train: ImageFolders, recipe: Recipe, rate: float, size: int, seed: int
) -> list[float]:
    """Train in place on crops of ``size`` pixels, from scratch or to fine-tune; order and crops depend on the seed alone.

    Returns:
        The loss of every step.
    """
    change = None
    if recipe.rand_augment_operations:
        change = partial(
            rand_augment,
            magnitude=recipe.rand_augment_magnitude,
            deviation=0.0,
            operations=recipe.rand_augment_operations,
            probability=1.0,
        )
    shuffled = epoch_batches((torch.arange(len(train)),), recipe.batch_size, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        (chosen,) = shuffled(step)
        first = step * recipe.batch_size
        generators = [stream_generator(seed, "crop", first + place) for place in range(len(chosen))]
        return train.random_crops(chosen.tolist(), size, generators, change), train.labels[chosen]

    def loss(network: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(pair[0]), pair[1], label_smoothing=recipe.label_smoothing)

    history = fit(
        model,
        batch,
        loss,
        steps=recipe.epochs * shuffled.steps_per_epoch,
        optimizer=recipe.optimizer(model, rate),
        schedule=recipe.schedule(shuffled.steps_per_epoch),
        mixed_precision=recipe.precision,
        seed=seed,
    )
    return history.losses
