"""The claim on handwritten digits: small classifiers and autoencoders end to end, and heads behind frozen encoders.

Encoder 64-128-32 with ReLU; that of the autoencoders ends in a batch normalisation, as the paper's does. Without it relative
training turns all embeddings towards one direction, until cosines vary by less than the epsilon of the LayerNorm behind.
Head: LayerNorm, 64 units with tanh, 10 classes. Decoder: (LayerNorm,) 128 units with ReLU, 64 pixels. The frozen encoders
are those of the absolute classifiers, trained once for all arms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data import load_digits_images, stream_generator
from headgate.measurement import Curve, Measurement
from headgate.methods.contrastive.relative_representations.encoder import RelativeEncoder
from headgate.methods.contrastive.relative_representations.exchange import (
    anchors_of_models,
    communication,
    exchange,
    frozen_codes,
    run,
    train,
)
from headgate.methods.contrastive.relative_representations.head import StitchingHead
from headgate.train import base_model, seeded

__all__ = ["DigitsScale", "DigitsWorld", "digits_world", "measure_digits"]

_PIXELS, _HIDDEN, _DIM, _CLASSES = 64, 128, 32, 10
_TEST = 497


@dataclass(frozen=True)
class DigitsScale:
    """How large the experiment is, and the learning rates that were chosen for it.

    Attributes:
        models: how many models are trained apart and exchange their parts.
        anchors: K.
        steps: updates of a classifier and of an autoencoder.
        head_steps: updates of a head behind a frozen encoder.
        curve: numbers of anchors over which the figure draws stitching behind frozen encoders.
        classifier_rates: arm → learning rate.
        autoencoder_rates: likewise.
        head_rates: likewise.
        batch_size: images per update.
        first_seed: added to every seed that is measured, so that it draws what no earlier choice has looked at.
    """

    models: int
    anchors: int
    steps: int
    head_steps: int
    curve: tuple[int, ...]
    classifier_rates: Mapping[str, float]
    autoencoder_rates: Mapping[str, float]
    head_rates: Mapping[str, float]
    batch_size: int = 128
    first_seed: int = 0


class DigitsWorld(NamedTuple):
    """Pixels in [0, 1], flat, and classes; 1,300 images to learn from, 497 to test with."""

    train: Float[Tensor, "n pixels"]
    train_labels: Int[Tensor, " n"]
    test: Float[Tensor, "m pixels"]
    test_labels: Int[Tensor, " m"]


def digits_world(seed: int) -> DigitsWorld:
    """The digits in the split of a seed."""
    known, new = load_digits_images("train", seed, _TEST), load_digits_images("test", seed, _TEST)
    return DigitsWorld(known.images.flatten(1), known.labels, new.images.flatten(1), new.labels)


def measure_digits(arm: str, seed: int, settings: DigitsScale) -> Measurement:
    """One arm with one seed: frozen encoders for every arm, end to end for those two that train otherwise."""
    drawn = settings.first_seed + seed
    world = digits_world(drawn)
    found = _Models(settings, world, drawn)
    metrics, curves = found.frozen(arm)
    pictures = {}
    if arm in ("relative", "absolute"):
        metrics |= found.classifiers(arm)
        of_autoencoders, picture = found.autoencoders(arm)
        metrics |= of_autoencoders
        pictures["reconstructions"] = picture
    return Measurement(
        metrics,
        curves=curves,
        pictures=pictures,
        notes={"head's learning rate": settings.head_rates[arm], "models": settings.models, "drawn with seed": drawn},
        base_seconds=found.base_seconds,
    )


class _Classifier(nn.Module):
    """A code and the head that is trained behind it."""

    def __init__(self, code: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.code = code
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.code(x))
        return scores


class _Models:
    """The models of one seed."""

    def __init__(self, settings: DigitsScale, world: DigitsWorld, seed: int) -> None:
        self.settings, self.world, self.seed = settings, world, seed
        self.base_seconds = 0.0
        self.anchors = self._anchors("relative", settings.anchors)[0]
        self._encoders: list[nn.Module] = []

    def classifiers(self, arm: str) -> dict[str, float]:
        """End to end."""
        if arm == "absolute":
            trained = [self._absolute(model) for model in range(self.settings.models)]
        else:
            trained = [_classifier(self._train(self._classifier(arm, model), arm, model)) for model in self._numbers()]
        codes, heads = [model.code for model in trained], [model.head for model in trained]
        matrix = exchange(codes, heads, self.world.test, self.world.test_labels)
        return {
            "same": matrix.diagonal,
            "stitched": matrix.off_diagonal,
            "cosine": communication(codes, self.world.test)["cosine"],
        }

    def autoencoders(self, arm: str) -> tuple[dict[str, float], UInt8[np.ndarray, "height width 3"]]:
        """Errors with the own and with another model's decoder, and a picture of both."""
        trained = [self.autoencoder(arm, model) for model in self._numbers()]
        codes, decoders = [model.code for model in trained], [model.head for model in trained]
        pixels = self.world.test
        matrix = exchange(codes, decoders, pixels, pixels, "mse")
        metrics = {
            "ae_same": matrix.diagonal,
            "ae_stitched": matrix.off_diagonal,
            "ae_stitched_log10": float(np.log10(matrix.off_diagonal)),
            "ae_mrr": communication(codes, pixels)["mrr"],
        }
        return metrics, _picture(codes, decoders[0], pixels, self.world.test_labels)

    def autoencoder(self, arm: str, model: int, rate: float | None = None) -> _Classifier:
        """One trained autoencoder; its head is the decoder."""
        with seeded(self._model_seed(model)):
            code = self._code(arm, nn.BatchNorm1d(_DIM))
            layers = [nn.LayerNorm(self.settings.anchors)] if arm == "relative" else []
            width = self.settings.anchors if arm == "relative" else _DIM
            decoder = nn.Sequential(*layers, nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _PIXELS))
        pixels = self.world.train
        trained = train(
            _Classifier(code, decoder),
            (pixels, pixels),
            F.mse_loss,
            steps=self.settings.steps,
            rate=self.settings.autoencoder_rates[arm] if rate is None else rate,
            batch_size=self.settings.batch_size,
            seed=self._model_seed(model),
        )
        return _classifier(trained)

    def frozen(self, arm: str) -> tuple[dict[str, float], dict[str, Curve]]:
        """Heads behind frozen encoders, and, where anchors are shared, stitching over their number."""
        counts = self.settings.curve if arm in ("relative", "procrustes") else ()
        found = {count: self._frozen(arm, count) for count in dict.fromkeys((*counts, self.settings.anchors))}
        same, stitched = found[self.settings.anchors]
        curves = {}
        if counts:
            values = [found[count][1] for count in counts]
            curves["frozen encoders"] = Curve(counts, values, "anchors", "accuracy with another's head", log_x=True)
        return {"posthoc_same": same, "posthoc_stitched": stitched}, curves

    def codes(self, arm: str, count: int) -> list[nn.Module]:
        """What heads behind the frozen encoders read."""
        if not self._encoders:
            self._encoders = [self._absolute(model).code for model in self._numbers()]
        if arm in ("absolute", "procrustes"):
            return self._encoders
        return frozen_codes(self._encoders, self._anchors(arm, count))

    def head(self, arm: str, code: nn.Module, model: int, rate: float | None = None) -> nn.Module:
        """A head trained behind a frozen code."""
        features = run(code, self.world.train)
        with seeded(self._model_seed(model)):
            head = StitchingHead(features.shape[1], _CLASSES, hidden_dim=64, unit_norm=None)
        return train(
            head,
            (features, self.world.train_labels),
            F.cross_entropy,
            steps=self.settings.head_steps,
            rate=self.settings.head_rates[arm] if rate is None else rate,
            batch_size=self.settings.batch_size,
            seed=self._model_seed(model),
        )

    def classifier(self, arm: str, model: int, rate: float) -> _Classifier:
        """One classifier trained end to end at a given rate."""
        return _classifier(self._train(self._classifier(arm, model), arm, model, rate))

    def _frozen(self, arm: str, count: int) -> tuple[float, float]:
        """Accuracy with the own head and with another model's."""
        codes = self.codes(arm, count)
        heads = self._absolute_heads(arm) if arm == "procrustes" else None
        heads = heads or [self.head(arm, code, model) for model, code in enumerate(codes)]
        rotate_on = self._anchors(arm, count)[0] if arm == "procrustes" else None
        matrix = exchange(codes, heads, self.world.test, self.world.test_labels, rotate_on=rotate_on)
        return matrix.diagonal, matrix.off_diagonal

    def _absolute_heads(self, arm: str) -> list[nn.Module]:
        """One head per model serves every number of anchors."""
        if not hasattr(self, "_heads"):
            self._heads = [self.head(arm, code, model) for model, code in enumerate(self.codes(arm, 1))]
        return self._heads

    def _absolute(self, model: int) -> _Classifier:
        """A classifier of the absolute arm, from the cache where another arm has trained it."""
        settings = self.settings
        described = {
            "seed": self.seed,
            "model": model,
            "steps": settings.steps,
            "rate": settings.classifier_rates["absolute"],
            "batch_size": settings.batch_size,
            "recipe": 1,
        }
        trained, seconds = base_model(
            "relative-representations-digits",
            lambda: self._classifier("absolute", model),
            lambda untrained: self._train(untrained, "absolute", model),
            described,
        )
        self.base_seconds += seconds
        return _classifier(trained)

    def _classifier(self, arm: str, model: int) -> _Classifier:
        with seeded(self._model_seed(model)):
            code = self._code(arm)
            width = self.settings.anchors if arm == "relative" else _DIM
            return _Classifier(code, StitchingHead(width, _CLASSES, hidden_dim=64, unit_norm=None))

    def _train(self, model: nn.Module, arm: str, number: int, rate: float | None = None) -> nn.Module:
        return train(
            model,
            (self.world.train, self.world.train_labels),
            F.cross_entropy,
            steps=self.settings.steps,
            rate=self.settings.classifier_rates[arm] if rate is None else rate,
            batch_size=self.settings.batch_size,
            seed=self._model_seed(number),
        )

    def _code(self, arm: str, *last: nn.Module) -> nn.Module:
        """Weights are drawn in the same order for every arm."""
        encoder = nn.Sequential(nn.Linear(_PIXELS, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _DIM), *last)
        return RelativeEncoder(encoder, self.anchors, _DIM) if arm == "relative" else encoder

    def _anchors(self, arm: str, count: int) -> list[Tensor]:
        return anchors_of_models(arm, self.world.train, count, self.settings.models, self.seed, self._noise)

    def _noise(self, count: int) -> Float[Tensor, "anchors pixels"]:
        return torch.rand(count, _PIXELS, generator=stream_generator(self.seed, "noise"))

    def _numbers(self) -> range:
        return range(self.settings.models)

    def _model_seed(self, model: int) -> int:
        return 1000 * self.seed + model


