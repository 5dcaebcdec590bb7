"""Networks and training of the claim: grids of markers, and small images, with one kind of block or another.

All arms share everything but their blocks and the kind of norm behind them: embedding, learned positions and heads with
their initial weights, data and their order, and the training. The mixers of ViG are those of ViG-S and larger ones, without activations. The runs are
short, so depthwise convolutions start near a copy of their input: the centre tap gets 0.3 on top of its random start,
without which the local branch is tiny for hundreds of steps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from headgate.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IGNORED,
    Cifar,
    load_digits_images,
    random_crop_flip,
    stream_generator,
)
from headgate.data.markers import MarkerGrids, marker_distances, marker_grids
from headgate.errors import DataError
from headgate.methods.vision.vig.block import ViGBlock, to_map, to_tokens
from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.methods.vision.vig.layer import BidirectionalGLA
from headgate.nn import FeedForward, MultiHeadAttention, TransformerBlock
from headgate.train import cache_folder, epoch_batches, fit, make_optimizer, one_cycle, seeded

__all__ = [
    "LAYER_OPTIONS",
    "TARGETS",
    "GridClassifier",
    "ImageData",
    "MarkerNet",
    "MarkerScores",
    "Sizes",
    "Training",
    "cifar_images",
    "digit_images",
    "image_accuracy",
    "score_markers",
    "train_images",
    "train_markers",
]

LAYER_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "vig": {},
    "shared_gate": {"direction_gates": False},
    "forward_only": {"bidirectional": False},
    "no_2d": {"locality": False},
    "symmetric": {"direction_gates": False, "locality": False},
}
"""Arm → options of its layers; the arm ``vit`` has attention in their place."""

TARGETS = ("last_f", "next_b", "above")

_NUM_VALUES = 8
_CENTRE_TAP = 0.3
_AT_ONCE = 250
_NUM_HELD_OUT = 5000


@dataclass(frozen=True)
class Sizes:
    """How large the networks are.

    Attributes:
        dim: channels.
        depth: blocks.
        mlp_dim: inner size of SwiGLU in the blocks of ViG.
        vit_mlp_dim: inner size of the MLP in the blocks of the arm ``vit``, so that both have as many parameters.
        num_heads: heads of every mixer.
        position_std: deviation of the learned positions at the start; 0 for no positions.
    """

    dim: int
    depth: int
    mlp_dim: int
    vit_mlp_dim: int
    num_heads: int = 3
    position_std: float = 0.02


@dataclass(frozen=True)
class Training:
    """How the networks are trained, whatever the arm. AdamW; the learning rate alone is the arm's own.

    Attributes:
        batch_size: grids or images per update.
        schedule: steps → schedule of the learning rate.
        weight_decay: none on norms, biases and positions.
        clip_norm: largest norm of the gradient.
        label_smoothing: of the cross-entropy.
    """

    batch_size: int
    schedule: Callable[[int], Callable[[int], float]] = one_cycle
    weight_decay: float = 0.05
    clip_norm: float = 5.0
    label_smoothing: float = 0.0


class MarkerNet(nn.Module):
    """Symbols of a grid → logits of the three targets for every cell.

    Args:
        arm: which blocks.
        sizes: of the network.
        grid: rows and columns.
    """

    def __init__(self, arm: str, sizes: Sizes, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1 + 2 * _NUM_VALUES, sizes.dim)
        classes = (_NUM_VALUES, _NUM_VALUES, 1 + 2 * _NUM_VALUES)
        self.heads = nn.ModuleList(nn.Linear(sizes.dim, count) for count in classes)
        _start(self.heads)
        self.trunk = _Trunk(arm, sizes, grid)

    def forward(self, symbols: Int64[Tensor, "batch rows columns"]) -> tuple[Tensor, ...]:
        """Logits ``(batch, rows, columns, classes)`` of each target."""
        features = self.trunk(self.embedding(symbols).permute(0, 3, 1, 2))
        return tuple(head(features).unflatten(1, symbols.shape[1:]) for head in self.heads)


class GridClassifier(nn.Module):
    """Images → logits: patches, blocks, the mean over all tokens, one linear layer.

    Args:
        arm: which blocks.
        sizes: of the network.
        image_shape: channels, height and width.
        patch_size: side of a patch in pixels.
        num_classes: classes.
    """

    def __init__(
        self, arm: str, sizes: Sizes, image_shape: tuple[int, int, int], patch_size: int, num_classes: int
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.patch_embedding = nn.Conv2d(channels, sizes.dim, patch_size, stride=patch_size)
        self.head = nn.Linear(sizes.dim, num_classes)
        _start(self.head)
        self.trunk = _Trunk(arm, sizes, (height // patch_size, width // patch_size))

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Logits ``(batch, num_classes)``."""
        return self.head(self.trunk(self.patch_embedding(images)).mean(dim=1))


