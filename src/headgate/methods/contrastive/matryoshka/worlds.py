"""The data on which the claim is measured, each split into training, validation and test items.

Learning rates and cascade thresholds are chosen on the validation items, the gallery of every search is training items,
and all that is reported is measured on the test items.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data import Cifar, load_digits_images, portable_normal, stream_generator
from headgate.errors import DataError
from headgate.train import base_model, epoch_batches

__all__ = ["Items", "Part", "World", "cifar_world", "digits_world", "procedural_world"]

_CIFAR_COUNTS = {"train": 50_000, "test": 10_000}

Part: TypeAlias = Literal["train", "validation", "test"]


class Items(NamedTuple):
    """Inputs with their classes."""

    inputs: Float[Tensor, "n features"]
    labels: Int[Tensor, " n"]


class World(Protocol):
    """What the experiment asks of its data."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def base_seconds(self) -> float:
        """Time taken to prepare what arms and seeds share."""

    def encoder(self) -> nn.Module:
        """An untrained encoder, from an input to an embedding."""

    def batches(self, batch_size: int, seed: int) -> Callable[[int], tuple[Tensor, ...]]:
        """Training batches by step; the same for every arm."""

    def embed(self, encoder: nn.Module, part: Part) -> Items:
        """Embeddings and classes of one part; of the training items those that form the gallery."""

    def images(self, part: Part) -> UInt8[Tensor, "n height width"] | None:
        """Grey images of the part, for pictures; None where there are none."""


@dataclass(frozen=True)
class TensorWorld:
    """A world that fits into memory, with an MLP as encoder.

    Attributes:
        parts: the items of each part.
        num_classes: C.
        widths: layer sizes of the encoder, input and embedding included.
        dropout: on the input and on every hidden layer.
        gallery: how many of the training items form the gallery.
        base_seconds: time taken to prepare the inputs.
        pixels: grey images of the parts.
    """

    parts: dict[Part, Items]
    num_classes: int
    widths: tuple[int, ...]
    dropout: float = 0.0
    gallery: int | None = None
    base_seconds: float = 0.0
    pixels: dict[Part, UInt8[Tensor, "n height width"]] | None = None

    def encoder(self) -> nn.Module:
        """An MLP with ReLU."""
        layers: list[nn.Module] = []
        for index, (width, after) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            layers += [nn.ReLU()] if index else []
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            layers.append(nn.Linear(width, after))
        return nn.Sequential(*layers)

    def batches(self, batch_size: int, seed: int) -> Callable[[int], tuple[Tensor, ...]]:
        """Shuffled training batches."""
        return epoch_batches(self.parts["train"], batch_size, seed)

    @torch.no_grad()
    def embed(self, encoder: nn.Module, part: Part) -> Items:
        """Embeddings of one part."""
        inputs, labels = self.parts[part]
        count = self.gallery if part == "train" else None
        return Items(encoder(inputs[:count]), labels[:count])

    def images(self, part: Part) -> UInt8[Tensor, "n height width"] | None:
        """Grey images of the part."""
        return None if self.pixels is None else self.pixels[part]


def digits_world(seed: int, widths: tuple[int, ...], validation: int = 240) -> TensorWorld:
    """scikit-learn's digits: 597 test images, ``validation`` of the other 1,200 to choose with, the rest to learn from.

    Args:
        seed: decides the split.
        widths: of the encoder; the first is 64.
        validation: number of validation images.
    """
    known, test = load_digits_images("train", seed), load_digits_images("test", seed)
    order = torch.randperm(len(known.labels), generator=stream_generator(seed, "validation"))
    held, learned = order[:validation].sort().values, order[validation:].sort().values
    shift, scale = known.images[learned].mean(), known.images[learned].std()
    images: dict[Part, Tensor] = {
        "train": known.images[learned],
        "validation": known.images[held],
        "test": test.images,
    }
    labels: dict[Part, Tensor] = {"train": known.labels[learned], "validation": known.labels[held], "test": test.labels}
    return TensorWorld(
        {part: Items((images[part].flatten(1) - shift) / scale, labels[part]) for part in images},
        num_classes=10,
        widths=widths,
        pixels={part: (images[part][:, 0] * 255).round().to(torch.uint8) for part in images},
    )


