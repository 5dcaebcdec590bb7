"""How heads are trained: SGD without momentum or decay, cross-entropy, a tenth of the learning rate after every 7 epochs.

The recipe of soumik-kanad/diffssl (28 epochs, four devices of 32 images, random flips, central crops); that of the first
paper is not published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.data.seeding import stream_generator
from headgate.train import History, epoch_batches, fit
from headgate.validate import check_positive

__all__ = ["HEAD_RECIPES", "HeadRecipe", "central_crop", "flip_images", "train_head"]


@dataclass(frozen=True)
class HeadRecipe:
    """How a head is trained.

    Attributes:
        learning_rate: 1e-2 for linear heads, 5e-2 for attention, 1e-3 where the encoder is trained, too.
        epochs: passes over the data.
        batch_size: images per step, over all devices.
        decay_every: epochs between falls of the learning rate.
        decay: factor of each fall.
        flip: whether images are mirrored at random.
        crop: side of the central crop, or none.
        finetune: whether the encoder is trained, too.
    """

    learning_rate: float = 1e-2
    epochs: int = 28
    batch_size: int = 128
    decay_every: int = 7
    decay: float = 0.1
    flip: bool = True
    crop: int | None = None
    finetune: bool = False


HEAD_RECIPES = {
    "linear": HeadRecipe(),
    "attention": HeadRecipe(learning_rate=5e-2),
    "feedback": HeadRecipe(batch_size=16),
    "finetune": HeadRecipe(learning_rate=1e-3, finetune=True),
}
"""The published settings: linear head, attention head and DifFormer, DifFeed, and training the encoder along."""

Read = Callable[[Tensor], Any]
"""Images → what the head takes."""


def train_head(
    head: nn.Module,
    read: Read,
    data: tuple[Float[Tensor, "n channels height width"], Int[Tensor, " n"]] | Iterable[Any],
    recipe: HeadRecipe | None = None,
    *,
    encoder: nn.Module | None = None,
    seed: int = 0,
) -> History:
    """Train a head in place on features that are read anew, with fresh noise, at every step.

    Args:
        head: gives logits.
        read: images → what the head takes.
        data: images and labels as two tensors; or a re-iterable of such batches, such as a ``DataLoader``, whose batch
            size and augmentation are its own.
        recipe: default: the linear head's.
        encoder: the denoiser, which is trained, too, where ``recipe.finetune`` says so; ``read`` must keep gradients.
        seed: of order, flips, dropout, and noise that is drawn from the global generator.

    Returns:
        The losses.

    Raises:
        ValueError: fine-tuning without an encoder, no data, or an empty loader.
    """
    recipe = HeadRecipe() if recipe is None else recipe
    check_positive(epochs=recipe.epochs, decay_every=recipe.decay_every, learning_rate=recipe.learning_rate)
    if recipe.finetune and encoder is None:
        raise ValueError("encoder must be given where the recipe fine-tunes it, got None")
    trained = _Trained(head, read, encoder if recipe.finetune else None)
    if isinstance(data, tuple):
        batches: Any = epoch_batches(data, batch_size=min(recipe.batch_size, len(data[0])), seed=seed)
        per_epoch = batches.steps_per_epoch
    else:
        batches, per_epoch = data, sum(1 for _ in data)
    if per_epoch == 0:
        raise ValueError("data must hold at least one batch, got none")
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=recipe.learning_rate)
    flips = stream_generator(seed, "flips")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch[0], batch[1]
        if recipe.crop is not None:
            images = central_crop(images, recipe.crop)
        if recipe.flip:
            images = flip_images(images, flips)
        return nn.functional.cross_entropy(model(images), labels)

    return fit(
        trained,
        batches,
        loss,
        steps=recipe.epochs * per_epoch,
        optimizer=optimizer,
        schedule=lambda step: recipe.decay ** (step // per_epoch // recipe.decay_every),
        seed=seed,
    )


def flip_images(
    images: Float[Tensor, "batch channels height width"], generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Mirror every other image, at random."""
    chosen = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images)


def central_crop(
    images: Float[Tensor, "batch channels height width"], size: int
) -> Float[Tensor, "batch channels size size"]:
    """The square of ``size`` pixels in the middle.

    Raises:
        ValueError: smaller images.
    """
    height, width = images.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"size must not exceed the images' sides, got size={size} for {height}×{width}")
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, :, top : top + size, left : left + size]


class _Trained(nn.Module):
    """What is trained, and how logits come about: the wrapper of several processes has to see the whole of it."""

    def __init__(self, head: nn.Module, read: Read, encoder: nn.Module | None) -> None:
        super().__init__()
        self.head = head
        self.encoder = encoder
        self.read = read

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.read(images))
