"""The published training recipe on ImageNet-1k, as data.

Common to all: AdamW, 300 epochs in batches of 1024, a linear rise over 20 epochs and a cosine fall, gradient clipping
at 5, label smoothing 0.1, RandAugment (two operations of magnitude 9 with deviation 0.5), mixup 0.8, cutmix 1.0, random
erasing 0.25, colour jitter 0.4; evaluation at 224 pixels. The published base rates are per 512 images, so the rates here
are twice those.

    recipe = RECIPES["vig_small"]
    model = headgate.create_model("vig_small")                     # its drop path is the recipe's
    optimizer = make_optimizer(model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay)
    history = fit(model, ..., optimizer=optimizer, schedule=recipe.schedule(steps_per_epoch=1251))

with ``make_optimizer`` and ``fit`` of :mod:`headgate.train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from headgate.validate import check_positive

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How one preset was trained.

    Attributes:
        learning_rate: peak, for batches of ``batch_size``.
        weight_decay: of AdamW; none on norms and biases.
        drop_path_rate: stochastic depth of the last block; the preset has it.
        precision: ``"fp32"``, or ``"bf16"`` where the authors mixed in fp16 with a loss scaler.
        batch_size: images per step, over all devices.
        epochs: passes over the training images.
        warmup_epochs: those in which the learning rate rises.
        warmup_learning_rate: from where it rises.
        final_learning_rate: to where it falls.
        max_grad_norm: of gradient clipping.
        label_smoothing: of the cross entropy.
        rand_augment_magnitude: strength of RandAugment, in [0, 10].
        rand_augment_deviation: its deviation per operation.
        mixup: α of mixup.
        cutmix: α of cutmix.
        random_erasing: probability.
        color_jitter: strength.
    """

    learning_rate: float
    weight_decay: float = 0.05
    drop_path_rate: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 1024
    epochs: int = 300
    warmup_epochs: int = 20
    warmup_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-5
    max_grad_norm: float = 5.0
    label_smoothing: float = 0.1
    rand_augment_magnitude: float = 9.0
    rand_augment_deviation: float = 0.5
    mixup: float = 0.8
    cutmix: float = 1.0
    random_erasing: float = 0.25
    color_jitter: float = 0.4

    def schedule(self, steps_per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a factor of its peak, by step.

        Args:
            steps_per_epoch: 1251 for ImageNet-1k.

        Returns:
            step → factor; beyond the last step it stays at its final value.
        """
        check_positive(steps_per_epoch=steps_per_epoch)
        warmup, steps = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        first, last = self.warmup_learning_rate / self.learning_rate, self.final_learning_rate / self.learning_rate

        def factor(step: int) -> float:
            if step < warmup:
                return first + (1 - first) * step / warmup
            progress = min(1.0, (step - warmup) / (steps - warmup))
            return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2

        return factor


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "vig_tiny": Recipe(2e-3),
        "vig_small": Recipe(1e-3, weight_decay=0.1, drop_path_rate=0.2),
        "vig_base": Recipe(2e-3, drop_path_rate=0.5),
        "vig_h_tiny": Recipe(1.6e-3, drop_path_rate=0.2, precision="bf16"),
        "vig_h_small": Recipe(1e-3, drop_path_rate=0.3, precision="bf16"),
        "vig_h_base": Recipe(1e-3, drop_path_rate=0.6, precision="bf16"),
    }
)
"""Preset → its recipe."""
