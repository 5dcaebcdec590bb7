"""The paper's own experiment: ViG-T and DeiT-T on ImageNet-1k, then tested on images larger than those of the training.

Every arm goes through ViG's recipe (:data:`~headgate.methods.vision.vig.recipe.RECIPES`), with the learning rate and the
stochastic depth that its own authors give: DeiT-T (Touvron et al., arXiv 2012.12877) 1e-3 and 0.1, ViG-T 2e-3 and 0. The
recipe's colour jitter is not used, as in the authors' pipeline, which leaves it out where there is RandAugment.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.data import stream_generator
from headgate.data.augment import mix_images, rand_augment, random_erasing
from headgate.data.imagenet import ImageFolders
from headgate.errors import DataError
from headgate.methods.vision.vig.experiments import LAYER_OPTIONS
from headgate.methods.vision.vig.recipe import Recipe
from headgate.methods.vision.vig.vig import ViG, vig_tiny
from headgate.nn import VisionTransformer, deit_tiny
from headgate.train import epoch_batches, fit, make_optimizer

__all__ = ["accuracy_at", "build_classifier", "open_splits", "train_classifier"]


def open_splits(folder: Path) -> tuple[ImageFolders, ImageFolders]:
    """``train/`` and ``val/`` of ImageNet.

    Raises:
        DataError: a folder is missing or empty, or the two hold different classes.
    """
    train, test = ImageFolders(folder / "train"), ImageFolders(folder / "val")
    if train.class_names != test.class_names:
        raise DataError(
            f"{folder}: train/ and val/ must hold the same classes, "
            f"got {len(train.class_names)} and {len(test.class_names)}"
        )
    return train, test


def build_classifier(arm: str, **options: Any) -> ViG | VisionTransformer:
    """The model of an arm.

    Args:
        arm: ``"vit"`` for DeiT-T, or what is taken from ViG-T's layers.
        **options: further keywords of the model.
    """
    if arm == "vit":
        return deit_tiny(**{"drop_path_rate": 0.1, **options})
    without_grid: Mapping[str, Any] = {} if LAYER_OPTIONS[arm].get("locality", True) else {"conv_act": None}
    return vig_tiny(**{**LAYER_OPTIONS[arm], **without_grid, **options})


def train_classifier(
    model: ViG | VisionTransformer, train: ImageFolders, recipe: Recipe, rate: float, size: int, seed: int
) -> list[float]:
    """Train in place on crops of ``size`` pixels; order and augmentation depend on the seed alone.

    Returns:
        The loss of every step.
    """
    shuffled = epoch_batches((torch.arange(len(train)),), recipe.batch_size, seed)
    classes = len(train.class_names)
    change = partial(rand_augment, magnitude=recipe.rand_augment_magnitude, deviation=recipe.rand_augment_deviation)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = shuffled(step)[0]
        generators = [
            stream_generator(seed, "augmentation", step * recipe.batch_size + place) for place in range(len(chosen))
        ]
        images = train.random_crops(chosen.tolist(), size, generators, change)
        images = random_erasing(images, stream_generator(seed, "erasing", step), probability=recipe.random_erasing)
        return mix_images(
            images,
            train.labels[chosen],
            classes,
            stream_generator(seed, "mixing", step),
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            label_smoothing=recipe.label_smoothing,
        )

    def loss(network: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(pair[0]), pair[1])

    undecayed = {name: {"weight_decay": 0.0} for name in model.no_weight_decay()}
    history = fit(
        model,
        batch,
        loss,
        steps=recipe.epochs * shuffled.steps_per_epoch,
        optimizer=make_optimizer(model, "adamw", rate, recipe.weight_decay, overrides=undecayed),
        schedule=recipe.schedule(shuffled.steps_per_epoch),
        clip_norm=recipe.max_grad_norm,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        seed=seed,
    )
    return history.losses


@torch.no_grad()
def accuracy_at(model: nn.Module, images: ImageFolders, size: int, batch_size: int = 64) -> float:
    """Share of central crops of ``size`` pixels that are classified right, on the model's device."""
    device = next(model.parameters()).device
    model.eval()
    hits = 0
    for chosen in torch.arange(len(images)).split(batch_size):
        crops: Float[Tensor, "batch 3 size size"] = images.central_crops(chosen.tolist(), size)
        answers = model(crops.to(device)).argmax(dim=1).cpu()
        hits += int((answers == images.labels[chosen]).sum())
    return hits / len(images)
