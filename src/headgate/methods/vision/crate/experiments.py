"""Networks, data and training of the claim.

All arms share CRATE's shell: patches, norms, class token, positions and head, with their initial weights where the width is
the same, data and their order, and the training. What differs are the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from headgate.data import CIFAR10_MEAN, CIFAR10_STD, Cifar, load_digits_images, random_crop_flip, stream_generator
from headgate.data.augment import rand_augment
from headgate.data.folders import data_folder
from headgate.errors import MissingExtraError
from headgate.evaluate import LayerModules
from headgate.methods.vision.crate.attention import MSSA
from headgate.methods.vision.crate.block import PreNorm
from headgate.methods.vision.crate.ista import ISTA
from headgate.methods.vision.crate.model import CRATE
from headgate.nn import FeedForward, MultiHeadAttention, TransformerBlock
from headgate.train import cache_folder, epoch_batches, fit, make_optimizer, seeded, warmup_cosine

__all__ = [
    "ARMS",
    "ImageData",
    "Sizes",
    "Training",
    "attention_modules",
    "build_network",
    "cifar_images",
    "digit_images",
    "image_accuracy",
    "rate_layers",
    "train_network",
]

ARMS = ("crate", "vit_narrow", "vit", "attention", "mlp", "no_threshold", "frozen")
"""Which layers: CRATE's; a ViT's with as many parameters; a ViT's of the same width; CRATE's with plain attention, with an
MLP and its skip in place of ISTA, with λ = 0, and with random dictionaries that are not trained."""

_AT_ONCE = 200
_NUM_HELD_OUT = 5000


@dataclass(frozen=True)
class Sizes:
    """How large the networks are.

    Attributes:
        dim: channels.
        depth: layers.
        heads: of every layer.
        narrow_dim: channels of the arm ``vit_narrow``: half of ``dim`` gives a layer as many parameters as CRATE's.
        patch_size: side of a patch in pixels.
    """

    dim: int
    depth: int
    heads: int
    narrow_dim: int
    patch_size: int


@dataclass(frozen=True)
class Training:
    """How the networks are trained, whatever the arm. AdamW; the learning rate alone is the arm's own.

    Attributes:
        batch_size: images per update.
        steps: updates; the learning rate falls along a cosine.
        warmup: updates in which it rises before.
        weight_decay: none on norms, biases, class token and positions.
        label_smoothing: of the cross-entropy.
    """

    batch_size: int
    steps: int
    warmup: int = 0
    weight_decay: float = 0.05
    label_smoothing: float = 0.0


class ImageData(NamedTuple):
    """Images to learn from and images to be scored on.

    Attributes:
        train: pixels as they are stored.
        train_labels: their classes.
        test: the same.
        test_labels: the same.
        mean: per channel, of the pixels.
        std: the same.
        augmentation: what is done to training images: nothing, shifts by up to 4 pixels and mirrors (``"crop"``), or those
            and RandAugment (``"rand"``).
    """

    train: Shaped[Tensor, "n chans height width"]
    train_labels: Int64[Tensor, " n"]
    test: Shaped[Tensor, "m chans height width"]
    test_labels: Int64[Tensor, " m"]
    mean: Float[Tensor, "chans 1 1"]
    std: Float[Tensor, "chans 1 1"]
    augmentation: str = "none"

    def standardize(
        self, images: Shaped[Tensor, "batch chans height width"]
    ) -> Float[Tensor, "batch chans height width"]:
        """Pixels of mean 0 and deviation 1."""
        return (images.float() - self.mean) / self.std


def build_network(arm: str, sizes: Sizes, image_shape: tuple[int, int, int], num_classes: int) -> CRATE:
    """CRATE, or its shell around other layers.

    Args:
        arm: one of :data:`ARMS`.
        sizes: of the network.
        image_shape: channels, height and width.
        num_classes: classes.
    """
    chans, height, width = image_shape
    dim = sizes.narrow_dim if arm == "vit_narrow" else sizes.dim
    model = CRATE(
        (height, width),
        sizes.patch_size,
        num_classes,
        dim,
        sizes.depth,
        sizes.heads,
        in_chans=chans,
        lambd=0.0 if arm == "no_threshold" else 0.1,
    )
    if arm == "frozen":
        for module in model.modules():
            if isinstance(module, ISTA):
                module.requires_grad_(False)
    if arm in ("vit", "vit_narrow", "attention", "mlp"):
        # The shell has its weights by now, whatever the layers.
        model.transformer.layers = nn.ModuleList(_layer(arm, dim, sizes.heads) for _ in range(sizes.depth))
    return model


def rate_layers(arm: str, model: CRATE) -> dict[str, LayerModules]:
    """Where the layers of :func:`build_network` are read: of plain attention, the values take the place of the projection."""
    if arm not in ("vit", "vit_narrow", "attention", "mlp"):
        return model.rate_layers()
    places = {}
    for index, layer in enumerate(model.layers):
        place = f"transformer.layers.{index}"
        if isinstance(layer, TransformerBlock):
            places[f"layer {index + 1}"] = attention_modules(layer.mixer, f"{place}.mixer", place)
        else:
            places[f"layer {index + 1}"] = attention_modules(layer[0].fn, f"{place}.0.fn", place)  # type: ignore[index]
    return places


def attention_modules(attention: nn.Module, name: str, output: str) -> LayerModules:
    """Where a layer is read: the projection of subspace attention, the values of plain attention.

    Args:
        attention: :class:`MSSA` or :class:`~headgate.nn.MultiHeadAttention`.
        name: its name in the model.
        output: name of the module whose output is the layer's.
    """
    if isinstance(attention, MSSA):
        return LayerModules(f"{name}.qkv", attention.num_heads, output)
    assert isinstance(attention, MultiHeadAttention)
    return LayerModules(f"{name}.qkv", attention.num_heads, output, (2 * attention.dim, 3 * attention.dim))


def digit_images(seed: int, choosing: bool) -> ImageData:
    """scikit-learn's digits: 1,197 to learn from and 600 to be scored on.

    Args:
        seed: decides the split.
        choosing: learn from 957 of the 1,197 and score on the other 240, so that a choice leaves the 600 alone.
    """
    known, test = load_digits_images("train", seed, 600), load_digits_images("test", seed, 600)
    images, labels, held, held_labels = known.images, known.labels, test.images, test.labels
    if choosing:
        order = torch.randperm(len(labels), generator=stream_generator(seed, "validation"))
        held, held_labels = images[order[:240]], labels[order[:240]]
        images, labels = images[order[240:]], labels[order[240:]]
    return ImageData(images, labels, held, held_labels, images.mean().view(1, 1, 1), images.std().view(1, 1, 1))


def cifar_images(seed: int, choosing: bool, *, count: int = 50_000, augmentation: str = "rand") -> ImageData:
    """CIFAR-10 from ``$HEADGATE_CIFAR10``, or from ``data/cifar10`` of ``$HEADGATE_SHARED``.

    Args:
        seed: decides which training images are used.
        choosing: score on 5,000 other training images in place of the 10,000 test images.
        count: training images used, at most 50,000, or 45,000 while choosing.
        augmentation: as of :class:`ImageData`.

    Raises:
        DataError: the data are missing or broken.
    """
    folder = data_folder("cifar10")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # JPEG copies: figures are compared with each other alone
        train = Cifar(folder, "train", cache=cache_folder() / "cifar10")
        test = Cifar(folder, "test", cache=cache_folder() / "cifar10")
    order = torch.randperm(len(train), generator=stream_generator(seed, "subset"))
    held, held_labels, known = test.images, test.labels, order
    if choosing:
        held, held_labels = train.images[order[-_NUM_HELD_OUT:]], train.labels[order[-_NUM_HELD_OUT:]]
        known = order[:-_NUM_HELD_OUT]
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return ImageData(
        train.images[known[:count]], train.labels[known[:count]], held, held_labels, mean, std, augmentation
    )


def train_network(
    arm: str, sizes: Sizes, training: Training, rate: float, data: ImageData, seed: int
) -> tuple[CRATE, CRATE, list[float]]:
    """Train a classifier; the order of the images and their augmentation depend on the seed alone.

    Returns:
        The network, on a GPU where there is one; the network as it was before training; and the loss of every step.
    """
    chans, height, width = data.train.shape[1:]
    classes = int(data.train_labels.max()) + 1
    networks = []
    for _ in range(2):
        with seeded(seed):
            networks.append(build_network(arm, sizes, (chans, height, width), classes))
    model, untrained = networks
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    shuffled = epoch_batches((torch.arange(len(data.train)),), training.batch_size, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        (chosen,) = shuffled(step)
        images = data.train[chosen]
        if data.augmentation == "rand":
            images = _rand_augment(images, seed, step)
        if data.augmentation != "none":
            images = random_crop_flip(images, stream_generator(seed, "crop", step))
        return data.standardize(images), data.train_labels[chosen]

    def loss(network: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(pair[0]), pair[1], label_smoothing=training.label_smoothing)

    spared: Mapping[str, Any] = {name: {"weight_decay": 0.0} for name in ("cls_token", "pos_embedding")}
    history = fit(
        model,
        batch,
        loss,
        steps=training.steps,
        optimizer=make_optimizer(model, "adamw", rate, training.weight_decay, overrides=spared),
        schedule=warmup_cosine(training.steps, training.warmup),
        seed=seed,
    )
    return model, untrained, history.losses


@torch.no_grad()
def image_accuracy(model: nn.Module, data: ImageData) -> float:
    """Share of the test images that are classified right, computed on the model's device."""
    device = next(model.parameters()).device
    model.eval()
    answers = [model(data.standardize(images).to(device)).argmax(dim=1).cpu() for images in data.test.split(_AT_ONCE)]
    return float((torch.cat(answers) == data.test_labels).double().mean())


def _layer(arm: str, dim: int, heads: int) -> nn.Module:
    """A layer that is not CRATE's; the MLP in the place of ISTA has as many weights as the dictionary."""
    if arm in ("vit", "vit_narrow"):
        return TransformerBlock(dim, MultiHeadAttention(dim, heads), FeedForward(dim), norm_eps=1e-5)
    if arm == "attention":
        return nn.Sequential(
            PreNorm(dim, MultiHeadAttention(dim, heads, bias=False), skip=True), PreNorm(dim, ISTA(dim), skip=False)
        )
    return nn.Sequential(PreNorm(dim, MSSA(dim, heads), skip=True), PreNorm(dim, FeedForward(dim, dim // 2), skip=True))


def _rand_augment(images: Shaped[Tensor, "batch 3 height width"], seed: int, step: int) -> Tensor:
    """RandAugment(2, 14 of 30), as the fine-tuning script has it, with a generator per image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "files", "RandAugment") from error
    changed = []
    for place, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        generator = stream_generator(seed, "rand-augment", step * len(images) + place)
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture = rand_augment(picture, generator, magnitude=14 / 3, deviation=0.0, operations=2, probability=1.0)
        changed.append(np.asarray(picture))
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)
