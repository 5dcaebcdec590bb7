"""The claim: a gate per direction and a 2-D part make gated linear attention a vision mixer, at a cost linear in pixels.

Grids of markers take the layer apart: each of three questions needs one of its mechanisms. Digits, CIFAR-10 and ImageNet
hold it against a vision transformer of the same size. The scale ``cost`` measures time and memory on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from headgate.data.imagenet import imagenet_folder
from headgate.errors import HeadgateError
from headgate.measurement import Curve, Measurement
from headgate.methods.vision.vig.bench import build_block, build_model, multiply_adds
from headgate.methods.vision.vig.experiments import (
    TARGETS,
    ImageData,
    MarkerScores,
    Sizes,
    Training,
    cifar_images,
    digit_images,
    image_accuracy,
    score_markers,
    train_images,
    train_markers,
)
from headgate.methods.vision.vig.imagenet import accuracy_at, build_classifier, open_splits, train_classifier
from headgate.methods.vision.vig.recipe import RECIPES, Recipe
from headgate.timing import Effort, Outcome, compare, growth_exponent, measure_peak, paired_ratios, summarize
from headgate.train import DivergedError, count_parameters, seeded, warmup_cosine

__all__ = ["RATES", "SCALES", "choose_rate", "measure"]

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The learning rates that every arm chooses from."""

_NUM_VALIDATION = 500
_BLOCK_EFFORT = Effort(rounds=9, fewest_rounds=5, sample_seconds=0.1)
_MODEL_EFFORT = Effort(rounds=5, fewest_rounds=3, budget_seconds=300)
_QUESTIONS = {"last_f": "last F before", "next_b": "next B after", "above": "cell above"}
_CONTENDERS = {"vig": "vig", "vit": "deit", "explicit": "explicit"}
_PEERS = {"vig": "explicit", "vit": "vig", "explicit": "vig"}


@dataclass(frozen=True)
class MarkerScale:
    """Grids of markers.

    Attributes:
        steps: updates, each on fresh grids.
        num_test: grids to be scored on.
        sizes: of the network.
        training: what all arms share.
        rates: arm → learning rate; :func:`choose_rate` chose it.
        grid: rows and columns.
    """

    steps: int
    num_test: int
    sizes: Sizes
    training: Training
    rates: Mapping[str, float]
    grid: tuple[int, int] = (8, 8)


@dataclass(frozen=True)
class ImageScale:
    """Classification of small images.

    Attributes:
        data: (seed, choosing) → images; ``choosing`` holds out some of the training images in place of the test images.
        patch_size: side of a patch in pixels.
        epochs: passes over the training images.
        sizes: of the network.
        training: what all arms share.
        rates: arm → learning rate; :func:`choose_rate` chose it.
    """

    data: Callable[[int, bool], ImageData]
    patch_size: int
    epochs: int
    sizes: Sizes
    training: Training
    rates: Mapping[str, float]


@dataclass(frozen=True)
class CostScale:
    """Inference of ViG-T's and DeiT-T's blocks, and of the whole models.

    Attributes:
        tokens: numbers of tokens of the blocks, in rising order.
        img_size: pixels to a side for the whole models.
        effort: how long the blocks are timed.
        model_effort: how long the models are timed.
    """

    tokens: tuple[int, ...] = (196, 784, 1764, 4096)
    img_size: int = 1024
    effort: Effort = _BLOCK_EFFORT
    model_effort: Effort = _MODEL_EFFORT


@dataclass(frozen=True)
class PaperScale:
    """ImageNet-1k.

    Attributes:
        rates: arm → peak learning rate, as its authors give it.
        recipe: what all arms share.
        train_size: pixels to a side of the training crops.
        test_sizes: pixels to a side of the test crops, none of which but the first was trained on.
        options: further keywords of the models.
    """

    rates: Mapping[str, float]
    recipe: Recipe = RECIPES["vig_tiny"]
    train_size: int = 224
    test_sizes: tuple[int, ...] = (224, 384, 512, 1024)
    options: Mapping[str, Any] = field(default_factory=dict)