class _Trunk(nn.Module):
    """Learned positions, blocks and a norm: a feature map in, tokens out."""

    def __init__(self, arm: str, sizes: Sizes, grid: tuple[int, int]) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, sizes.dim, *grid)) if sizes.position_std else None
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=sizes.position_std)
        self.blocks = nn.ModuleList(_block(arm, sizes) for _ in range(sizes.depth))
        self.norm: nn.Module = nn.LayerNorm(sizes.dim, eps=1e-6) if arm == "vit" else nn.RMSNorm(sizes.dim, eps=1e-6)
        _start(self.blocks)

    def forward(self, features: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch tokens dim"]:
        if self.positions is not None:
            features = features + self.positions
        for block in self.blocks:
            features = block(features)
        return self.norm(to_tokens(features))


class _OnMaps(nn.Module):
    """A block of tokens in the place of one of feature maps."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return to_map(self.block(to_tokens(features)), (features.shape[2], features.shape[3]))


def _block(arm: str, sizes: Sizes) -> nn.Module:
    dim, heads = sizes.dim, sizes.num_heads
    if arm == "vit":
        return _OnMaps(TransformerBlock(dim, MultiHeadAttention(dim, heads), FeedForward(dim, sizes.vit_mlp_dim)))
    mixer = BidirectionalGLA(dim, heads, **LAYER_OPTIONS[arm])
    return ViGBlock(mixer, SwiGLU(dim, sizes.mlp_dim), partial(nn.RMSNorm, eps=1e-6), 0.0)


@torch.no_grad()
def _start(part: nn.Module) -> None:
    """Draw the weights as ViG does, with the centre taps on top."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in part.modules():
        if isinstance(module, BidirectionalGLA):
            module.reset_parameters()
            if module.conv is not None:
                module.conv.weight[:, :, 1, 1] += _CENTRE_TAP


class MarkerScores(NamedTuple):
    """Answers to the questions of grids, per target.

    Attributes:
        grids: the grids.
        hits: which answers were right, ``(3, count, rows, columns)``.
        asked: where there was a question, of the same shape.
    """

    grids: MarkerGrids
    hits: Bool[Tensor, "3 count rows columns"]
    asked: Bool[Tensor, "3 count rows columns"]

    def accuracy(self) -> list[float]:
        """Share of right answers, per target."""
        return [_share(hits, asked) for hits, asked in zip(self.hits, self.asked, strict=True)]

    def by_cell(self) -> Float[Tensor, "3 rows columns"]:
        """The same cell by cell; NaN where a cell is never asked."""
        return (self.hits & self.asked).double().sum(dim=1) / self.asked.double().sum(dim=1)

    def by_distance(self) -> dict[str, tuple[list[float], list[float]]]:
        """Accuracy of both directional targets over the distance of the marker in bins that double, named by their ends.

        Returns:
            Target → (1, 2, 4, 8, …; accuracy at distances up to that and above the one before).
        """
        curves = {}
        for target, distance in enumerate(marker_distances(self.grids.symbols, _NUM_VALUES)):
            bins = distance.clamp_min(1).double().log2().ceil()
            kinds = bins[self.asked[target]].unique().tolist()
            accuracy = [_share(self.hits[target], self.asked[target] & (bins == kind)) for kind in kinds]
            curves[TARGETS[target]] = ([2.0**kind for kind in kinds], accuracy)
        return curves


def train_markers(
    arm: str, sizes: Sizes, training: Training, rate: float, steps: int, grid: tuple[int, int], seed: int
) -> tuple[MarkerNet, list[float]]:
    """Train on grids that are drawn anew at every one of ``steps`` steps.

    Returns:
        The network, and the loss of every step.
    """
    with seeded(seed):
        model = MarkerNet(arm, sizes, grid)

    def batch(step: int) -> MarkerGrids:
        return marker_grids(
            training.batch_size, *grid, num_values=_NUM_VALUES, generator=stream_generator(seed, "train", step)
        )

    def loss(network: nn.Module, grids: MarkerGrids) -> Tensor:
        losses = [
            F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=IGNORED)
            for logits, target in zip(network(grids.symbols), grids[1:], strict=True)
        ]
        return torch.stack(losses).sum()

    return model, _fit(model, batch, loss, training, rate, steps, seed)


@torch.no_grad()
def score_markers(model: nn.Module, count: int, grid: tuple[int, int], seed: int, stream: str) -> MarkerScores:
    """Ask for every target of ``count`` grids of a stream that was not trained on."""
    grids = marker_grids(count, *grid, num_values=_NUM_VALUES, generator=stream_generator(seed, stream))
    model.eval()
    blocks = [
        torch.stack([logits.argmax(dim=-1) for logits in model(symbols)]) for symbols in grids.symbols.split(_AT_ONCE)
    ]
    targets = torch.stack(grids[1:])
    return MarkerScores(grids, torch.cat(blocks, dim=1) == targets, targets != IGNORED)


