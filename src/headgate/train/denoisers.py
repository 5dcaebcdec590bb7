"""Small denoisers that experiments stand on: trained once by a fixed recipe, then read from the cache.

``toy_dit`` is a diffusion transformer on 8 × 8 × 8 latents (:class:`~headgate.data.patch_codecs.PatchPCA`) of the pictures of
:mod:`headgate.data.shape_pictures`: straight flow, AdamW with a one-cycle schedule, averaged weights, labels dropped at a
tenth so that the null label is trained, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from headgate.data.patch_codecs import PatchPCA
from headgate.data.seeding import portable_normal, stream_generator
from headgate.data.shape_pictures import shape_pictures
from headgate.nn.diffusion import DiT, LinearFlow, denoising_loss
from headgate.train.cache import base_model
from headgate.train.ema import EMA
from headgate.train.loop import History, fit
from headgate.train.optimizers import make_optimizer
from headgate.train.schedules import one_cycle

__all__ = ["ToyDenoiser", "ToyRecipe", "toy_codec", "toy_dit", "train_denoiser"]

_REVISION = 1
"""To be raised whenever the code below changes what comes out."""


@dataclass(frozen=True)
class ToyRecipe:
    """How the toy is built and trained.

    Attributes:
        preset: of the pictures.
        seed: of pictures, weights and noise.
        steps: updates.
        depth: blocks.
        dim: channels.
        num_heads: attention heads.
        batch_size: pictures per step.
        learning_rate: peak.
        decay: of the averaged weights.
        drop_label: share of labels that become null; 1 for an unconditional model.
        num_images: size of the training set.
    """

    preset: str = "large"
    seed: int = 0
    steps: int = 1200
    depth: int = 4
    dim: int = 64
    num_heads: int = 4
    batch_size: int = 64
    learning_rate: float = 2e-3
    decay: float = 0.99
    drop_label: float = 0.1
    num_images: int = 8000


class ToyDenoiser(NamedTuple):
    """A trained toy.

    Attributes:
        model: with the averaged weights, in evaluation mode; 16 classes and null.
        codec: of its latents.
        path: a :class:`~headgate.nn.diffusion.LinearFlow`.
        seconds: that the training took when it was done.
    """

    model: DiT
    codec: PatchPCA
    path: LinearFlow
    seconds: float


def toy_dit(recipe: ToyRecipe | None = None) -> ToyDenoiser:
    """The toy of a recipe, from the cache or newly trained (a quarter of a minute to a minute on a core)."""
    recipe = ToyRecipe() if recipe is None else recipe
    codec = toy_codec(recipe.preset)

    def build() -> DiT:
        return DiT(8, 2, 8, recipe.dim, recipe.depth, recipe.num_heads, num_classes=16)

    def train(model: DiT) -> None:
        pictures = shape_pictures(recipe.num_images, recipe.seed, recipe.preset, "denoiser")
        train_denoiser(model, codec.encode(pictures.images), pictures.label, recipe)

    model, seconds = base_model("toy_dit", build, train, {**asdict(recipe), "revision": _REVISION})
    return ToyDenoiser(model, codec, LinearFlow(), seconds)


def toy_codec(preset: str = "large") -> PatchPCA:
    """The toys' codec: components of 2,000 pictures."""
    return PatchPCA(shape_pictures(2000, 0, preset, "codec").images)


def train_denoiser(
    model: nn.Module,
    x0: Tensor,
    labels: Tensor | None,
    recipe: ToyRecipe,
    loss: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
) -> History:
    """Train a denoiser of a straight flow in place; it ends with the averaged weights.

    Args:
        model: called with (x_t, t) or, where labels are given, (x_t, t, labels); its ``null_label`` stands for no label.
        x0: images or latents ``(n, channels, height, width)``.
        labels: ``(n,)`` classes, or ``None`` for a model without.
        recipe: batch size, steps, learning rate, decay, share of dropped labels and seed are used.
        loss: ``loss(model, x0, noise, t, labels)`` in place of the squared error of the velocity.

    Returns:
        The losses.
    """
    path = LinearFlow()
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, learning_rate=recipe.learning_rate)

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Everything random of one step, on the CPU: the same for any model."""
        generator = stream_generator(recipe.seed, "train_denoiser", step)
        rows = torch.randint(len(x0), (recipe.batch_size,), generator=generator)
        noise = portable_normal((recipe.batch_size, *x0.shape[1:]), generator)
        t = torch.rand(recipe.batch_size, generator=generator)
        dropped = torch.rand(recipe.batch_size, generator=generator) < recipe.drop_label
        told = None
        if labels is not None:
            null = getattr(model, "null_label", None)
            if null is None and recipe.drop_label > 0:
                raise ValueError("drop_label must be 0 for a model without null_label")
            told = labels[rows] if null is None else torch.where(dropped, null, labels[rows])
        return x0[rows], noise, t, told

    def step_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Tensor:
        clean, noise, t = (part.to(device) for part in batch[:3])
        told = None if batch[3] is None else batch[3].to(device)
        if loss is not None:
            return loss(model, clean, noise, t, told)
        return denoising_loss(
            lambda x, time: model(x, time) if told is None else model(x, time, told), path, clean, noise, t
        )

    average = EMA(model, recipe.decay)
    with average.following(optimizer):
        history = fit(
            model,
            draw,
            step_loss,
            steps=recipe.steps,
            optimizer=optimizer,
            schedule=one_cycle(recipe.steps),
            clip_norm=1.0,
            seed=recipe.seed,
        )
    average.copy_to(model)
    return history
