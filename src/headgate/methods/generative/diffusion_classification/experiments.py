"""What the arms of the claim are made of: the networks, their features, and how a grid of probes is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.data.seeding import portable_normal, stream_generator
from headgate.data.shape_pictures import ShapePictures
from headgate.evaluate.grid_probe import collect_grid, probe_grid
from headgate.methods.generative.diffusion_classification.attention import AttentionHead
from headgate.nn.diffusion import VP, ADMUNet, DiT, denoising_loss
from headgate.train import epoch_batches, fit, make_optimizer, one_cycle, seeded
from headgate.train.ema import EMA

__all__ = [
    "Grid",
    "PictureNet",
    "Rows",
    "open_gates",
    "probe_table",
    "score_attention",
    "train_discriminator",
    "train_picture_net",
    "train_unet",
]


class Rows(NamedTuple):
    """How many pictures are fitted on, chosen on and tested on; they stand in this order."""

    train: int
    validation: int
    test: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.train + self.validation + self.test


@dataclass(frozen=True)
class Grid:
    """Accuracy of a target in every cell, averaged over draws of noise.

    Attributes:
        layers: rows, in the network's order.
        times: columns, rising.
        validation: ``(layers, times)``, for choosing.
        test: the same on the test pictures.
    """

    layers: tuple[Any, ...]
    times: tuple[float, ...]
    validation: Float[np.ndarray, "layers times"]
    test: Float[np.ndarray, "layers times"]

    def best(self, layers: Sequence[int] | None = None, times: Sequence[int] | None = None) -> tuple[int, int]:
        """Row and column of the best cell on the validation pictures, the first of equals, within some rows and columns."""
        rows = list(range(len(self.layers))) if layers is None else list(layers)
        columns = list(range(len(self.times))) if times is None else list(times)
        part = self.validation[np.ix_(rows, columns)]
        row, column = np.unravel_index(int(part.argmax()), part.shape)
        return rows[int(row)], columns[int(column)]

    def accuracy(self, layers: Sequence[int] | None = None, times: Sequence[int] | None = None) -> float:
        """Accuracy on the test pictures of that cell."""
        return float(self.test[self.best(layers, times)])


def probe_table(
    encoders: Sequence[Callable[[Tensor], Mapping[tuple[Any, float], Tensor]]],
    inputs: Tensor,
    targets: Mapping[str, Int[Tensor, " n"]],
    rows: Rows,
) -> dict[str, Grid]:
    """Probe every cell of encoders that differ in their noise alone, and average over them.

    Args:
        encoders: one per draw of noise.
        inputs: images or latents ``(n, ...)``.
        targets: name → labels.
        rows: what is fitted, chosen and tested on.
    """
    train, rest = slice(0, rows.train), slice(rows.train, rows.total)
    sums: dict[str, dict[tuple[Any, float], np.ndarray]] = {name: {} for name in targets}
    for encoder in encoders:
        features = collect_grid(encoder, inputs)
        cells = probe_grid(
            {key: value[train] for key, value in features.items()},
            {name: labels[train] for name, labels in targets.items()},
            {key: value[rest] for key, value in features.items()},
            {name: labels[rest] for name, labels in targets.items()},
        )
        for cell in cells:
            key = (cell.layer, cell.t)
            sums[cell.target][key] = sums[cell.target].get(key, 0.0) + cell.correct / len(encoders)
    grids = {}
    for name, correct in sums.items():
        layers = tuple(dict.fromkeys(layer for layer, _ in correct))
        times = tuple(sorted({time for _, time in correct}))
        table = np.array([[correct[layer, time] for time in times] for layer in layers])
        validation, test = table[..., : rows.validation].mean(-1), table[..., rows.validation :].mean(-1)
        grids[name] = Grid(layers, times, validation, test)
    return grids


def score_attention(
    maps: Float[Tensor, "n channels side side"],
    labels: Int[Tensor, " n"],
    rows: Rows,
    steps: int,
    learning_rate: float,
    seed: int,
    choosing: bool = False,
) -> float:
    """Accuracy of an attention head (one block, 64 channels, 4 × 4 cells, Adam) on the test or the validation pictures."""
    classes = int(labels.max()) + 1
    with seeded(seed):
        head = AttentionHead(maps.shape[1], classes, 64, 1, 4, grid=4)
    batches = epoch_batches((maps[: rows.train], labels[: rows.train]), min(64, rows.train), seed)
    fit(head, batches, _classification_loss, steps=steps, learning_rate=learning_rate, seed=seed)
    middle = rows.train + rows.validation
    scored = slice(rows.train, middle) if choosing else slice(middle, rows.total)
    with torch.no_grad():
        return float((head.eval()(maps[scored]).argmax(1) == labels[scored]).double().mean())


def open_gates(model: DiT, seed: int) -> DiT:
    """Let the blocks of an untrained transformer act: its gates, closed at the start, get weights N(0, 0.2) and bias 0.5."""
    generator = stream_generator(seed, "open_gates")
    for block in model.blocks:
        layer = block.adaLN_modulation[1]  # type: ignore[index]
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.copy_(0.2 * portable_normal(layer.weight.shape, generator))
            layer.bias.fill_(0.5)
    return model


class PictureNet(nn.Module):
    """Three convolutions of stride 2 with group norm and SiLU, the mean over what is left, a linear layer per target.

    Args:
        classes: of each target.
        widths: of the convolutions.
    """

    def __init__(self, classes: Sequence[int], widths: Sequence[int] = (32, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths[:-1]), widths, strict=True):
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1)
            layers.append(nn.Sequential(conv, nn.GroupNorm(8, width), nn.SiLU()))
        self.blocks = nn.ModuleList(layers)
        self.heads = nn.ModuleList(nn.Linear(widths[-1], count) for count in classes)

    def forward(self, images: Float[Tensor, "n 3 side side"]) -> list[Float[Tensor, "n classes"]]:
        """Logits of each target."""
        pooled = self.maps(images)[-1].mean(dim=(2, 3))
        return [head(pooled) for head in self.heads]

    def maps(self, images: Float[Tensor, "n 3 side side"]) -> list[Tensor]:
        """What each convolution gives."""
        kept = []
        for block in self.blocks:
            images = block(images)
            kept.append(images)
        return kept


def train_picture_net(
    images: Tensor, targets: Mapping[str, Tensor], rows: Rows, steps: int, learning_rate: float, seed: int
) -> dict[str, float]:
    """Accuracy on the test pictures of a network that learns all targets from the training pictures."""
    names = list(targets)
    with seeded(seed):
        model = PictureNet([int(targets[name].max()) + 1 for name in names])
    data = (images[: rows.train], *(targets[name][: rows.train] for name in names))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        errors = [nn.functional.cross_entropy(one, truth) for one, truth in zip(logits, batch[1:], strict=True)]
        return torch.stack(errors).sum()

    batches = epoch_batches(data, min(64, rows.train), seed)
    fit(model, batches, loss, steps=steps, learning_rate=learning_rate, schedule=one_cycle(steps), seed=seed)
    with torch.no_grad():
        scored = slice(rows.train + rows.validation, rows.total)
        logits = model.eval()(images[scored])
    return {
        name: float((one.argmax(1) == targets[name][scored]).double().mean())
        for name, one in zip(names, logits, strict=True)
    }


def train_unet(pictures: ShapePictures, steps: int, seed: int) -> Callable[[ADMUNet], None]:
    """A function that trains a small U-Net on noise of 1,000 steps; it ends with averaged weights."""
    path = VP.linear()

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = stream_generator(seed, "train_unet", step)
        chosen = pictures.images[torch.randint(len(pictures), (64,), generator=generator)]
        return chosen, portable_normal(chosen.shape, generator), torch.randint(1000, (64,), generator=generator)

    def train(model: ADMUNet) -> None:
        optimizer = make_optimizer(model, learning_rate=1e-3)
        average = EMA(model, 0.99)
        with average.following(optimizer):
            fit(
                model,
                draw,
                lambda net, batch: denoising_loss(net, path, *batch, target="noise"),  # type: ignore[misc]
                steps=steps,
                optimizer=optimizer,
                schedule=one_cycle(steps),
                clip_norm=1.0,
                seed=seed,
            )
        average.copy_to(model)

    return train


class _Generator(nn.Sequential):
    """64 numbers → a picture."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Linear(64, 64 * 16), nn.Unflatten(1, (64, 4, 4))]
        for before, width in ((64, 64), (64, 32), (32, 32)):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, width, 3, padding=1)]
            layers += [nn.GroupNorm(8, width), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(32, 3, 3, padding=1), nn.Tanh())


def train_discriminator(pictures: ShapePictures, steps: int, seed: int) -> Callable[[PictureNet], None]:
    """A function that trains a discriminator against a generator, with the logistic loss and a penalty on its gradient."""

    def train(discriminator: PictureNet) -> None:
        generator = _Generator()
        players = [
            torch.optim.Adam(player.parameters(), lr=1e-3, betas=(0.5, 0.99)) for player in (discriminator, generator)
        ]
        for step in range(steps):
            draws = stream_generator(seed, "train_discriminator", step)
            real = pictures.images[torch.randint(len(pictures), (64,), generator=draws)].requires_grad_()
            fake = generator(portable_normal((64, 64), draws))
            judged = discriminator(real)[0]
            (slope,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
            loss = (
                nn.functional.softplus(-judged).mean() + nn.functional.softplus(discriminator(fake.detach())[0]).mean()
            )
            loss = loss + 0.5 * slope.square().sum(dim=(1, 2, 3)).mean()
            _step(players[0], loss)
            _step(players[1], nn.functional.softplus(-discriminator(fake)[0]).mean())

    return train


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _classification_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
