"""DeiT's recipe for training image classifiers on photographs in class folders.

Touvron et al., "Training data-efficient image transformers & distillation through attention" (arXiv 2012.12877), section 6
and table 9; with small changes it trains most vision transformers since, ConViT (arXiv 2103.10697) among them:

    recipe = ImageRecipe()
    history = train_image_classifier(model, ImageFolders(folder / "train"), recipe, seed=0)
    print(image_accuracy(model, ImageFolders(folder / "val"), recipe.size))

AdamW; the learning rate changes from epoch to epoch: it rises for five, falls along a cosine of 300, and stays at its end
for ten more. Every image is shown three times in a row, augmented differently (Hoffer et al., arXiv 1901.09335), so an epoch
sees a third of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from headgate.data.augment import mix_images, rand_augment, random_erasing
from headgate.data.imagenet import ImageFolders
from headgate.data.seeding import stream_generator
from headgate.train.loop import History, fit
from headgate.train.optimizers import make_optimizer
from headgate.validate import check_positive

__all__ = ["ImageRecipe", "RepeatedBatches", "image_accuracy", "train_image_classifier"]


@dataclass(frozen=True)
class ImageRecipe:
    """How a classifier is trained; the defaults are DeiT's, in batches of 512.

    Attributes:
        base_learning_rate: peak for 512 images a batch; it grows with the batch.
        batch_size: images per step, over all devices.
        weight_decay: of AdamW; none on norms, biases, other parameters of one axis, and what the model's
            ``no_weight_decay()`` names.
        epochs: length of the cosine, the rise included.
        warmup_epochs: epochs in which the learning rate rises.
        cooldown_epochs: epochs at the final learning rate, behind the others.
        warmup_learning_rate: from where it rises.
        final_learning_rate: to where it falls.
        repeats: how often an image is shown in a row; 1 for plain shuffling.
        size: side of the training crops in pixels.
        label_smoothing: of the cross-entropy.
        rand_augment_magnitude: strength of RandAugment, in [0, 10].
        rand_augment_deviation: its deviation per operation.
        mixup: α of mixup.
        cutmix: α of CutMix; one of the two is drawn per batch.
        random_erasing: probability.
        max_grad_norm: of gradient clipping; ``None`` for none.
        precision: ``"fp32"``, or ``"bf16"`` where the authors mixed in fp16 with a loss scaler.
    """

    base_learning_rate: float = 5e-4
    batch_size: int = 512
    weight_decay: float = 0.05
    epochs: int = 300
    warmup_epochs: int = 5
    cooldown_epochs: int = 10
    warmup_learning_rate: float = 1e-6
    final_learning_rate: float = 1e-5
    repeats: int = 3
    size: int = 224
    label_smoothing: float = 0.1
    rand_augment_magnitude: float = 9.0
    rand_augment_deviation: float = 0.5
    mixup: float = 0.8
    cutmix: float = 1.0
    random_erasing: float = 0.25
    max_grad_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "bf16"

    @property
    def learning_rate(self) -> float:
        """Peak learning rate for ``batch_size``."""
        return self.base_learning_rate * self.batch_size / 512

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.epochs + self.cooldown_epochs

    def schedule(self, steps_per_epoch: int) -> Callable[[int], float]:
        """The learning rate as a factor of its peak, by step; it changes with the epoch.

        Args:
            steps_per_epoch: 2502 for ImageNet-1k.

        Returns:
            step → factor; beyond the last epoch it stays at its final value.
        """
        check_positive(steps_per_epoch=steps_per_epoch)
        first, last = self.warmup_learning_rate / self.learning_rate, self.final_learning_rate / self.learning_rate

        def factor(step: int) -> float:
            epoch = step // steps_per_epoch
            if epoch < self.warmup_epochs:
                return first + (1 - first) * epoch / self.warmup_epochs
            progress = min(1.0, epoch / self.epochs)
            return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2

        return factor


class RepeatedBatches:
    """Places of a training set, step by step: shuffled every epoch, each place several times in a row.

    Args:
        count: size of the set.
        batch_size: places a step.
        seed: the order of an epoch comes from (seed, epoch) alone.
        repeats: how often a place is given in a row.

    Attributes:
        steps_per_epoch: whole batches in ``count`` places; an epoch meets ``1 / repeats`` of the set.

    Raises:
        ValueError: a number is not positive, or the set fills no batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, repeats: int = 3) -> None:
        check_positive(count=count, batch_size=batch_size, repeats=repeats)
        if count < batch_size:
            raise ValueError(f"count must fill one batch, got {count} for batch_size={batch_size}")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = repeats
        self.steps_per_epoch = count // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Int64[Tensor, " batch"]:
        """The places of one step, counted over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self.count, generator=stream_generator(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, order.repeat_interleave(self.repeats)[: self.count]
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def train_image_classifier(
    model: nn.Module,
    images: ImageFolders,
    recipe: ImageRecipe,
    seed: int,
    *,
    places: Int64[Tensor, " kept"] | None = None,
) -> History:
    """Train in place, on the model's device. Order and augmentation depend on the seed alone.

    Args:
        model: images → logits of ``len(images.class_names)`` classes; it may have ``no_weight_decay()``.
        images: the training set.
        recipe: how.
        seed: of everything random.
        places: the images to train on; default all.

    Returns:
        The loss of every step, and the time.

    Raises:
        DataError: an image cannot be decoded.
        ValueError: fewer images than one batch.
    """
    places = torch.arange(len(images)) if places is None else places
    batches = RepeatedBatches(len(places), recipe.batch_size, seed, recipe.repeats)
    classes = len(images.class_names)
    change = partial(rand_augment, magnitude=recipe.rand_augment_magnitude, deviation=recipe.rand_augment_deviation)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = places[batches(step)]
        draws = [stream_generator(seed, "augmentation", step * recipe.batch_size + i) for i in range(len(chosen))]
        crops = images.random_crops(chosen.tolist(), recipe.size, draws, change)
        crops = random_erasing(crops, stream_generator(seed, "erasing", step), probability=recipe.random_erasing)
        return mix_images(
            crops,
            images.labels[chosen],
            classes,
            stream_generator(seed, "mixing", step),
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
            label_smoothing=recipe.label_smoothing,
        )

    spared: set[str] = getattr(model, "no_weight_decay", set)()
    overrides = {name: {"weight_decay": 0.0} for name in sorted(spared)}
    return fit(
        model,
        batch,
        lambda network, pair: F.cross_entropy(network(pair[0]), pair[1]),
        steps=recipe.total_epochs * batches.steps_per_epoch,
        optimizer=make_optimizer(model, "adamw", recipe.learning_rate, recipe.weight_decay, overrides=overrides),
        schedule=recipe.schedule(batches.steps_per_epoch),
        clip_norm=recipe.max_grad_norm,
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        seed=seed,
    )


@torch.no_grad()
def image_accuracy(model: nn.Module, images: ImageFolders, size: int = 224, batch_size: int = 64) -> float:
    """Share of central crops of ``size`` pixels that are classified right, on the model's device, in evaluation mode."""
    device = next(model.parameters()).device
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    hits = 0
    for chosen in torch.arange(len(images)).split(batch_size):
        answers = model(images.central_crops(chosen.tolist(), size).to(device)).argmax(dim=1).cpu()
        hits += int((answers == images.labels[chosen]).sum())
    for part, mode in modes:
        part.training = mode
    return hits / len(images)
