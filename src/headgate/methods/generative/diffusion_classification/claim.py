"""The claim: a frozen denoiser is a good encoder, best somewhere in its middle and at little noise, and the head matters too.

A small diffusion transformer learns pictures of coloured shapes without labels (the null label is read). What its blocks tell
about shape and quadrant is probed linearly, block by block and time by time, from mean-pooled features; so are an untrained
network of the same kind and the mean-pooled latents themselves. A supervised network shows the ceiling.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from headgate.data.cifar import Cifar
from headgate.data.folders import data_folder
from headgate.data.imagenet import IMAGENET_MEAN, IMAGENET_STD, ImageFolders, imagenet_folder
from headgate.data.seeding import stream_generator
from headgate.data.shape_pictures import ShapePictures, shape_pictures
from headgate.errors import DataError, MissingExtraError
from headgate.measurement import Curve, Measurement
from headgate.methods.generative.diffusion_classification.attention import AttentionHead
from headgate.methods.generative.diffusion_classification.classifier import DiffusionClassifier
from headgate.methods.generative.diffusion_classification.experiments import (
    Grid,
    PictureNet,
    Rows,
    open_gates,
    probe_table,
    score_attention,
    train_discriminator,
    train_picture_net,
    train_unet,
)
from headgate.methods.generative.diffusion_classification.heads import LinearProbe
from headgate.methods.generative.diffusion_classification.recipe import HEAD_RECIPES, HeadRecipe
from headgate.methods.generative.diffusion_classification.unet import ADMUNet
from headgate.nn.diffusion import VP, DiffusionFeatures, DiT, LinearFlow, Path, numbered_blocks, pool_features
from headgate.train import base_model, count_parameters, seeded
from headgate.train.denoisers import ToyDenoiser, ToyRecipe, toy_codec, toy_dit

__all__ = ["RATES", "SCALES", "choose_rate", "measure"]

RATES = (1e-3, 3e-3, 1e-2)
"""The learning rates that trained heads and the supervised network choose from."""

_TIMES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
_STEPS = (0, 20, 50, 100, 200, 350, 500, 700, 900)
_LOW = 0.1
_HALF = 0.5


@dataclass(frozen=True)
class ToyScale:
    """Pictures of shapes.

    Attributes:
        rows: pictures to fit, to choose and to test on.
        recipe: of the denoiser; the seed of the measurement takes the place of its own.
        times: of the grid, as shares of the whole noise.
        draws: draws of noise that accuracies are averaged over.
        head_steps: updates of the attention head.
        supervised_steps: updates of the supervised network.
        attention_rate: learning rate of the attention head; :func:`choose_rate` chose it.
        supervised_rate: of the supervised network.
        rival_steps: updates of the U-Net and of the discriminator.
        arms: that are measured.
    """

    rows: Rows
    recipe: ToyRecipe
    times: tuple[float, ...] = _TIMES
    draws: int = 3
    head_steps: int = 300
    supervised_steps: int = 300
    attention_rate: float = 1e-3
    supervised_rate: float = 1e-2
    rival_steps: int = 4000
    arms: tuple[str, ...] = ("trained", "untrained", "raw", "cnn")


@dataclass(frozen=True)
class CifarScale:
    """CIFAR-10 and a public DDPM of its images.

    Attributes:
        rows: images to fit, to choose and to test on.
        every: every so many blocks are probed, from the first on.
        steps: times of the grid.
        arms: that are measured.
    """

    rows: Rows = field(default_factory=lambda: Rows(9000, 1000, 10000))
    every: int = 3
    steps: tuple[int, ...] = (0, 10, 30, 90, 150, 300, 500)
    arms: tuple[str, ...] = ("trained", "untrained", "raw")


@dataclass(frozen=True)
class PaperScale:
    """ImageNet and the published ADM U-Net for 256 pixels.

    Attributes:
        classes: how many classes, the first by name; all where ``None``.
        block: read.
        step: time.
        recipes: how the linear and the attention head are trained.
        arms: that are measured.
    """

    classes: int | None = 50
    block: int = 24
    step: int = 90
    recipes: Mapping[str, HeadRecipe] = field(
        default_factory=lambda: {name: HEAD_RECIPES[name] for name in ("linear", "attention")}
    )
    arms: tuple[str, ...] = ("trained", "untrained")


SCALES: dict[str, ToyScale | CifarScale | PaperScale] = {
    "smoke": ToyScale(
        Rows(64, 32, 32),
        ToyRecipe(steps=4, batch_size=8, num_images=64, depth=3, dim=32),
        times=(0.0, 0.1, 0.5),
        draws=1,
        head_steps=2,
        supervised_steps=2,
    ),
    "laptop": ToyScale(Rows(1500, 500, 1000), ToyRecipe()),
    "full": ToyScale(
        Rows(1500, 500, 1000), ToyRecipe(steps=4000), arms=("trained", "untrained", "raw", "cnn", "unet", "gan")
    ),
    "cifar10": CifarScale(),
    "paper": PaperScale(),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    Args:
        arm: one of the card's arms at that scale.
        seed: of pictures, networks, noise and heads.
        scale: a key of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data or weights are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    if arm not in settings.arms:
        raise ValueError(f"arm must be one of {', '.join(settings.arms)} at scale {scale}, got {arm!r}")
    if isinstance(settings, CifarScale):
        return _measure_cifar(arm, seed, settings)
    if isinstance(settings, PaperScale):
        return _measure_imagenet(arm, seed, settings)
    return _measure_toy(arm, seed, settings)


def choose_rate(scale: str, seeds: Sequence[int] = (100,)) -> dict[str, dict[float, float]]:
    """Validate every learning rate of :data:`RATES` for what is trained on labels, on seeds that are not reported.

    Returns:
        ``"attention"`` and ``"supervised"`` → learning rate → accuracy on the validation pictures, averaged over both
        targets and the seeds.
    """
    settings = SCALES[scale]
    assert isinstance(settings, ToyScale)
    rows = settings.rows
    chosen = Rows(rows.train, 0, rows.validation)
    scores: dict[str, dict[float, float]] = {"attention": {}, "supervised": {}}
    for rate in RATES:
        attention, supervised = [], []
        for seed in seeds:
            pictures, targets = _pictures(settings, seed)
            toy = toy_dit(replace(settings.recipe, seed=seed))
            latents = toy.codec.encode(pictures.images)
            layers = _numbers(toy.model)
            cell = (layers[len(layers) // 2], min(settings.times, key=lambda t: abs(t - 0.02)))
            maps = _maps(toy.model, toy.path, cell, latents, seed, 0)
            for labels in targets.values():
                attention.append(score_attention(maps, labels, rows, settings.head_steps, rate, seed, choosing=True))
            found = train_picture_net(pictures.images, targets, chosen, settings.supervised_steps, rate, seed)
            supervised += list(found.values())
        scores["attention"][rate] = float(np.mean(attention))
        scores["supervised"][rate] = float(np.mean(supervised))
    return scores


def _measure_toy(arm: str, seed: int, settings: ToyScale) -> Measurement:
    pictures, targets = _pictures(settings, seed)
    if arm == "cnn":
        found = train_picture_net(
            pictures.images, targets, settings.rows, settings.supervised_steps, settings.supervised_rate, seed
        )
        return Measurement(found, notes={"learning rate": settings.supervised_rate})
    codec = toy_codec(settings.recipe.preset)
    latents = codec.encode(pictures.images)
    if arm == "raw":
        grids = probe_table([lambda x: {("latents", 0.0): x.mean(dim=(2, 3))}], latents, targets, settings.rows)
        return Measurement({name: grid.accuracy() for name, grid in grids.items()}, notes={"numbers": latents.shape[1]})
    if arm == "gan":
        return _measure_discriminator(pictures, targets, settings, seed)
    if arm == "unet":
        return _measure_unet(pictures, targets, settings, seed)
    recipe = replace(settings.recipe, seed=seed)
    if arm == "trained":
        toy = toy_dit(recipe)
    else:
        with seeded(seed):
            network = DiT(8, 2, 8, recipe.dim, recipe.depth, recipe.num_heads, num_classes=16)
        toy = ToyDenoiser(open_gates(network, seed).eval(), codec, LinearFlow(), 0.0)
    encoders = _encoders(toy.model, toy.path, settings.times, settings.draws, seed, condition="null", latents=True)
    grids = probe_table(encoders, latents, targets, settings.rows)
    heads: dict[str, float] = {}
    if arm == "trained":
        heads = _score_heads(toy, grids["shape"], latents, targets, settings, seed)
    return _summary(grids, toy.model, toy.seconds, _LOW, _HALF, heads)


def _measure_unet(pictures: ShapePictures, targets: Mapping[str, Tensor], settings: ToyScale, seed: int) -> Measurement:
    denoised = shape_pictures(settings.recipe.num_images, seed, settings.recipe.preset, "denoiser")
    steps = settings.rival_steps
    model, seconds = base_model(
        "shape_unet",
        lambda: ADMUNet(32, 3, 32, 3, 1, (2, 4), (1, 2, 2), num_head_channels=16),
        train_unet(denoised, steps, seed),
        {"steps": steps, "seed": seed, "pictures": asdict(settings.recipe), "revision": 1},
    )
    times = [_STEPS[_TIMES.index(t)] for t in settings.times]
    encoders = _encoders(model, VP.linear(), times, settings.draws, seed)
    grids = probe_table(encoders, pictures.images, targets, settings.rows)
    return _summary(grids, model, seconds, 1000 * _LOW, 1000 * _HALF)


def _measure_discriminator(
    pictures: ShapePictures, targets: Mapping[str, Tensor], settings: ToyScale, seed: int
) -> Measurement:
    real = shape_pictures(settings.recipe.num_images, seed, settings.recipe.preset, "denoiser")
    model, seconds = base_model(
        "shape_discriminator",
        lambda: PictureNet([1], (48, 96, 160)),
        train_discriminator(real, settings.rival_steps, seed),
        {"steps": settings.rival_steps, "seed": seed, "pictures": asdict(settings.recipe), "revision": 1},
    )

    def read(images: Tensor) -> dict[tuple[Any, float], Tensor]:
        with torch.no_grad():
            return {(index, 0.0): maps.mean(dim=(2, 3)) for index, maps in enumerate(model.maps(images), 1)}

    grids = probe_table([read], pictures.images, targets, settings.rows)
    notes: dict[str, float | int | str] = {
        "parameters": count_parameters(model),
        "best block": int(grids["shape"].best()[0]) + 1,
    }
    return Measurement({name: grid.accuracy() for name, grid in grids.items()}, notes=notes, base_seconds=seconds)


def _measure_cifar(arm: str, seed: int, settings: CifarScale) -> Measurement:
    rows = settings.rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train, test = (Cifar(data_folder("cifar10"), split) for split in ("train", "test"))
    order = torch.randperm(len(train), generator=stream_generator(seed, "cifar rows"))
    chosen = order[: rows.train + rows.validation]
    images = torch.cat([train.images[chosen], test.images[: rows.test]]).float() / 127.5 - 1
    targets = {"shape": torch.cat([train.labels[chosen], test.labels[: rows.test]])}
    if arm == "raw":
        grids = probe_table([lambda x: {("pixels", 0.0): x.mean(dim=(2, 3))}], images, targets, rows)
        return Measurement({"shape": grids["shape"].accuracy()})
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise MissingExtraError("diffusers", "diffusion", "the scale cifar10") from error
    folder = data_folder("ddpm_cifar10")
    if arm == "trained":
        model = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    else:
        with seeded(seed):
            model = UNet2DModel.from_config(UNet2DModel.load_config(folder, local_files_only=True))
    layers = list(range(1, len(numbered_blocks(model)) + 1, settings.every))
    encoders = _encoders(model.eval(), VP.linear(), settings.steps, 1, seed, layers=layers)
    grids = probe_table(encoders, images, targets, rows)
    return _summary(grids, model, 0.0, 100, 500)


def _measure_imagenet(arm: str, seed: int, settings: PaperScale) -> Measurement:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = ADMUNet()
    if arm == "trained":
        path = data_folder("adm_256") / "256x256_diffusion_uncond.pt"
        if not path.is_file():
            raise DataError(f"{path} was not found; it is published by openai/guided-diffusion")
        unet.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    unet.to(device)
    folder = imagenet_folder()
    train, test = (_Photographs(ImageFolders(folder / part), settings.classes) for part in ("train", "val"))
    classes = len(train.folders.class_names) if settings.classes is None else settings.classes
    width = unet.block_channels[settings.block - 1]
    heads = {"linear": lambda: LinearProbe(width, classes), "attention": lambda: AttentionHead(width, classes)}
    metrics = {}
    for name, recipe in settings.recipes.items():
        with seeded(seed):
            head = heads[name]().to(device)
        encoder = DiffusionFeatures(
            unet, VP.linear(), [settings.block], [settings.step], generator=stream_generator(seed, "noise")
        )
        classifier = DiffusionClassifier(encoder, head, recipe, seed=seed)
        classifier.fit(_Loader(train, recipe.batch_size, seed, device))
        right = total = 0
        for images, labels in _Loader(test, recipe.batch_size, None, device):
            right += int((torch.from_numpy(classifier.predict(images)) == labels.cpu()).sum())
            total += len(labels)
        metrics[name] = right / total
    found = {"linear2_shape": metrics["linear"], "attention_shape": metrics["attention"]}
    return Measurement({"shape": max(found.values()), **found})


class _Photographs:
    """Central crops in [-1, 1] of the first classes."""

    def __init__(self, folders: ImageFolders, classes: int | None) -> None:
        self.folders = folders
        limit = len(folders.class_names) if classes is None else classes
        self.places = (folders.labels < limit).nonzero().flatten()

    def __getitem__(self, places: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.places[places]
        standardised = self.folders.central_crops(rows.tolist(), 256, 1.0)
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return ((standardised * std + mean) * 2 - 1).clamp(-1, 1), self.folders.labels[rows]


class _Loader:
    """Batches of photographs, anew in another order at every pass, or in theirs where there is no seed."""

    def __init__(self, photographs: _Photographs, batch_size: int, seed: int | None, device: str) -> None:
        self.photographs, self.batch_size, self.seed, self.device = photographs, batch_size, seed, device
        self.passes = 0

    def __len__(self) -> int:
        return -(-len(self.photographs.places) // self.batch_size)

    def __iter__(self) -> Any:
        count = len(self.photographs.places)
        order = torch.arange(count)
        if self.seed is not None:
            order = torch.randperm(count, generator=stream_generator(self.seed, "photographs", self.passes))
            self.passes += 1
        for part in order.split(self.batch_size):
            images, labels = self.photographs[part]
            yield images.to(self.device), labels.to(self.device)


def _pictures(settings: ToyScale, seed: int) -> tuple[ShapePictures, dict[str, Tensor]]:
    pictures = shape_pictures(settings.rows.total, seed, settings.recipe.preset, "probe")
    return pictures, {"shape": pictures.shape, "quadrant": pictures.quadrant}


def _numbers(model: nn.Module) -> list[int]:
    return list(range(1, len(numbered_blocks(model)) + 1))


def _encoders(
    model: nn.Module,
    path: Path,
    times: Sequence[float],
    draws: int,
    seed: int,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> list[Callable[[Tensor], Mapping[tuple[Any, float], Tensor]]]:
    """One encoder per draw; all arms of a seed see the same noise."""
    return [
        DiffusionFeatures(
            model,
            path,
            _numbers(model) if layers is None else layers,
            times,
            pool="mean",
            generator=stream_generator(seed, "noise", draw),
            **options,
        )
        for draw in range(draws)
    ]


def _maps(model: nn.Module, path: Path, cell: tuple[int, float], latents: Tensor, seed: int, draw: int) -> Tensor:
    """The maps of one cell, 4 × 4."""
    generator = stream_generator(seed, "head noise", draw)
    encoder = DiffusionFeatures(
        model, path, [cell[0]], [cell[1]], pool=4, condition="null", generator=generator, latents=True
    )
    return torch.cat([next(iter(encoder(part).values())) for part in latents.split(500)])


def _score_heads(
    toy: ToyDenoiser,
    grid: Grid,
    latents: Tensor,
    targets: Mapping[str, Tensor],
    settings: ToyScale,
    seed: int,
) -> dict[str, float]:
    """Accuracy of linear heads on 1 × 1 and 2 × 2 cells and of attention on 4 × 4, at the cell that is best for the shape."""
    row, column = grid.best()
    sums: dict[str, float] = {}
    for draw in range(settings.draws):
        maps = _maps(toy.model, toy.path, (grid.layers[row], grid.times[column]), latents, seed, draw)
        for pool in (1, 2):
            pooled = pool_features(maps, pool).flatten(1)
            tables = probe_table([lambda x: {("cell", 0.0): x}], pooled, targets, settings.rows)
            for name, table in tables.items():
                key = f"linear{pool}_{name}"
                sums[key] = sums.get(key, 0.0) + table.accuracy() / settings.draws
        for name, labels in targets.items():
            found = score_attention(maps, labels, settings.rows, settings.head_steps, settings.attention_rate, seed)
            key = f"attention_{name}"
            sums[key] = sums.get(key, 0.0) + found / settings.draws
    return sums


def _summary(
    grids: Mapping[str, Grid],
    model: nn.Module,
    seconds: float,
    low: float,
    half: float,
    heads: Mapping[str, float] | None = None,
) -> Measurement:
    """The figures of a network that was read in a grid."""
    grid = grids["shape"]
    count = len(grid.layers)
    row, column = grid.best()
    quiet = [index for index, time in enumerate(grid.times) if time <= low]
    loud = [index for index, time in enumerate(grid.times) if time > low]
    metrics = {name: table.accuracy() for name, table in grids.items()}
    metrics["interior_gain"] = grid.accuracy(layers=range(1, count - 1)) - grid.accuracy(layers=(0, count - 1))
    metrics["low_noise_gain"] = grid.accuracy(times=quiet) - grid.accuracy(times=loud)
    metrics["lost_at_half"] = grid.accuracy() - grid.accuracy(times=[grid.times.index(half)])
    blocks = [float(index) for index in range(1, count + 1)]
    return Measurement(
        metrics={**metrics, **(heads or {})},
        curves={
            "shape by noise, best block": Curve(grid.times, grid.test[row].tolist(), "t", "accuracy"),
            "shape by block, best noise": Curve(blocks, grid.test[:, column].tolist(), "block", "accuracy"),
        },
        pictures={"shape, block by noise": _heat_map(grid)},
        notes={
            "best block": row + 1,
            "blocks": count,
            "best t": float(grid.times[column]),
            "parameters": count_parameters(model),
        },
        base_seconds=seconds,
    )


def _heat_map(grid: Grid) -> UInt8[np.ndarray, "height width 3"]:
    """Accuracy of the shape in every cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 0.6 * len(grid.times), 1.2 + 0.4 * len(grid.layers)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(grid.test, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(grid.times)), [f"{time:g}" for time in grid.times])
    axis.set_yticks(range(len(grid.layers)), [str(layer) for layer in grid.layers])
    axis.set_xlabel("t")
    axis.set_ylabel("block")
    middle = float(grid.test.min() + grid.test.max()) / 2
    for (row, column), value in np.ndenumerate(grid.test):
        colour = "white" if value < middle else "black"
        axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
