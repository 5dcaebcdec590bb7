"""The published training recipes, as data.

``imagenet`` is the command of the repository's README, ``imagenet_paper`` what the paper's text says where the two differ,
``small_images`` and ``fine_grained`` are the fine-tuning script on CIFAR-10 and CIFAR-100, and on Oxford Pets and Flowers.
The schedule is stepped once an epoch. All parameters decay, norms and biases included; gradients are not clipped.

    recipe = RECIPES["imagenet"]
    model = headgate.create_model("crate_tiny")
    optimizer = recipe.optimizer(model)
    history = fit(model, ..., optimizer=optimizer, schedule=recipe.schedule(steps_per_epoch=2502))

with ``fit`` of :mod:`headgate.train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from headgate.train import Lion, make_optimizer
from headgate.validate import check_positive

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How a network was trained.

    Attributes:
        kind: of the optimizer.
        learning_rate: peak.
        weight_decay: decoupled, on all parameters.
        batch_size: images per step, over all devices.
        epochs: passes over the training images.
        warmup_epochs: those in which the learning rate rises; 0 for none.
        label_smoothing: of the cross-entropy.
        rand_augment_operations: of RandAugment, behind random resized crops of 224 pixels and flips; 0 for none.
        rand_augment_magnitude: its strength, in [0, 10]; the script's 14 is one of torchvision's 30 steps.
        precision: ``"bf16"``, where the authors mixed in fp16 with a loss scaler.
    """

    kind: Literal["lion", "adamw"]
    learning_rate: float
    weight_decay: float
    batch_size: int
    epochs: int
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    rand_augment_operations: int = 0
    rand_augment_magnitude: float = 0.0
    precision: Literal["no", "bf16"] = "bf16"

    def optimizer(self, model: nn.Module, learning_rate: float | None = None) -> torch.optim.Optimizer:
        """An optimizer over the model's trainable parameters.

        Args:
            model: any module.
            learning_rate: in place of the recipe's.
        """
        rate = self.learning_rate if learning_rate is None else learning_rate
        if self.kind == "lion":
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return Lion(trainable, rate, weight_decay=self.weight_decay)
        return make_optimizer(model, "adamw", rate, self.weight_decay, decay_norms_and_biases=True)

    def schedule(self, steps_per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a factor of its peak, by step: in epoch e, ``min((e + 1) / warmup, (1 + cos(πe/E)) / 2)``.

        The rise does not push the cosine back: both run from the first epoch.

        Args:
            steps_per_epoch: 2502 for ImageNet-1k in batches of 512.

        Returns:
            step → factor; beyond the last step it stays at 0.
        """
        check_positive(steps_per_epoch=steps_per_epoch)

        def factor(step: int) -> float:
            epoch = min(step // steps_per_epoch, self.epochs)
            fall = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            return min((epoch + 1) / self.warmup_epochs, fall) if self.warmup_epochs else fall

        return factor


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "imagenet": Recipe("lion", 2e-4, 0.05, batch_size=512, epochs=200, warmup_epochs=20, label_smoothing=0.1),
        "imagenet_paper": Recipe(
            "lion", 2.4e-4, 0.5, batch_size=2048, epochs=150, warmup_epochs=5, label_smoothing=0.1
        ),
        "small_images": Recipe("adamw", 5e-5, 0.01, 256, 200, rand_augment_operations=2, rand_augment_magnitude=14 / 3),
        "fine_grained": Recipe("adamw", 1e-4, 0.01, 256, 400, rand_augment_operations=2, rand_augment_magnitude=14 / 3),
    }
)
"""Name → recipe."""