class ImageData(NamedTuple):
    """Images to learn from and images to be scored on.

    Attributes:
        train: ``(count, channels, height, width)``, pixels as they are stored.
        train_labels: ``(count,)``.
        test: the same.
        test_labels: the same.
        mean: per channel, of the pixels, ``(channels, 1, 1)``.
        std: the same.
        num_classes: classes.
        augmented: whether training images are shifted by up to 4 pixels and mirrored at random.
    """

    train: Shaped[Tensor, "n chans height width"]
    train_labels: Int64[Tensor, " n"]
    test: Shaped[Tensor, "m chans height width"]
    test_labels: Int64[Tensor, " m"]
    mean: Float[Tensor, "chans 1 1"]
    std: Float[Tensor, "chans 1 1"]
    num_classes: int
    augmented: bool

    def standardize(
        self, images: Shaped[Tensor, "batch chans height width"]
    ) -> Float[Tensor, "batch chans height width"]:
        """Pixels of mean 0 and deviation 1."""
        return (images.float() - self.mean) / self.std


def digit_images(seed: int, choosing: bool) -> ImageData:
    """scikit-learn's digits: 1,200 to learn from and 597 to be scored on.

    Args:
        seed: decides the split.
        choosing: learn from 960 of the 1,200 and score on the other 240, so that a choice leaves the 597 alone.
    """
    known, test = load_digits_images("train", seed), load_digits_images("test", seed)
    images, labels, held, held_labels = known.images, known.labels, test.images, test.labels
    if choosing:
        order = torch.randperm(len(labels), generator=stream_generator(seed, "validation"))
        held, held_labels = images[order[:240]], labels[order[:240]]
        images, labels = images[order[240:]], labels[order[240:]]
    mean, std = images.mean().view(1, 1, 1), images.std().view(1, 1, 1)
    return ImageData(images, labels, held, held_labels, mean, std, num_classes=10, augmented=False)


def cifar_images(seed: int, choosing: bool, count: int) -> ImageData:
    """CIFAR-10 from ``$HEADGATE_CIFAR10``, or from ``data/cifar10`` of ``$HEADGATE_SHARED``.

    Args:
        seed: decides which training images are used.
        choosing: score on 5,000 other training images in place of the 10,000 test images.
        count: training images used, at most 45,000.

    Raises:
        DataError: the data are missing or broken.
    """
    folder = _cifar_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the notes of every cell say how the images are stored
        train = Cifar(folder, "train", cache=cache_folder() / "cifar10")
        test = Cifar(folder, "test", cache=cache_folder() / "cifar10")
    order = torch.randperm(len(train), generator=stream_generator(seed, "subset"))
    held, held_labels = test.images, test.labels
    if choosing:
        held, held_labels = train.images[order[-_NUM_HELD_OUT:]], train.labels[order[-_NUM_HELD_OUT:]]
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    return ImageData(
        train.images[order[:count]], train.labels[order[:count]], held, held_labels, mean, std, 10, augmented=True
    )


def train_images(
    arm: str, sizes: Sizes, training: Training, rate: float, epochs: int, data: ImageData, patch_size: int, seed: int
) -> tuple[GridClassifier, list[float]]:
    """Train a classifier for ``epochs``; the order of the images and their shifts depend on the seed alone.

    Returns:
        The network, and the loss of every step.
    """
    _, channels, height, width = data.train.shape
    with seeded(seed):
        model = GridClassifier(arm, sizes, (channels, height, width), patch_size, data.num_classes)
    shuffled = epoch_batches((torch.arange(len(data.train)),), training.batch_size, seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        (chosen,) = shuffled(step)
        images = data.train[chosen]
        if data.augmented:
            images = random_crop_flip(images, stream_generator(seed, "augmentation", step))
        return data.standardize(images), data.train_labels[chosen]

    def loss(network: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network(pair[0]), pair[1], label_smoothing=training.label_smoothing)

    return model, _fit(model, batch, loss, training, rate, epochs * shuffled.steps_per_epoch, seed)


@torch.no_grad()
def image_accuracy(model: nn.Module, data: ImageData) -> float:
    """Share of the test images that are classified right."""
    model.eval()
    answers = [model(data.standardize(images)).argmax(dim=1) for images in data.test.split(_AT_ONCE)]
    return float((torch.cat(answers) == data.test_labels).double().mean())


def _fit(
    model: nn.Module,
    batch: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    training: Training,
    rate: float,
    steps: int,
    seed: int,
) -> list[float]:
    positions = [name for name, _ in model.named_parameters() if name.endswith("positions")]
    overrides = {name: {"weight_decay": 0.0} for name in positions}
    optimizer = make_optimizer(model, "adamw", rate, training.weight_decay, overrides=overrides)
    history = fit(
        model,
        batch,
        loss,
        steps=steps,
        optimizer=optimizer,
        schedule=training.schedule(steps),
        clip_norm=training.clip_norm,
        seed=seed,
    )
    return history.losses


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


def _share(hits: Bool[Tensor, ...], asked: Bool[Tensor, ...]) -> float:
    return float((hits & asked).sum() / asked.sum())