def procedural_world(seed: int, widths: tuple[int, ...]) -> TensorWorld:
    """48 classes in 12 groups, seen through a fixed random network.

    Group centres N(0, I_12); class = group + 0.55 N(0, I); latent = class + 0.38 N(0, I); 12 nuisance coordinates
    0.6 N(0, I); ``x = tanh([latent, nuisance] W1) W2 + 0.05 ε`` with W1 (24→128) of deviation 2/√24 and W2 (128→96) of
    deviation 1. Per class 60 training, 20 validation and 40 test items.

    Args:
        seed: decides all of it.
        widths: of the encoder; the first is 96.
    """
    generator = stream_generator(seed, "world")
    groups = portable_normal((12, 12), generator).repeat_interleave(4, dim=0)
    classes = groups + 0.55 * portable_normal((48, 12), generator)
    first = portable_normal((24, 128), generator) * 2 / 24**0.5
    second = portable_normal((128, 96), generator)
    parts: dict[Part, Items] = {}
    counts: dict[Part, int] = {"train": 60, "validation": 20, "test": 40}
    for part, count in counts.items():
        labels = torch.arange(48).repeat_interleave(count)
        latent = classes[labels] + 0.38 * portable_normal((len(labels), 12), generator)
        nuisance = 0.6 * portable_normal((len(labels), 12), generator)
        clean = torch.tanh(torch.cat([latent, nuisance], dim=1) @ first) @ second
        parts[part] = Items(clean + 0.05 * portable_normal(clean.shape, generator), labels)
    return TensorWorld(parts, num_classes=48, widths=widths)


