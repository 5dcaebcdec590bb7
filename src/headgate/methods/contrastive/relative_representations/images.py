"""The claim on CIFAR-10: the paper's convolutional autoencoders, and heads behind their frozen encoders.

The absolute autoencoders are trained once for all arms; their encoders are the frozen ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data import Cifar, stream_generator
from headgate.data.folders import data_folder
from headgate.measurement import Measurement
from headgate.methods.contrastive.relative_representations.anchors import select_anchors
from headgate.methods.contrastive.relative_representations.autoencoder import AbsoluteAutoencoder, RelativeAutoencoder
from headgate.methods.contrastive.relative_representations.digits import tile
from headgate.methods.contrastive.relative_representations.exchange import (
    anchors_of_models,
    communication,
    exchange,
    frozen_codes,
    run,
    train,
)
from headgate.methods.contrastive.relative_representations.head import StitchingHead
from headgate.methods.contrastive.relative_representations.stitching import StitchedAutoencoder
from headgate.train import base_model, seeded

__all__ = ["ImagesScale", "measure_images"]


@dataclass(frozen=True)
class ImagesScale:
    """How large the experiment is.

    Attributes:
        models: how many autoencoders are trained apart.
        anchors: K.
        steps: updates of an autoencoder.
        head_steps: updates of a head.
        hidden_dims: channels of the encoder.
        autoencoder_rate: learning rate of the paper for both autoencoders.
        head_rate: of the heads.
        batch_size: images per update of an autoencoder.
        head_batch_size: items per update of a head.
        known: training images behind whose features heads are trained.
        new: test images that are scored.
    """

    models: int
    anchors: int
    steps: int
    head_steps: int
    hidden_dims: tuple[int, ...]
    autoencoder_rate: float
    head_rate: float
    batch_size: int = 64
    head_batch_size: int = 128
    known: int = 10_000
    new: int = 2000


class _World(NamedTuple):
    train: UInt8[Tensor, "n 3 32 32"]
    train_labels: Int[Tensor, " n"]
    test: UInt8[Tensor, "m 3 32 32"]
    test_labels: Int[Tensor, " m"]


def measure_images(arm: str, seed: int, settings: ImagesScale) -> Measurement:
    """One arm with one seed."""
    folder = data_folder("cifar10")
    known, new = Cifar(folder, "train"), Cifar(folder, "test")
    count = settings.new
    world = _World(known.images, known.labels, new.images[:count], new.labels[:count])
    found = _Autoencoders(settings, world, seed)
    metrics = found.frozen(arm)
    pictures = {}
    if arm in ("relative", "absolute"):
        models = [found.absolute(m) if arm == "absolute" else found.relative(m) for m in range(settings.models)]
        of_autoencoders, pictures["reconstructions"] = _autoencoder_metrics(arm, models, world)
        metrics |= of_autoencoders
    return Measurement(metrics, pictures=pictures, base_seconds=found.base_seconds)


class _Scaled(nn.Module):
    """A model of images in [0, 1] that takes bytes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: UInt8[Tensor, "n 3 height width"]) -> Tensor:
        result: Tensor = self.model(images.float() / 255)
        return result