def _classifier(model: nn.Module) -> _Classifier:
    assert isinstance(model, _Classifier)
    return model


def _picture(
    codes: list[nn.Module], decoder: nn.Module, pixels: Float[Tensor, "n pixels"], labels: Int[Tensor, " n"]
) -> UInt8[np.ndarray, "height width 3"]:
    """A column per digit; rows: the image, its own reconstruction, then those from the other models' codes."""
    places = torch.tensor([int((labels == label).nonzero()[0]) for label in range(_CLASSES)])
    chosen = pixels[places]
    rows = [chosen, *(run(decoder, run(code, chosen)) for code in codes)]
    return tile(rows, lambda row: row.unflatten(1, (8, 8)))


def tile(rows: list[Tensor], shape: Callable[[Tensor], Tensor], zoom: int = 6) -> UInt8[np.ndarray, "height width 3"]:
    """Images in rows, enlarged, with a gap around each.

    Args:
        rows: of equally many images each.
        shape: makes ``(n, height, width)`` or ``(n, 3, height, width)`` in [0, 1] of a row.
        zoom: pixels per pixel.
    """
    lines = []
    for row in rows:
        images = shape(row).clamp(0, 1)
        images = images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images
        large = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
        lines.append(torch.cat(list(F.pad(large, (2, 2, 2, 2), value=1.0)), dim=2))
    picture = torch.cat(lines, dim=1).permute(1, 2, 0)
    return (picture * 255).round().to(torch.uint8).numpy()