def cifar_world(seed: int, widths: tuple[int, ...], filters: int, dropout: float, gallery: int) -> TensorWorld:
    """CIFAR-10 behind fixed features: whitened random patches, rectified, pooled over quadrants, whitened again.

    Coates, Lee and Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature Learning" (AISTATS 2011). The
    features do not depend on the seed and are computed once.

    Args:
        seed: decides which tenth of the training images validates.
        widths: of the encoder; the first is the number of features kept.
        filters: patches taken as filters.
        dropout: of the encoder.
        gallery: training images that form the gallery.

    Raises:
        DataError: no data in ``$HEADGATE_CIFAR10``, nor in ``data/cifar10`` of ``$HEADGATE_SHARED``.
    """
    folder = _cifar_folder()
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.parquet")):
        digest.update(path.read_bytes())
    table, seconds = base_model(
        "cifar10-patches",
        lambda: _FeatureTable(widths[0]),
        lambda empty: _fill_table(empty, folder, filters),
        {"source": digest.hexdigest(), "filters": filters, "features": widths[0], "recipe": 1},
    )
    assert isinstance(table, _FeatureTable)
    order = torch.randperm(len(table.train_labels), generator=stream_generator(seed, "validation"))
    held, learned = order[: len(order) // 10], order[len(order) // 10 :]
    train = table.train_features.float()
    parts: dict[Part, Items] = {
        "train": Items(train[learned], table.train_labels[learned]),
        "validation": Items(train[held], table.train_labels[held]),
        "test": Items(table.test_features.float(), table.test_labels),
    }
    return TensorWorld(parts, 10, widths, dropout, gallery, seconds)


class _FeatureTable(nn.Module):
    """CIFAR-10 as features, so that arms and seeds can share it as they share a base model."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        for part, count in _CIFAR_COUNTS.items():
            self.register_buffer(f"{part}_features", torch.zeros(count, features, dtype=torch.float16))
            self.register_buffer(f"{part}_labels", torch.zeros(count, dtype=torch.int64))


def _cifar_folder() -> Path:
    own, shared = os.environ.get("HEADGATE_CIFAR10"), os.environ.get("HEADGATE_SHARED")
    if own is None and shared is None:
        raise DataError(
            "CIFAR-10 was not found; set HEADGATE_CIFAR10 to the folder with train.parquet and test.parquet, or "
            "HEADGATE_SHARED to one with data/cifar10"
        )
    folder = Path(own) if own is not None else Path(str(shared)) / "data" / "cifar10"
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected train.parquet and test.parquet of CIFAR-10 in it")
    return folder


@torch.no_grad()
def _fill_table(table: nn.Module, folder: Path, filters: int) -> None:
    assert isinstance(table, _FeatureTable)
    train, test = Cifar(folder, "train"), Cifar(folder, "test")
    layer = _PatchFeatures(train.images, filters)
    known, new = layer(train.images), layer(test.images)
    # PCA whitening with training statistics; the small directions are kept small.
    shift = known.mean(dim=0)
    known, new = known - shift, new - shift
    values, vectors = torch.linalg.eigh((known.T @ known).double() / len(known))
    kept = table.train_features.shape[1]
    rotation = (vectors[:, -kept:] / (values[-kept:] + 1e-3 * values[-kept:].mean()).sqrt()).float()
    for buffer, value in (
        (table.train_features, known @ rotation),
        (table.train_labels, train.labels),
        (table.test_features, new @ rotation),
        (table.test_labels, test.labels),
    ):
        buffer.copy_(value)


class _PatchFeatures:
    """Responses to whitened random patches, positive and negative parts apart, averaged over the four quadrants."""

    size = 6
    stride = 2
    threshold = 0.25

    def __init__(self, images: UInt8[Tensor, "n 3 32 32"], filters: int) -> None:
        generator = stream_generator(0, "patches")
        count = 20_000
        chosen = torch.randint(len(images), (count,), generator=generator)
        corner = torch.randint(32 - self.size + 1, (2, count), generator=generator)
        reach = torch.arange(self.size)
        rows, columns = corner[0][:, None, None] + reach[:, None], corner[1][:, None, None] + reach
        patches = _contrast(
            images[chosen[:, None, None], :, rows, columns].permute(0, 3, 1, 2).flatten(1).float() / 255
        )
        shift = patches.mean(dim=0)
        values, vectors = torch.linalg.eigh((patches - shift).T.double() @ (patches - shift).double() / count)
        whiten = ((vectors / (values + 0.1).sqrt()) @ vectors.T).float()
        bank = F.normalize((patches[:filters] - shift) @ whiten)
        self.weight = whiten @ bank.T
        self.bias = -(shift @ self.weight)

    def __call__(self, images: UInt8[Tensor, "n 3 32 32"]) -> Float[Tensor, "n features"]:
        return torch.cat([self._respond(block.float() / 255) for block in images.split(16)])

    def _respond(self, images: Float[Tensor, "b 3 32 32"]) -> Float[Tensor, "b features"]:
        windows = images.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        batch, side = len(images), windows.shape[2]
        patches = _contrast(windows.permute(0, 2, 3, 1, 4, 5).reshape(batch * side * side, -1))
        response = torch.addmm(self.bias, patches, self.weight)
        parts = []
        for rectified in (response - self.threshold, -response - self.threshold):
            quadrants = rectified.clamp_min(0).view(batch, 2, side // 2, 2, side // 2, -1)
            parts.append(quadrants.mean(dim=(2, 4)).flatten(1))
        return torch.cat(parts, dim=1)


def _contrast(patches: Float[Tensor, "n values"]) -> Float[Tensor, "n values"]:
    """Subtract each patch's mean and divide by its deviation, with 10 grey levels squared added to the variance."""
    centred = patches - patches.mean(dim=1, keepdim=True)
    return centred / (centred.var(dim=1, keepdim=True) + 10 / 255**2).sqrt()