def _recipe(steps: int) -> Callable[[int], float]:
    """ViG's schedule on ImageNet, shortened: 20 of 300 epochs rise, then a cosine falls to 1/200."""
    return warmup_cosine(steps, warmup=steps * 20 // 300, floor=0.005)


_SMALL = Sizes(dim=48, depth=2, mlp_dim=96, vit_mlp_dim=160)

SCALES: dict[str, MarkerScale | ImageScale | CostScale | PaperScale] = {
    "smoke": MarkerScale(
        steps=4,
        num_test=20,
        sizes=Sizes(dim=24, depth=1, mlp_dim=32, vit_mlp_dim=48),
        training=Training(batch_size=4),
        rates=dict.fromkeys(("vig", "vit", "shared_gate", "forward_only", "no_2d"), 1e-2),
    ),
    "laptop": MarkerScale(
        steps=500,
        num_test=1000,
        sizes=_SMALL,
        training=Training(batch_size=16),
        rates={"vig": 1e-2, "shared_gate": 3e-2, "forward_only": 3e-2, "no_2d": 1e-2, "vit": 3e-3},
    ),
    "no_positions": MarkerScale(
        steps=500,
        num_test=1000,
        sizes=replace(_SMALL, position_std=0.0),
        training=Training(batch_size=16),
        # The best on the two directional targets, which are what this scale asks about (without the 2-D part "above" is lost).
        rates={"vig": 3e-2, "shared_gate": 1e-2, "no_2d": 1e-2, "symmetric": 1e-2},
    ),
    "digits": ImageScale(
        data=digit_images,
        patch_size=1,
        epochs=30,
        # A pixel says so little that positions of ViG's 0.02 drown in it: with them the ViT read 43%, with these 90%.
        sizes=replace(_SMALL, position_std=1.0),
        training=Training(batch_size=32),
        rates={"vig": 1e-2, "shared_gate": 1e-2, "forward_only": 1e-2, "no_2d": 1e-2, "vit": 3e-3},
    ),
    "cifar10": ImageScale(
        data=lambda seed, choosing: cifar_images(seed, choosing, count=20_000),
        patch_size=4,
        epochs=3,
        sizes=Sizes(dim=96, depth=4, mlp_dim=192, vit_mlp_dim=304),
        training=Training(batch_size=128, schedule=_recipe, label_smoothing=0.1),
        rates={"vig": 3e-3, "shared_gate": 3e-3, "forward_only": 3e-3, "no_2d": 3e-3, "vit": 3e-3},
    ),
    "cost": CostScale(),
    "paper": PaperScale(rates={"vig": 2e-3, "vit": 1e-3, "shared_gate": 2e-3, "forward_only": 2e-3, "no_2d": 2e-3}),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    At every scale but ``cost`` the result is the same whenever it is measured. Times and peaks of memory are not: there a
    seed is one repetition, and an arm is timed in turns with the one that it is compared with, so that both see the same
    moods of the machine.

    Args:
        arm: one of the card's arms at that scale.
        seed: of data, initial weights and order.
        scale: a key of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    known = tuple(_CONTENDERS) if isinstance(settings, CostScale) else tuple(settings.rates)
    if arm not in known:
        raise ValueError(f"arm must be one of {', '.join(known)} at scale {scale}, got {arm!r}")
    if isinstance(settings, MarkerScale):
        return _measure_markers(arm, seed, settings)
    if isinstance(settings, ImageScale):
        return _measure_images(arm, seed, settings)
    if isinstance(settings, PaperScale):
        return _measure_imagenet(arm, seed, settings)
    return _measure_cost(arm, settings)


def choose_rate(arm: str, scale: str, seeds: Sequence[int] = (100, 101, 102)) -> dict[float, float]:
    """Validate every learning rate of :data:`RATES`, on seeds that are not reported.

    This is how the rates in :data:`SCALES` were chosen: the best one of each arm. Grids of markers are scored by the
    worst target, as in the criteria; images by accuracy on training images that were held out.

    Args:
        arm: an arm that is trained.
        scale: a scale at which arms are trained.
        seeds: to average over, none of those that :func:`measure` is called with.

    Returns:
        Learning rate → mean score; 0 for a training that diverged.
    """
    settings = SCALES[scale]
    assert isinstance(settings, MarkerScale | ImageScale)

    def score(rate: float, seed: int) -> float:
        try:
            if isinstance(settings, MarkerScale):
                model, _ = train_markers(
                    arm, settings.sizes, settings.training, rate, settings.steps, settings.grid, seed
                )
                return min(score_markers(model, _NUM_VALIDATION, settings.grid, seed, "validation").accuracy())
            data = settings.data(seed, True)
            classifier, _ = train_images(
                arm, settings.sizes, settings.training, rate, settings.epochs, data, settings.patch_size, seed
            )
            return image_accuracy(classifier, data)
        except DivergedError:
            return 0.0

    return {rate: sum(score(rate, seed) for seed in seeds) / len(seeds) for rate in RATES}


def _measure_markers(arm: str, seed: int, settings: MarkerScale) -> Measurement:
    rate = settings.rates[arm]
    model, losses = train_markers(arm, settings.sizes, settings.training, rate, settings.steps, settings.grid, seed)
    scores = score_markers(model, settings.num_test, settings.grid, seed, "test")
    accuracy = scores.accuracy()
    curves = {
        f"accuracy by distance, {_QUESTIONS[target]}": Curve(
            ends, shares, "cells to the marker, at most", "accuracy", True
        )
        for target, (ends, shares) in scores.by_distance().items()
    }
    return Measurement(
        metrics={"accuracy": min(accuracy), **dict(zip(TARGETS, accuracy, strict=True))},
        curves={**curves, "training loss": _loss_curve(losses, "step", 1.0)},
        pictures={"cells": _heat_maps(scores)},
        notes={"learning rate": rate, "parameters": count_parameters(model), "steps": settings.steps},
    )


def _measure_images(arm: str, seed: int, settings: ImageScale) -> Measurement:
    rate = settings.rates[arm]
    data = settings.data(seed, False)
    model, losses = train_images(
        arm, settings.sizes, settings.training, rate, settings.epochs, data, settings.patch_size, seed
    )
    return Measurement(
        metrics={"accuracy": image_accuracy(model, data)},
        curves={"training loss": _loss_curve(losses, "epoch", settings.epochs / len(losses))},
        notes={
            "learning rate": rate,
            "parameters": count_parameters(model),
            "training images": len(data.train),
            "epochs": settings.epochs,
        },
    )


def _measure_imagenet(arm: str, seed: int, settings: PaperScale) -> Measurement:
    train, test = open_splits(imagenet_folder())
    with seeded(seed):
        model = build_classifier(arm, num_classes=len(train.class_names), **settings.options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    losses = train_classifier(model, train, settings.recipe, settings.rates[arm], settings.train_size, seed)
    accuracy = {size: accuracy_at(model, test, size) for size in settings.test_sizes}
    return Measurement(
        metrics={
            "accuracy": accuracy[settings.test_sizes[0]],
            **{f"accuracy_{size}": accuracy[size] for size in settings.test_sizes[1:]},
        },
        curves={
            "accuracy by image size": Curve(
                list(accuracy), list(accuracy.values()), "pixels to a side", "accuracy", True
            ),
            "training loss": _loss_curve(losses, "epoch", settings.recipe.epochs / len(losses)),
        },
        notes={"learning rate": settings.rates[arm], "parameters": count_parameters(model)},
    )


def _measure_cost(arm: str, settings: CostScale) -> Measurement:
    """Time the block of ``arm`` in turns with that of its peer, at all sizes; and ViG-T with DeiT-T."""
    peer, largest, threads = _PEERS[arm], settings.tokens[-1], torch.get_num_threads()
    calls = {
        (name, size): build_block(_CONTENDERS[name], size).prepare() for size in settings.tokens for name in (arm, peer)
    }
    outcomes = _timed(calls, settings.effort)
    del calls
    seconds = [summarize(outcomes[arm, size].samples).median for size in settings.tokens]

    def peak(build: str, name: str, size: int, small: int) -> int:
        arguments = {"contender": _CONTENDERS[name]}
        place = f"{build_block.__module__}:{build}"
        return measure_peak(
            place, {**arguments, "size": size}, {**arguments, "size": small}, threads=threads
        ).peak_bytes

    peaks = [peak("build_block", arm, size, 16) for size in settings.tokens]
    metrics = {
        "time_exponent": growth_exponent(settings.tokens, seconds),
        "last_exponent": growth_exponent(settings.tokens[-2:], seconds[-2:]),
        "block_milliseconds": 1000 * seconds[-1],
        "block_mebibytes": peaks[-1] / 2**20,
    }
    if arm != "explicit":
        metrics["multiply_adds"] = multiply_adds(_CONTENDERS[arm], settings.img_size) / 1e9
    if arm == "vig":
        metrics["multiply_adds_published"] = multiply_adds("vig", settings.img_size, as_paper=True) / 1e9
        metrics["block_memory_ratio"] = peak("build_block", peer, largest, 16) / peaks[-1]
        models = {name: build_model(_CONTENDERS[name], settings.img_size).prepare() for name in ("vig", "vit")}
        timed = _timed(models, settings.model_effort)
        del models
        metrics["model_speed_ratio"] = summarize(paired_ratios(timed["vit"].samples, timed["vig"].samples)).median
        vig, vit = (peak("build_model", name, settings.img_size, 32) for name in ("vig", "vit"))
        metrics["model_memory_share"] = vig / vit
    return Measurement(
        metrics=metrics,
        curves={
            "time of one block": Curve(settings.tokens, [1000 * s for s in seconds], "tokens", "milliseconds", True),
            "peak memory of one block": Curve(settings.tokens, [p / 2**20 for p in peaks], "tokens", "MiB", True),
        },
        notes={
            "threads": threads,
            "timed in turns with": peer,
            "block, times the peer's": summarize(
                paired_ratios(outcomes[arm, largest].samples, outcomes[peer, largest].samples)
            ).median,
        },
    )


def _timed(calls: Mapping[Any, Callable[[], object]], effort: Effort) -> dict[Any, Outcome]:
    """Time ``calls`` in turns, under the names that they have."""
    outcomes = compare(calls, effort)
    for key, outcome in outcomes.items():
        if outcome.reason:
            raise HeadgateError(f"{key} could not be timed: {outcome.reason}\n{outcome.trace}".strip())
    return outcomes


def _loss_curve(losses: Sequence[float], unit: str, step: float) -> Curve:
    """Training loss, averaged over twenty stretches of the run."""
    stretches = [part for part in np.array_split(np.asarray(losses), 20) if len(part)]
    ends = np.cumsum([len(part) for part in stretches]) * step
    return Curve(ends.tolist(), [float(part.mean()) for part in stretches], unit, "training loss")


def _heat_maps(scores: MarkerScores) -> UInt8[np.ndarray, "height width 3"]:
    """Accuracy cell by cell, a panel per target; cells that are never asked stay grey."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.5), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    colours = colormaps["viridis"].with_extremes(bad="#dddddd")
    axes = figure.subplots(1, 3)
    for axis, target, accuracy, cells in zip(axes, TARGETS, scores.accuracy(), scores.by_cell().numpy(), strict=True):
        image = axis.imshow(np.ma.masked_invalid(cells), cmap=colours, vmin=0, vmax=1)
        axis.set_title(f"{_QUESTIONS[target]}: {100 * accuracy:.1f} %", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        for (row, column), value in np.ndenumerate(cells):
            if np.isfinite(value):
                colour = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.9, label="accuracy")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
