"""The claim: a soft convolutional start gives large gains where there are few images, and costs nothing where there are many.

Digits, one token per pixel, and CIFAR: networks that differ in the start of their first blocks alone, trained on more and
more images. The scale ``published_start`` asks what the published deviation of 0.02 does to such small networks. ImageNet:
the paper's own sizes, DeiT's recipe, and the first share of every class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from headgate.data.imagenet import ImageFolders, imagenet_folder
from headgate.data.subsets import first_of_each_class
from headgate.measurement import Curve, Measurement
from headgate.methods.vision.convit.convit import ConViT
from headgate.methods.vision.convit.experiments import (
    ImageData,
    Training,
    accuracy,
    build_classifier,
    cifar_images,
    digit_images,
    train_classifier,
)
from headgate.methods.vision.convit.presets import convit_small
from headgate.nn import deit_small
from headgate.train import DivergedError, count_parameters, seeded
from headgate.train.image_recipe import ImageRecipe, image_accuracy, train_image_classifier

__all__ = ["RATES", "SCALES", "choose_rate", "measure"]

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
"""The learning rates that every arm chooses from."""

_LOOKED_AT = 100
"""Test images over which gates' and heads' behaviour is averaged."""


@dataclass(frozen=True)
class SmallScale:
    """Small images, one network per arm and number of training images.

    Attributes:
        data: seed → images.
        counts: numbers of training images, rising; all but the largest count as few.
        decisive: the one of them with which learning rates are chosen and ``no_locality`` is held against half of the gain.
        once: arms that are trained with that number alone.
        network: keywords of :func:`build_classifier` that all arms share.
        training: what all arms share.
        rates: arm → learning rate; :func:`choose_rate` chose it.
        num_test: test images used; ``None`` for all.
        held_out: the last training images, on which learning rates are chosen.
        first_seed: added to every seed that is measured, so that it draws what no earlier choice has looked at.
    """

    data: Callable[[int], ImageData]
    counts: tuple[int, ...]
    decisive: int
    network: Mapping[str, Any]
    training: Training
    rates: Mapping[str, float]
    once: tuple[str, ...] = ()
    num_test: int | None = None
    held_out: int = 300
    first_seed: int = 0


@dataclass(frozen=True)
class PaperScale:
    """ImageNet-1k, or any photographs in class folders.

    Attributes:
        shares: of the images of every class that are trained on, rising.
        decisive: the one of them that the main figure shows.
        models: arm → its model.
        recipe: what all arms share, learning rate included.
        options: further keywords of the models.
    """

    shares: tuple[float, ...]
    decisive: float
    models: Mapping[str, Callable[..., nn.Module]]
    recipe: ImageRecipe = field(default_factory=ImageRecipe)
    options: Mapping[str, Any] = field(default_factory=dict)


_PUBLISHED_DIGITS = {
    "img_size": 8,
    "patch_size": 1,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 36,
    "depth": 4,
    "num_heads": 4,
    "local_up_to_layer": 3,
    "mlp_ratio": 2,
    "drop_path_rate": 0.0,
}
_DIGITS = {**_PUBLISHED_DIGITS, "position_std": 1.0}
_CIFAR10 = {
    "img_size": 32,
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 108,
    "depth": 6,
    "num_heads": 9,
    "local_up_to_layer": 5,
    "mlp_ratio": 2,
    "drop_path_rate": 0.0,
    "position_std": 0.5,
}
_CIFAR100 = {
    "img_size": 32,
    "patch_size": 4,
    "num_classes": 100,
    "embed_dim": 288,
    "depth": 12,
    "num_heads": 9,
    "local_up_to_layer": 10,
    "drop_path_rate": 0.1,
}
_ARMS = ("convit", "deit", "no_locality", "content_only", "position_only")
_DIGITS_RATES = {**dict.fromkeys(_ARMS, 2e-3), "convit": 4e-3, "position_only": 4e-3}

SCALES: dict[str, SmallScale | PaperScale] = {
    "smoke": SmallScale(
        data=digit_images,
        counts=(50, 100, 300, 1197),
        decisive=100,
        network={**_DIGITS, "embed_dim": 8, "depth": 2, "local_up_to_layer": 1},
        training=Training(steps=lambda count: 2, batch_size=8, clip_norm=1.0),
        rates=dict.fromkeys(_ARMS, 2e-3),
        once=_ARMS[2:],
        num_test=50,
    ),
    "laptop": SmallScale(
        data=digit_images,
        counts=(50, 100, 300, 1197),
        decisive=100,
        network=_DIGITS,
        training=Training(steps=lambda count: 600, batch_size=16, clip_norm=1.0),
        rates=_DIGITS_RATES,
        once=_ARMS[2:],
        first_seed=10,
    ),
    "longer": SmallScale(
        data=digit_images,
        counts=(50, 100, 300, 1197),
        decisive=100,
        network=_DIGITS,
        training=Training(steps=lambda count: 1600, batch_size=16, clip_norm=1.0),
        rates=_DIGITS_RATES,
        once=_ARMS[2:],
        first_seed=10,
    ),
    "published_start": SmallScale(
        data=digit_images,
        counts=(50, 100, 300, 1197),
        decisive=100,
        network=_PUBLISHED_DIGITS,
        training=Training(steps=lambda count: 300),
        rates={"convit": 1e-3, "deit": 8e-3, "no_locality": 4e-3, "strong_positions": 4e-3},
        once=("no_locality",),
    ),
    "cifar10": SmallScale(
        data=cifar_images,
        counts=(500, 2000, 10_000),
        decisive=500,
        network=_CIFAR10,
        training=Training(steps=lambda count: 600, label_smoothing=0.1),
        rates=dict.fromkeys(_ARMS, 1e-3),
        once=_ARMS[2:],
        held_out=5000,
    ),
    "cifar100": SmallScale(
        data=lambda seed: cifar_images(seed, "cifar100"),
        counts=(5000, 15_000, 50_000),
        decisive=5000,
        network=_CIFAR100,
        training=Training(steps=lambda count: 200 * (count // 128), batch_size=128, label_smoothing=0.1),
        rates=dict.fromkeys(_ARMS, 5e-4),
        once=_ARMS[2:],
        held_out=5000,
    ),
    "paper": PaperScale(
        shares=(0.05, 0.1, 0.3, 0.5, 1.0),
        decisive=0.1,
        models={"convit": convit_small, "deit": lambda **options: deit_small(**{"drop_path_rate": 0.1, **options})},
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed: accuracy over the number of training images, gates and attention distances.

    Args:
        arm: one of the card's arms at that scale.
        seed: of data, initial weights, order and augmentation.
        scale: a key of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    known = tuple(settings.rates if isinstance(settings, SmallScale) else settings.models)
    if arm not in known:
        raise ValueError(f"arm must be one of {', '.join(known)} at scale {scale}, got {arm!r}")
    if isinstance(settings, SmallScale):
        return _measure_small(arm, settings.first_seed + seed, settings)
    return _measure_imagenet(arm, seed, settings)


def choose_rate(arm: str, scale: str, seeds: Sequence[int] = (100,)) -> dict[float, float]:
    """Validate every learning rate of :data:`RATES`, on seeds that are not reported.

    This is how the rates at scale ``laptop`` were chosen: the best one of each arm.

    Args:
        arm: an arm of that scale.
        scale: a scale of small images.
        seeds: to average over, none of those that :func:`measure` is called with.

    Returns:
        Learning rate → accuracy on held-out training images, averaged over seeds, with the decisive number of training
        images; a training that diverged counts 0.
    """
    settings = SCALES[scale]
    assert isinstance(settings, SmallScale)

    def score(rate: float, seed: int) -> float:
        data = settings.data(seed)
        try:
            model, _ = _trained(arm, seed, settings, data, settings.decisive, rate)
        except DivergedError:
            return 0.0
        held = slice(len(data.train) - settings.held_out, None)
        return accuracy(model, data, data.train[held], data.train_labels[held])

    return {rate: sum(score(rate, seed) for seed in seeds) / len(seeds) for rate in RATES}


def _measure_small(arm: str, seed: int, settings: SmallScale) -> Measurement:
    data = settings.data(seed)
    test, labels = data.test[: settings.num_test], data.test_labels[: settings.num_test]
    counts = (settings.decisive,) if arm in settings.once else settings.counts
    scores: dict[int, float] = {}
    for count in counts:
        model, loss = _trained(arm, seed, settings, data, count)
        scores[count] = accuracy(model, data, test, labels)
    metrics = {
        "decisive": scores[settings.decisive],
        **_summary(list(scores.values())),
        **{f"accuracy_{count}_images": score for count, score in scores.items()},
    }
    if arm == "no_locality":
        # 2 n - d, where n and d are the accuracies of this arm and of DeiT: half of the way there leads to n.
        deit, _ = _trained("deit", seed, settings, data, settings.decisive)
        metrics["half_mark"] = 2 * scores[settings.decisive] - accuracy(deit, data, test, labels)

    looked_at = data.standardize(test[:_LOOKED_AT])
    start, model = build_classifier(arm, seed, **settings.network).eval(), model.cpu().eval()
    before, after = start.attention_distances(looked_at), model.attention_distances(looked_at)
    metrics |= {"distance_start": float(before.mean()), "distance": float(after.mean())}
    curves = {
        "accuracy": Curve(counts, list(scores.values()), "training images", "test accuracy", True),
        "attention distance after training": _by_block(after, "patches"),
    }
    pictures = {}
    gates = model.gates().detach()
    if len(gates):
        metrics["gate"] = float(gates.mean())
        curves["share of position after training"] = _by_block(gates, "mean gate")
        pictures["heads"] = _head_maps(start, model, looked_at)
    notes = {
        "learning rate": settings.rates[arm],
        "parameters": count_parameters(model),
        f"training loss with {counts[-1]} images": loss,
    }
    return Measurement(metrics, curves, pictures, notes)


def _trained(
    arm: str, seed: int, settings: SmallScale, data: ImageData, count: int, rate: float | None = None
) -> tuple[ConViT, float]:
    """The network of an arm after training on ``count`` images, and its last loss."""
    model = build_classifier(arm, seed, **settings.network).to(_device())
    rate = settings.rates[arm] if rate is None else rate
    return model, train_classifier(model, data, count, settings.training, rate, seed)


def _measure_imagenet(arm: str, seed: int, settings: PaperScale) -> Measurement:
    folder = imagenet_folder()
    train, test = ImageFolders(folder / "train"), ImageFolders(folder / "val")
    scores = []
    for share in settings.shares:
        with seeded(seed):
            model = settings.models[arm](num_classes=len(train.class_names), **settings.options).to(_device())
        places = first_of_each_class(train.labels, share)
        train_image_classifier(model, train, settings.recipe, seed, places=places)
        scores.append(image_accuracy(model, test, settings.recipe.size))
    percents = [round(100 * share) for share in settings.shares]
    curves = {"accuracy": Curve(percents, scores, "training images of every class, %", "test accuracy", True)}
    if isinstance(model, ConViT):
        curves["share of position after training"] = _by_block(model.gates().detach().cpu(), "mean gate")
    return Measurement(
        {
            "decisive": scores[settings.shares.index(settings.decisive)],
            **_summary(scores),
            **{f"accuracy_{percent}_percent": score for percent, score in zip(percents, scores, strict=True)},
        },
        curves,
        notes={"learning rate": settings.recipe.learning_rate, "parameters": count_parameters(model)},
    )


def _summary(scores: Sequence[float]) -> dict[str, float]:
    """Accuracy with few images, with all, and what few images cost; nothing where there is one number of images alone."""
    if len(scores) == 1:
        return {}
    few, full = float(np.mean(scores[:-1])), scores[-1]
    return {"few": few, "full": full, "cost_of_few": full - few}


def _by_block(values: Float[Tensor, "blocks heads"], label: str) -> Curve:
    return Curve([index + 1 for index in range(len(values))], values.mean(dim=1).tolist(), "block", label)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _head_maps(start: ConViT, trained: ConViT, images: Tensor) -> UInt8[np.ndarray, "height width 3"]:
    """Attention of the central patch, averaged over images: a row per block, the heads at the start and after training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = start.grid_size
    centre = (rows // 2) * columns + columns // 2
    gates, heads = trained.gates(), trained.gates().shape[1]
    figure = Figure(figsize=(0.95 * (2 * heads + 1), 1.15 * len(gates) + 0.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, wspace=0.03)
    for half, model, title in zip(halves, (start, trained), ("at the start", "after training"), strict=True):
        half.suptitle(title, fontsize=10)
        axes = half.subplots(len(gates), heads, squeeze=False)
        for block, (weights, gate) in enumerate(zip(model.attentions(images), model.gates(), strict=False)):
            maps = weights[:, :, centre].mean(dim=0).unflatten(-1, (rows, columns))
            for head, axis in enumerate(axes[block]):
                axis.imshow(maps[head].numpy(), cmap="viridis", vmin=0)
                axis.plot(columns // 2, rows // 2, "s", mec="#ff5555", mfc="none", ms=4)
                axis.set_title(f"gate {float(gate[head]):.2f}", fontsize=7, pad=2)
                axis.set_xticks([])
                axis.set_yticks([])
            axes[block][0].set_ylabel(f"block {block + 1}", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
