"""The claim: layers do what they are derived to do (compress, then sparsify), and a ViT of the same size is hardly better.

The scale ``operator`` looks at single steps, without a network; the other scales train networks and measure every layer
before and after, as the authors do, and the accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from headgate.data.imagenet import imagenet_folder
from headgate.evaluate import LayerModules, RateTable, layerwise_report
from headgate.measurement import Curve, Measurement
from headgate.methods.vision.crate.denoising import (
    STEPS,
    Mixture,
    SparseCoding,
    Tokens,
    code_signals,
    draw_tokens,
    energy_shares,
    rates,
    step,
    unit,
)
from headgate.methods.vision.crate.experiments import (
    ARMS,
    ImageData,
    Sizes,
    Training,
    attention_modules,
    cifar_images,
    digit_images,
    image_accuracy,
    rate_layers,
    train_network,
)
from headgate.methods.vision.crate.imagenet import build_classifier, open_folders, train_classifier
from headgate.methods.vision.crate.ista import ISTA
from headgate.methods.vision.crate.model import CRATE
from headgate.methods.vision.crate.recipe import RECIPES, Recipe
from headgate.nn import VisionTransformer
from headgate.train import DivergedError, count_parameters, image_recipe, seeded

__all__ = ["RATES", "SCALES", "choose_rate", "measure"]

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""The learning rates that every arm chooses from."""

_LOGIT_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_NUM_STEPS = 6


@dataclass(frozen=True)
class NetworkScale:
    """Networks that classify small images.

    Attributes:
        data: (seed, choosing) → images; ``choosing`` holds out some of the training images in place of the test images.
        sizes: of the networks.
        training: what all arms share.
        rates: arm → learning rate.
        measured: test images on which layers are measured.
    """

    data: Callable[[int, bool], ImageData]
    sizes: Sizes
    training: Training
    rates: Mapping[str, float]
    measured: int = 600


@dataclass(frozen=True)
class PaperScale:
    """ImageNet-1k.

    Attributes:
        rates: arm → peak learning rate, the recipe's.
        recipe: what both arms share.
        size: pixels to a side of the crops.
        measured: validation images on which layers are measured.
        options: further keywords of CRATE-T and DeiT-T.
    """

    rates: Mapping[str, float]
    recipe: Recipe = RECIPES["imagenet"]
    size: int = 224
    measured: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OperatorScale:
    """Single steps on tokens and signals that are drawn.

    Attributes:
        mixture: of tokens, and the step.
        coding: of signals, and ISTA.
    """

    mixture: Mixture = Mixture()  # noqa: RUF009 (frozen)
    coding: SparseCoding = SparseCoding()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Settings:
    """A scale: networks, operators, or both."""

    networks: NetworkScale | PaperScale | None = None
    operator: OperatorScale | None = None

    def arms(self) -> tuple[str, ...]:
        """What can be measured."""
        trained = tuple(self.networks.rates) if self.networks else ()
        stepped = (*STEPS, "no_threshold") if self.operator else ()
        return tuple(dict.fromkeys(trained + stepped))


