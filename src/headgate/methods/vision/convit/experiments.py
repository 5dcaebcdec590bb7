"""Networks and training of the claim: how accurate is a classifier that has seen few images?

All arms are one network, :class:`~headgate.methods.vision.convit.convit.ConViT`, with a part of it exchanged; they share
data, their order, augmentation and training. The learning rate alone is an arm's own.

The published start, deviation 0.02 everywhere, suits hundreds of channels and epochs. In a narrow network it leaves the
branches next to silent, and positions drown in the patches: for the few hundred steps of a small experiment nothing is
learned. There all arms start wider, see :func:`start_wider_`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int64, Shaped
from torch import Tensor, nn

from headgate.data import Cifar, load_digits_images, random_crop_flip, stream_generator
from headgate.data.folders import data_folder
from headgate.methods.vision.convit.attention import GPSA, MHSA
from headgate.methods.vision.convit.convit import ConViT
from headgate.nn import FeedForward
from headgate.train import cache_folder, epoch_batches, fit, make_optimizer, seeded, warmup_cosine

__all__ = [
    "ARM_OPTIONS",
    "ImageData",
    "Training",
    "accuracy",
    "build_classifier",
    "cifar_images",
    "digit_images",
    "random_shift",
    "start_wider_",
    "train_classifier",
]

ARM_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "convit": {},
    "deit": {"local_up_to_layer": 0},
    "no_locality": {"local_init": False},
    "content_only": {},
    "position_only": {},
    "strong_positions": {"local_up_to_layer": 0},
}
"""Arm → what it changes in the network; gates and learned positions are set afterwards."""

_GATES = {"content_only": -torch.inf, "position_only": torch.inf}
_NUM_TEST_DIGITS = 600
_AT_ONCE = 250


class ImageData(NamedTuple):
    """Images to learn from, in random order, and images to be scored on; pixels as they are stored, 0 is black.

    Attributes:
        train: ``(count, channels, height, width)``; an experiment with n images takes the first n.
        train_labels: ``(count,)``.
        test: the same.
        test_labels: the same.
        augment: changes a batch of training images.
        standardize: stored pixels → what the network reads.
    """

    train: Shaped[Tensor, "n chans height width"]
    train_labels: Int64[Tensor, " n"]
    test: Shaped[Tensor, "m chans height width"]
    test_labels: Int64[Tensor, " m"]
    augment: Callable[[Tensor, torch.Generator], Tensor]
    standardize: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Training:
    """What all arms share. AdamW with a cosine to zero.

    Attributes:
        steps: images to learn from → updates.
        batch_size: images per update; all of them where they are fewer.
        warmup_share: share of the updates in which the learning rate rises.
        weight_decay: none on norms, biases, gates, class token and positions.
        clip_norm: largest norm of the gradient; ``None`` for no limit.
        label_smoothing: of the cross-entropy.
    """

    steps: Callable[[int], int]
    batch_size: int = 64
    warmup_share: float = 0.1
    weight_decay: float = 0.05
    clip_norm: float | None = None
    label_smoothing: float = 0.0


def build_classifier(arm: str, seed: int, position_std: float | None = None, **network: Any) -> ConViT:
    """The untrained network of an arm.

    Args:
        arm: a key of :data:`ARM_OPTIONS`.
        seed: of its weights.
        position_std: deviation of the learned positions where the network starts wider; ``None`` for the published start.
        **network: keywords of :class:`ConViT` that all arms share.
    """
    with seeded(seed):
        model = ConViT(**{**network, **ARM_OPTIONS[arm]})
        if position_std is not None:
            start_wider_(model, position_std)
        if arm == "strong_positions" and model.pos_embed is not None:
            nn.init.trunc_normal_(model.pos_embed)
    if arm in _GATES:
        for layer in model.modules():
            if isinstance(layer, GPSA):
                layer.gating_param.requires_grad_(False).fill_(_GATES[arm])
    return model


def start_wider_(model: ConViT, position_std: float) -> None:
    """Draw linear layers with deviation 1 / √(channels in), the class token with 1 and positions with ``position_std``.

    Positional weights keep their start, and values that start as the identity stay so: the arms differ as before.
    """
    for module in model.modules():
        if isinstance(module, GPSA):
            layers = [module.qk, module.proj] if module.local_init else [module.qk, module.proj, module.v]
        elif isinstance(module, MHSA):
            layers = [module.qkv, module.proj]
        elif isinstance(module, FeedForward):
            layers = [module.fc1, module.fc2]
        else:
            continue
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.trunc_normal_(model.cls_token)
    if model.pos_embed is not None:
        nn.init.trunc_normal_(model.pos_embed, std=position_std)


def train_classifier(model: ConViT, data: ImageData, count: int, training: Training, rate: float, seed: int) -> float:
    """Train in place on the first ``count`` images; order and augmentation depend on the seed alone.

    Returns:
        The loss, averaged over the last tenth of the updates.
    """
    batches = epoch_batches((torch.arange(count),), min(count, training.batch_size), seed)
    steps = training.steps(count)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        (chosen,) = batches(step)
        images = data.augment(data.train[chosen], stream_generator(seed, "augmentation", step))
        return data.standardize(images), data.train_labels[chosen]

    def loss(network: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(pair[0]), pair[1], label_smoothing=training.label_smoothing)

    overrides = {name: {"weight_decay": 0.0} for name in sorted(model.no_weight_decay())}
    history = fit(
        model,
        batch,
        loss,
        steps=steps,
        optimizer=make_optimizer(model, "adamw", rate, training.weight_decay, overrides=overrides),
        schedule=warmup_cosine(steps, warmup=int(steps * training.warmup_share)),
        clip_norm=training.clip_norm,
        seed=seed,
    )
    last = history.losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def accuracy(model: nn.Module, data: ImageData, images: Tensor, labels: Tensor) -> float:
    """Share of ``images``, stored as those of ``data``, that are classified right."""
    device = next(model.parameters()).device
    model.eval()
    answers = [model(data.standardize(part).to(device)).argmax(dim=1).cpu() for part in images.split(_AT_ONCE)]
    return float((torch.cat(answers) == labels).double().mean())


def digit_images(seed: int) -> ImageData:
    """scikit-learn's digits: a seeded permutation, of which the last 600 are for testing.

    The network reads them in [-1, 1]; training images are shifted by up to one pixel.
    """
    train, test = load_digits_images("train"), load_digits_images("test")
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels])
    order = torch.randperm(len(images), generator=stream_generator(seed, "split"))
    images, labels, count = images[order], labels[order], len(images) - _NUM_TEST_DIGITS
    return ImageData(
        images[:count], labels[:count], images[count:], labels[count:], random_shift, lambda pixels: 2 * pixels - 1
    )


def cifar_images(seed: int, name: str = "cifar10") -> ImageData:
    """CIFAR-10 or CIFAR-100 in a seeded order, with the usual crops and flips.

    Args:
        seed: of the order of the training images.
        name: ``"cifar10"`` or ``"cifar100"``, in the folder that :func:`~headgate.data.folders.data_folder` gives.

    Raises:
        DataError: the data are missing or broken.
    """
    folder = data_folder(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # in which format a copy is stored is the same for all arms
        train = Cifar(folder, "train", cache=cache_folder() / name)
        test = Cifar(folder, "test", cache=cache_folder() / name)
    order = torch.randperm(len(train), generator=stream_generator(seed, "order"))
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (train.mean, train.std))
    return ImageData(
        train.images[order],
        train.labels[order],
        test.images,
        test.labels,
        random_crop_flip,
        lambda pixels: (pixels.float() - mean) / std,
    )


def random_shift(
    images: Shaped[Tensor, "batch chans height width"], generator: torch.Generator, reach: int = 1
) -> Shaped[Tensor, "batch chans height width"]:
    """Shift every image by up to ``reach`` pixels each way; zeros move in."""
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4)
    down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    entry = torch.arange(count)[:, None, None]
    return padded[entry, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