class _Code(nn.Module):
    """What the decoder of an autoencoder reads, as one tensor."""

    def __init__(self, model: AbsoluteAutoencoder | RelativeAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n code"]:
        encoded = self.model.encode(images)
        return encoded if isinstance(encoded, Tensor) else encoded.similarities


class _Autoencoders:
    """The models of one seed."""

    def __init__(self, settings: ImagesScale, world: _World, seed: int) -> None:
        self.settings, self.world, self.seed = settings, world, seed
        self.base_seconds = 0.0

    def absolute(self, model: int) -> AbsoluteAutoencoder:
        """From the cache where another arm has trained it."""
        settings = self.settings
        described = {
            "seed": self.seed,
            "model": model,
            "images": len(self.world.train),
            "steps": settings.steps,
            "rate": settings.autoencoder_rate,
            "batch_size": settings.batch_size,
            "hidden_dims": list(settings.hidden_dims),
            "recipe": 1,
        }

        def build() -> AbsoluteAutoencoder:
            with seeded(self._model_seed(model)):
                return AbsoluteAutoencoder(32, 3, hidden_dims=settings.hidden_dims)

        trained, seconds = base_model(
            "relative-representations-images", build, lambda untrained: self._train(untrained, model), described
        )
        self.base_seconds += seconds
        return trained

    def relative(self, model: int) -> RelativeAutoencoder:
        """Anchors are drawn class by class."""
        settings, labels = self.settings, self.world.train_labels
        with seeded(self._model_seed(model)):
            fresh = RelativeAutoencoder(32, 3, settings.anchors, settings.hidden_dims)
        ids = torch.as_tensor(select_anchors(labels, labels, settings.anchors, "stratified", self.seed))
        fresh.fit_anchors(self.world.train[ids].float() / 255, labels[ids], ids)
        self._train(fresh, model)
        return fresh

    def frozen(self, arm: str) -> dict[str, float]:
        """Heads behind the frozen encoders of the absolute autoencoders."""
        settings, world = self.settings, self.world
        encoders: list[nn.Module] = [_Scaled(_Code(self.absolute(model))).eval() for model in range(settings.models)]
        anchors = anchors_of_models(arm, world.train, settings.anchors, settings.models, self.seed, self._noise)
        codes = encoders if arm in ("absolute", "procrustes") else frozen_codes(encoders, anchors)
        heads = []
        for model, code in enumerate(codes):
            features = run(code, world.train[: settings.known])
            with seeded(self._model_seed(model)):
                head = StitchingHead(features.shape[1], 10, hidden_dim=64, unit_norm=None)
            heads.append(
                train(
                    head,
                    (features, world.train_labels[: settings.known]),
                    F.cross_entropy,
                    steps=settings.head_steps,
                    rate=settings.head_rate,
                    batch_size=settings.head_batch_size,
                    seed=self._model_seed(model),
                )
            )
        rotate_on = anchors[0] if arm == "procrustes" else None
        matrix = exchange(codes, heads, world.test, world.test_labels, rotate_on=rotate_on)
        return {"posthoc_same": matrix.diagonal, "posthoc_stitched": matrix.off_diagonal}

    def _train(self, model: nn.Module, number: int) -> None:
        train(
            _Scaled(model),
            (self.world.train, self.world.train),
            lambda images, wanted: F.mse_loss(images, wanted.float() / 255),
            steps=self.settings.steps,
            rate=self.settings.autoencoder_rate,
            batch_size=self.settings.batch_size,
            seed=self._model_seed(number),
        )

    def _noise(self, count: int) -> UInt8[Tensor, "anchors 3 32 32"]:
        generator = stream_generator(self.seed, "noise")
        return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)

    def _model_seed(self, model: int) -> int:
        return 1000 * self.seed + model


def _autoencoder_metrics(
    arm: str, models: Sequence[AbsoluteAutoencoder | RelativeAutoencoder], world: _World
) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]]:
    errors = np.zeros((len(models), len(models)))
    for i, j in itertools.product(range(len(models)), repeat=2):
        pair = _Scaled(StitchedAutoencoder(models[i], models[j]))
        errors[i, j] = float(F.mse_loss(run(pair, world.test, chunk=500), world.test.float() / 255))
    stitched = float(errors[~np.eye(len(models), dtype=bool)].mean())
    codes: list[nn.Module] = [_Scaled(_Code(model)) for model in models]
    metrics = {
        "ae_same": float(np.diag(errors).mean()),
        "ae_stitched": stitched,
        "ae_stitched_log10": float(np.log10(stitched)),
        "ae_mrr": communication(codes, world.test)["mrr"],
    }
    chosen = world.test[:10]
    rows = [chosen.float() / 255]
    rows += [run(_Scaled(StitchedAutoencoder(model, models[0])), chosen) for model in models]
    return metrics, tile(rows, lambda row: row, zoom=2)