SCALES: dict[str, Settings] = {
    "smoke": Settings(
        NetworkScale(
            data=digit_images,
            sizes=Sizes(dim=16, depth=2, heads=2, narrow_dim=8, patch_size=4),
            training=Training(batch_size=16, steps=3),
            rates=dict.fromkeys(ARMS, 2e-3),
            measured=40,
        ),
        OperatorScale(Mixture(num_tokens=64), SparseCoding(num_signals=32, steps=5)),
    ),
    "operator": Settings(operator=OperatorScale()),
    "laptop": Settings(
        NetworkScale(
            data=digit_images,
            sizes=Sizes(dim=48, depth=6, heads=4, narrow_dim=24, patch_size=2),
            training=Training(batch_size=96, steps=300),
            rates={
                "crate": 8e-3,
                "vit_narrow": 2e-3,
                "vit": 1e-3,
                "attention": 2e-3,
                "mlp": 4e-3,
                "no_threshold": 2e-3,
                "frozen": 2e-3,
            },
        )
    ),
    "longer": Settings(
        NetworkScale(
            data=digit_images,
            sizes=Sizes(dim=96, depth=12, heads=6, narrow_dim=48, patch_size=2),
            training=Training(batch_size=96, steps=900),
            rates=dict.fromkeys(("crate", "vit_narrow"), 2e-3),
        )
    ),
    "cifar10": Settings(
        NetworkScale(
            data=partial(cifar_images, count=20_000, augmentation="crop"),
            sizes=Sizes(dim=96, depth=6, heads=6, narrow_dim=48, patch_size=4),
            training=Training(batch_size=128, steps=468, warmup=31, label_smoothing=0.1),
            rates=dict.fromkeys(("crate", "vit_narrow", "vit"), 2e-3),
            measured=500,
        )
    ),
    "cifar10_full": Settings(
        NetworkScale(
            data=cifar_images,
            sizes=Sizes(dim=384, depth=12, heads=6, narrow_dim=192, patch_size=4),
            training=Training(batch_size=512, steps=200 * 97, warmup=20 * 97, label_smoothing=0.1),
            rates=dict.fromkeys(("crate", "vit_narrow", "vit"), 1e-3),
            measured=500,
        )
    ),
    "paper": Settings(PaperScale(rates={"crate": 2e-4, "vit_narrow": 2e-4})),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

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
    if arm not in settings.arms():
        raise ValueError(f"arm must be one of {', '.join(settings.arms())} at scale {scale}, got {arm!r}")
    parts = []
    if isinstance(settings.networks, NetworkScale) and arm in settings.networks.rates:
        parts.append(_measure_network(arm, seed, settings.networks))
    if isinstance(settings.networks, PaperScale):
        parts.append(_measure_imagenet(arm, seed, settings.networks))
    if settings.operator and arm in STEPS:
        parts.append(_measure_step(arm, seed, settings.operator.mixture))
    if settings.operator and arm in ("crate", "no_threshold"):
        lambd = settings.operator.coding.lambd if arm == "crate" else 0.0
        parts.append(_measure_coding(seed, settings.operator.coding, lambd))
    return Measurement(
        metrics={name: value for part in parts for name, value in part.metrics.items()},
        curves={name: curve for part in parts for name, curve in part.curves.items()},
        pictures={name: picture for part in parts for name, picture in part.pictures.items()},
        notes={name: note for part in parts for name, note in part.notes.items()},
    )


def choose_rate(arm: str, scale: str, seeds: Sequence[int] = (100, 101)) -> dict[float, float]:
    """Validate every learning rate of :data:`RATES`, on seeds that are not reported and on held-out training images.

    This is how the rates at scale laptop were chosen: the best one of each arm, of equal ones the lowest.

    Args:
        arm: an arm that is trained.
        scale: a scale at which small images are classified.
        seeds: to average over, none of those that :func:`measure` is called with.

    Returns:
        Learning rate → mean accuracy; 0 for a training that diverged.
    """
    settings = SCALES[scale].networks
    assert isinstance(settings, NetworkScale)

    def score(rate: float, seed: int) -> float:
        data = settings.data(seed, True)
        try:
            model, _, _ = train_network(arm, settings.sizes, settings.training, rate, data, seed)
        except DivergedError:
            return 0.0
        return image_accuracy(model, data)

    return {rate: sum(score(rate, seed) for seed in seeds) / len(seeds) for rate in RATES}


def _measure_network(arm: str, seed: int, settings: NetworkScale) -> Measurement:
    data = settings.data(seed, False)
    rate = settings.rates[arm]
    model, untrained, losses = train_network(arm, settings.sizes, settings.training, rate, data, seed)
    images = data.standardize(data.test[: settings.measured])
    device = next(model.parameters()).device
    layers = rate_layers(arm, model)
    before = layerwise_report(untrained, images, layers)
    after = layerwise_report(model, images.to(device), layers)
    accuracy = image_accuracy(model, data)
    pictures = {"attention": _attention_maps(model.cpu(), data)} if arm == "crate" else {}
    notes = {"learning rate": rate, "parameters": count_parameters(model)}
    return _network_measurement(
        accuracy,
        before,
        after,
        losses,
        notes,
        pictures,
        sparse=any(isinstance(module, ISTA) for module in model.modules()),
    )


def _measure_imagenet(arm: str, seed: int, settings: PaperScale) -> Measurement:
    train, test = open_folders(imagenet_folder())
    with seeded(seed):
        model = build_classifier(arm, len(train.class_names), **settings.options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: settings.measured].tolist()
    images = test.central_crops(chosen, settings.size).to(device)
    layers = model.rate_layers() if isinstance(model, CRATE) else _vit_layers(model)
    before = layerwise_report(model, images, layers)
    losses = train_classifier(model, train, settings.recipe, settings.rates[arm], settings.size, seed)
    after = layerwise_report(model, images, layers)
    notes = {"learning rate": settings.rates[arm], "parameters": count_parameters(model)}
    accuracy = image_recipe.image_accuracy(model, test, settings.size)
    return _network_measurement(accuracy, before, after, losses, notes, {}, sparse=isinstance(model, CRATE))


def _network_measurement(
    accuracy: float,
    before: RateTable,
    after: RateTable,
    losses: Sequence[float],
    notes: Mapping[str, float | int | str],
    pictures: Mapping[str, UInt8[np.ndarray, "height width 3"]],
    sparse: bool,
) -> Measurement:
    """What is told of a network; zeros are counted where layers end in ISTA, whose ReLU makes them."""
    metrics, curves = {"accuracy": accuracy}, {}
    depth = list(range(1, len(after.rows) + 1))
    columns = [("coding_rate", "rate", "coding rate", "coding rate of the projections (nats)")]
    if sparse:
        columns.append(("nonzeros", "nonzero", "non-zeros", "share of non-zeros in the output"))
    for column, name, title, label in columns:
        metrics[f"{name}_last"] = after.column(column)[-1]
        for table, when, suffix in ((after, "after", ""), (before, "before", "_before")):
            metrics[f"{name}_depth{suffix}"] = table.depth_correlation(column)
            curves[f"{title} by layer, {when} training"] = Curve(depth, table.column(column), "layer", label)
    stretches = [part for part in np.array_split(np.asarray(losses), 20) if len(part)]
    ends = np.cumsum([len(part) for part in stretches])
    curves["training loss"] = Curve(ends.tolist(), [float(part.mean()) for part in stretches], "step", "training loss")
    return Measurement(metrics, curves, pictures, notes)


def _vit_layers(model: VisionTransformer) -> dict[str, LayerModules]:
    """DeiT's layers: the values of its attention, and the blocks' outputs."""
    return {
        f"layer {index + 1}": attention_modules(block.mixer, f"blocks.{index}.mixer", f"blocks.{index}")  # type: ignore[arg-type]
        for index, block in enumerate(model.blocks)
    }


def _measure_step(arm: str, seed: int, mixture: Mixture) -> Measurement:
    tokens = draw_tokens(mixture, seed)
    own, union = energy_shares(tokens.z, tokens)
    raw = step(arm, tokens, mixture)
    moved = unit(raw)
    own_after, union_after = energy_shares(moved, tokens)
    metrics = {
        "own_share": own_after,
        "own_gain": own_after - own,
        "union_share": union_after,
        "union_gain": union_after - union,
    }
    within, reduction = rates(tokens.z, tokens, mixture.eps2)
    for name, z in (("raw", raw), ("unit", moved)):
        within_after, reduction_after = rates(z, tokens, mixture.eps2)
        metrics[f"rate_change_{name}"] = within_after - within
        metrics[f"reduction_change_{name}"] = reduction_after - reduction
    scaled = [_own_share_at(arm, tokens, mixture, scale) for scale in _LOGIT_SCALES]
    over = _own_shares_over_steps(arm, tokens, mixture)
    label = "energy in the own subspace"
    return Measurement(
        metrics=metrics,
        curves={
            "own share by logit scale": Curve(_LOGIT_SCALES, scaled, "logit scale τ", label, True),
            "own share over repeated steps": Curve(list(range(len(over))), over, "steps", label),
        },
        notes={"own share at the start": own, "share in all subspaces at the start": union},
    )


def _own_share_at(arm: str, tokens: Tokens, mixture: Mixture, scale: float) -> float:
    return energy_shares(unit(step(arm, tokens, replace(mixture, logit_scale=scale))), tokens)[0]


def _own_shares_over_steps(arm: str, tokens: Tokens, mixture: Mixture) -> list[float]:
    shares, now = [energy_shares(tokens.z, tokens)[0]], tokens
    for _ in range(_NUM_STEPS):
        now = now._replace(z=unit(step(arm, now, mixture)))
        shares.append(energy_shares(now.z, now)[0])
    return shares


def _measure_coding(seed: int, coding: SparseCoding, lambd: float) -> Measurement:
    objective, zeros = code_signals(coding, seed, lambd)
    steps = list(range(1, coding.steps + 1))
    return Measurement(
        metrics={
            "objective_rise": max(b - a for a, b in pairwise(objective)) / objective[0],
            "objective_left": objective[-1] / objective[0],
            "zeros_gain": zeros[-1] - zeros[0],
        },
        curves={
            "ISTA, objective": Curve([0, *steps], objective, "step", "½‖y - D z‖² + λ‖z‖₁"),
            "ISTA, zeros": Curve(steps, zeros, "step", "share of zeros in the code"),
        },
        notes={"zeros behind the first step": zeros[0], "zeros at the end": zeros[-1]},
    )


@torch.no_grad()
def _attention_maps(model: CRATE, data: ImageData, count: int = 6) -> UInt8[np.ndarray, "height width 3"]:
    """What the class token attends to in the last layer, head by head, for the first test image of some classes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = [int((data.test_labels == label).nonzero()[0]) for label in data.test_labels.unique()[:count]]
    images = data.test[chosen]
    weights = model.attention(data.standardize(images))[:, :, 0, 1:]
    maps = weights.unflatten(-1, tuple(side // model.patch_size for side in images.shape[2:])).numpy()
    rows, columns = len(chosen), 1 + maps.shape[1]
    figure = Figure(figsize=(1.25 * columns, 1.25 * rows + 0.3), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for row, axes in enumerate(figure.subplots(rows, columns, squeeze=False)):
        picture = images[row].permute(1, 2, 0).numpy()
        axes[0].imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray")
        for head, axis in enumerate(axes[1:]):
            axis.imshow(maps[row, head], cmap="viridis")
        for column, axis in enumerate(axes):
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title("image" if column == 0 else f"head {column}", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
